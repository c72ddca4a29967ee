"""Whether an optimizer clips its steps by a global norm."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_matrix import _check, _layout, _mesh, _paths

# The norm of all gradients: no clip of gradients in use has a limit below it.
_NORM = 1e-3
# Results of one matrix may depend a little on the others in its stack.
_SHORTER = 0.99


def check_clipping(
    tx: optax.GradientTransformation, params: optax.Params, **extra_args: Any
) -> dict[str, float]:
    r"""Warns if an optimizer clips steps by a global norm, instead of gradients.

    It makes two steps for random gradients :math:`g` whose global norm is 1e-3, and
    again for those of only a half :math:`H` of the leaves, with halves chosen such that
    every two leaves are apart once. With the lengths of the second steps (SOAP makes
    none in its first update),

    .. math:: f_i = \|\Delta_i(g)\| \big/ \max_{H \ni i} \|\Delta_i(g_H)\|.

    Gradients this small are not clipped, so the leaves should not depend on each other.
    Orthogonalized steps are as long for small gradients as for large ones, so a clip
    that follows the optimizer shortens them: :math:`f_i < 1`. It acts as a lower
    learning rate there, while a batch with a large gradient fills the momentum. It is
    the same with Adam and with signs.

    It finds clips only by their effect. Steps that are long without gradients hide it,
    such as those of a large weight decay or of `spectral_sphere_retract` from far away.
    For :math:`n` leaves it makes about :math:`4 \log_2 n` updates.

    Args:
      tx: The whole optimizer, at its largest learning rate: a warm-up begins with steps
        that are too short to be clipped.
      params: The parameters, a tree of at least two real floating arrays. They may be
        sharded.
      **extra_args: Further arguments of ``tx.update``, of arrays.

    Returns:
      The factors :math:`f_i` below 0.99, by the path of the leaf. If there are none, an
      empty dict, without a warning.

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
      {}
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
        """Makes a step for the gradients of some leaves; returns its lengths too."""
        grads = optax.tree.random_like(key, params, jax.random.normal)
        size = _NORM / optax.tree.norm(grads)
        grads = jax.tree.map(lambda g, k: (k * size * g).astype(g.dtype), grads, kept)
        grads = jax.tree.map(_mesh.like, grads, params)
        updates, state = tx.update(grads, state, params, **extra_args)
        lengths = jnp.stack([optax.tree.norm(u) for u in jax.tree.leaves(updates)])
        return lengths, optax.apply_updates(params, updates), state

    def lengths(kept: np.ndarray) -> np.ndarray:
        tree = jax.tree.unflatten(structure, list(kept))
        _, *after = step(tree, jax.random.key(0), params, start)
        return np.asarray(step(tree, jax.random.key(1), *after)[0])

    index = np.arange(len(names))
    together = longest = lengths(index >= 0)
    _check_lengths(names, together)
    # Two indices differ in a bit, so every two leaves are apart once.
    for bit in range((len(names) - 1).bit_length()):
        half = (index >> bit) % 2 == 0
        apart = np.where(half, lengths(half), lengths(~half))
        longest = np.maximum(longest, apart)
    shorter = together < _SHORTER * longest
    found = {names[i]: float(together[i] / longest[i]) for i in index[shorter]}
    if found:
        listed = _paths.some([f"'{name}' ({f:.2g})" for name, f in found.items()])
        warnings.warn(
            f"`tx` shortens these steps by the gradients of other leaves: {listed}. It "
            "seems to clip by a global norm after the optimizer, and so clips steps. "
            "Their length does not depend on that of the gradients: the clip only "
            "lowers the learning rate, and large gradients still fill the momentum. "
            "Clip gradients, before the optimizer: "
            "`optax.chain(optax.clip_by_global_norm(limit), optimizer)`.",
            stacklevel=2,
        )
    return found


def _check_lengths(names: list[str], lengths: np.ndarray) -> None:
    """Raises if steps are not finite or all zero, and so cannot be compared."""
    broken = [f"'{names[i]}'" for i in np.flatnonzero(~np.isfinite(lengths))]
    if broken:
        raise ValueError(
            f"`tx` makes steps that are not finite: {_paths.some(broken)}."
        )
    if not lengths.any():
        raise ValueError(
            "`tx` makes steps of zero, so nothing can be compared. Pass it at "
            "its largest learning rate, without `optax.MultiSteps`."
        )
