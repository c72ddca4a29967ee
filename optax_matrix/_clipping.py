"""Whether an optimizer clips its steps by a global norm."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_matrix import _check, _layout, _mesh, _paths

_NORM = 1e-3  # of all gradients: far below the limits that are in use
# Results of one matrix may depend a little on the others in its stack.
_SHORTER = 0.99


def check_clipping(
    tx: optax.GradientTransformation, params: optax.Params, **extra_args: Any
) -> list[str]:
    r"""Warns if an optimizer clips steps by a global norm, instead of gradients.

    Orthogonalized steps, Adam's and signs are as long for small gradients as for large
    ones. A clip that follows them acts as a lower learning rate that ignores the
    schedule, and does not keep a batch with large gradients out of the momentum.

    Such a clip is found by its effect on tiny random gradients :math:`g`, whose global
    norm is 1e-3. A clip of gradients does nothing to them, so the length of a step does
    not depend on whether other leaves have gradients. For halves :math:`H` of the
    leaves, such that any two leaves are apart in at least one, a leaf :math:`i` is
    found if

    .. math:: \|\Delta_i(g)\| < 0.99 \max_{H \ni i} \|\Delta_i(g_H)\|.

    Two updates are made of each, at the same parameters, and the second ones compared,
    because SOAP makes no step in its first. That is about :math:`4 \log_2 n` updates
    for :math:`n` leaves. Call it outside of `jax.jit`.

    A clip is not found if steps are in proportion to gradients (SGD, with or without
    momentum); if early steps are short (warm-up, RAdam, Prodigy); if entries of
    gradients near :math:`10^{-3} / \sqrt N`, for :math:`N` parameters, are small beside
    ``eps`` or an L2 penalty; or if long steps need no gradients (a large weight decay,
    `spectral_sphere_retract` from far away). Optimizers that scale all leaves by one
    number, such as D-Adaptation or normalized SGD, are found too.

    Args:
      tx: The whole optimizer, at its largest learning rate. In place of
        `optax.lookahead`, pass its inner optimizer.
      params: The parameters, a tree of at least two real floating arrays. They may be
        sharded.
      **extra_args: Further arguments of ``tx.update``, of arrays.

    Returns:
      The paths of the leaves that were found. The list is empty, and there is no
      warning, if there are none.

    Raises:
      TypeError: If ``tx`` is not a transformation, or a leaf not real floating.
      ValueError: If there are fewer than two leaves, a step is not finite, or all are
        zero.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_matrix as om
      >>> params = [{"kernel": jnp.ones((64, 64))} for _ in range(4)]
      >>> clip = optax.clip_by_global_norm(1.0)
      >>> om.diagnostics.check_clipping(optax.chain(clip, om.muon(0.2)), params)
      []
    """
    _check.transformation("tx", tx)
    _layout.check_all_floating(params)
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [_paths.path_name(path) for path, _ in paths]
    if len(names) < 2:
        raise ValueError(
            "`params` must have at least 2 leaves, so that one can depend on the "
            f"other, got {len(names)}."
        )
    tx = optax.with_extra_args_support(tx)
    start = tx.init(params)

    @jax.jit
    def step(kept: Any, key: jax.Array, params: Any, state: Any) -> Any:
        """Returns the lengths of a step for gradients of some leaves, and the state."""
        grads = optax.tree.random_like(key, params, jax.random.normal)
        size = _NORM / optax.tree.norm(optax.tree.cast(grads, jnp.float32))
        grads = jax.tree.map(
            lambda k, g: jnp.where(k, g * size.astype(g.dtype), 0), kept, grads
        )
        grads = jax.tree.map(_mesh.like, grads, params)
        updates, state = tx.update(grads, state, params, **extra_args)
        wide = jax.tree.leaves(optax.tree.cast(updates, jnp.float32))
        return jnp.stack([optax.tree.norm(u) for u in wide]), state

    def lengths(kept: np.ndarray) -> np.ndarray:
        tree = jax.tree.unflatten(structure, list(kept))
        _, state = step(tree, jax.random.key(0), params, start)
        found = np.asarray(step(tree, jax.random.key(1), params, state)[0])
        broken = [f"'{names[i]}'" for i in np.flatnonzero(~np.isfinite(found))]
        if broken:
            some = "" if kept.all() else ", if some gradients are zero"
            raise ValueError(
                "`tx` makes steps that are not finite for gradients of the global norm "
                f"{_NORM:g}{some}: {_paths.some(broken)}."
            )
        return found

    index = np.arange(len(names))
    together = longest = lengths(index >= 0)
    if not together.any():
        raise ValueError(
            "`tx` makes steps of zero, so nothing can be compared. Pass it at "
            "its largest learning rate, without `optax.MultiSteps`."
        )
    # Two indices differ in a bit.
    for bit in range((len(names) - 1).bit_length()):
        half = (index >> bit) % 2 == 0
        longest = np.maximum(longest, np.where(half, lengths(half), lengths(~half)))
    found = [names[i] for i in index[together < _SHORTER * longest]]
    if found:
        listed = _paths.some([f"'{name}'" for name in found])
        warnings.warn(
            f"`tx` makes shorter steps of some leaves if others have gradients too: "
            f"{listed}. It seems to clip, or to normalize, by a global norm after the "
            "optimizer. The length of these steps does not depend on that of the "
            "gradients, so the clip acts as a lower learning rate, and large gradients "
            "still fill the momentum. Clip gradients, before the optimizer: "
            "`optax.chain(optax.clip_by_global_norm(limit), optimizer)`.",
            stacklevel=2,
        )
    return found
