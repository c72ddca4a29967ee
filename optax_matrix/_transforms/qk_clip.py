"""Scales down the projections of attention heads whose logits are too large."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout, _paths
from optax_matrix._layout.layout import int_tuple
from optax_matrix._transforms import _numerics


@dataclasses.dataclass(frozen=True, eq=False)
class QKProjection:
    r"""Describes how a leaf contributes to the attention logits of a layer.

    To multiply the logits of a head by :math:`\gamma`, its entries of the leaf are
    multiplied by :math:`\gamma^p`, with :math:`p` = ``power``. The powers of a query
    and a key that are multiplied must sum to 1.

    Args:
      layer: The key of the layer in the extra argument ``max_logits``.
      axes: The axes of the leaf that correspond to those of ``max_logits[layer]``. The
        last one, often the only one, counts heads, or heads and their channels in one
        axis. Axes before it count layers that are stacked.
      power: :math:`p`, not negative: a number, or an array that broadcasts to the leaf.
      heads: The head of each coordinate of the last of ``axes``. None: heads are
        contiguous and have equally many channels.

    Raises:
      TypeError: If ``layer`` is not a string, or an axis or a head not an integer.
      ValueError: If there is no axis, or a power or a head is negative.

    Example:
      >>> query = QKProjection("attn", axes=1)  # (d, heads * head_dim)
      >>> shared_keys = QKProjection("attn", axes=1, power=1.0)  # its query
      >>> scanned = QKProjection("attn", axes=(0, 2))  # (layers, d, heads, head_dim)
      >>> fused = QKProjection("attn", axes=2, power=[[[0.5]], [[0.5]], [[0.0]]])
      >>> # (d, 3, heads, head_dim): q, k, v
    """

    layer: str
    axes: int | tuple[int, ...]
    power: ArrayLike | Sequence[Any] = 0.5
    heads: Sequence[int] | np.ndarray | None = None

    def __post_init__(self) -> None:
        """Checks what does not depend on the shape of the leaf."""
        if not isinstance(self.layer, str):
            raise TypeError(f"`layer` must be a string, got {self.layer!r}.")
        if not int_tuple("axes", self.axes):
            raise ValueError("`axes` must name at least one axis, got ().")
        try:
            power = np.asarray(self.power, np.float64)
        except (TypeError, ValueError):
            raise TypeError(f"`power` must hold numbers, got {self.power!r}.") from None
        if not np.all((power >= 0) & np.isfinite(power)):
            raise ValueError(
                f"`power` must not be negative or infinite, got {self.power}."
            )
        if self.heads is not None:
            heads = np.asarray(self.heads)
            if not np.issubdtype(heads.dtype, np.integer):
                raise TypeError(f"`heads` must hold integers, got {self.heads}.")
            if heads.ndim != 1 or np.any(heads < 0):
                raise ValueError(
                    f"`heads` must be a list of indices from 0, got {self.heads}."
                )


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """A `QKProjection` for a leaf of known shape."""

    path: str
    spec: QKProjection
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    def factor(self, gamma: jax.Array) -> jax.Array:
        """Returns what the leaf is multiplied by, in a shape that broadcasts to it."""
        name = f"`max_logits['{self.spec.layer}']`"
        *stack, size = (self.shape[axis] for axis in self.axes)
        if gamma.ndim != len(self.axes) or [*gamma.shape[:-1]] != stack:
            wanted = ", ".join([*map(str, stack), "heads"])
            raise ValueError(
                f"{name} has the shape {gamma.shape}, but the axes {self.axes} of "
                f"'{self.path}', of shape {self.shape}, need ({wanted})."
            )
        heads, count = self.spec.heads, gamma.shape[-1]
        if heads is None:
            if size % count:
                raise ValueError(
                    f"{name} has {count} heads, which do not divide the {size} "
                    f"coordinates of axis {self.axes[-1]} of '{self.path}'. Name the "
                    "head of each in `QKProjection(heads=...)`."
                )
            # Not `jnp.repeat`, which refuses a sharded axis on an explicit mesh.
            channels = (*gamma.shape, size // count)
            gamma = jnp.broadcast_to(gamma[..., None], channels)
            gamma = gamma.reshape(*stack, size)
        else:
            if np.max(heads) >= count:
                raise ValueError(
                    f"`heads` of '{self.path}' names head {np.max(heads)}, but {name} "
                    f"has heads 0 to {count - 1}."
                )
            gamma = gamma[..., np.asarray(heads)]
        gamma = gamma.transpose(np.argsort(self.axes))
        kept = [n if axis in self.axes else 1 for axis, n in enumerate(self.shape)]
        power = jnp.asarray(self.spec.power, gamma.dtype)
        return gamma.reshape(kept) ** jnp.reshape(
            power, (1,) * (len(kept) - power.ndim) + power.shape
        )


def _fit(spec: Any, leaf: Any, path: str) -> _Fitted:
    """Checks a `QKProjection` against the shape of its leaf."""
    if not isinstance(spec, QKProjection):
        raise TypeError(
            f"`projections` must return a `QKProjection` or None, got {spec!r} at "
            f"'{path}'."
        )
    _layout.check_floating(leaf, path)
    shape, given = tuple(jnp.shape(leaf)), int_tuple("axes", spec.axes)
    inside = all(-len(shape) <= axis < len(shape) for axis in given)
    axes = tuple(axis + len(shape) if axis < 0 else axis for axis in given)
    if not inside or len(set(axes)) < len(axes):
        raise ValueError(
            f"`axes` {given} do not fit the leaf '{path}' of shape {shape}."
        )
    power = np.shape(spec.power)
    fits = len(power) <= len(shape) and all(
        n in (1, size) for n, size in zip(power[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"`power` has the shape {power}, which does not broadcast to '{path}' of "
            f"shape {shape}."
        )
    if spec.heads is not None and len(spec.heads) != shape[axes[-1]]:
        raise ValueError(
            f"`heads` has {len(spec.heads)} entries, but axis {axes[-1]} of '{path}' "
            f"has {shape[axes[-1]]} coordinates."
        )
    return _Fitted(path, spec, shape, axes)


def _gammas(
    logits: Any, layers: set[str], threshold: ArrayLike
) -> dict[str, jax.Array]:
    """Returns what the logits of each head are to be multiplied by, by layer."""
    if not isinstance(logits, Mapping):
        raise TypeError(
            "`qk_clip` needs the largest attention logits: call `tx.update(updates, "
            f"state, params, max_logits={{layer: logits}})`, got {logits!r}."
        )
    missing = sorted(layers - set(logits))
    if missing:
        found = ", ".join(sorted(map(str, logits))) or "none"
        raise ValueError(f"`max_logits` lacks the layers {missing}; it has {found}.")

    def gamma(found: ArrayLike) -> jax.Array:
        found = jnp.asarray(found)
        found = found.astype(jnp.promote_types(found.dtype, jnp.float32))
        limit = _numerics.as_scalar(threshold, found)
        # An infinite logit would set the head to zero.
        shrunk = jnp.where(jnp.isfinite(found), limit / found, jnp.nan)
        return jnp.where(found <= limit, 1.0, shrunk)

    return {layer: gamma(logits[layer]) for layer in layers}


def qk_clip(
    projections: Callable[[str, Any], QKProjection | None],
    threshold: ArrayLike = 100.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks the query and key projections of heads whose logits are too large.

    With :math:`S_h` the largest attention logit of head :math:`h` in the batch,
    :math:`\tau` = ``threshold``, :math:`p` the power of an entry that belongs to
    :math:`h`, and elementwise,

    .. math::
      \gamma_h = \min(1, \tau / S_h), \qquad
      U \leftarrow \gamma_h^p (W + U) - W,

    so that the parameters after the step, :math:`W + U`, are multiplied by
    :math:`\gamma_h^p`. Heads below the threshold are not changed. Put it at the end of
    a chain, after learning rate and weight decay::

        tx = optax.chain(om.muon(0.02), om.qk_clip(projections))
        tx.update(grads, state, params, max_logits={"blocks/0/attn": logits})

    The logits are those of the forward pass before the step, so a step that is too
    long shows in the next one. Average gradients of several batches in the loss and
    pass the largest logits of all; inside `optax.MultiSteps`, only those of the last
    batch count, and after it, every batch clips. An optimizer that fixes the norm of
    each matrix, such as `muonh`, undoes the clip in its next step.

    ============= ============================================== =========
    attention     leaf                                           ``power``
    ============= ============================================== =========
    multi-head    query, key                                     0.5
    grouped-query query                                          1
    latent (MLA)  up-projections of query and key: channels that 0.5
                  are not rotary
    latent        up-projection of the query: rotary channels    1
    all           biases: as their kernels
    all           values; keys and rotary keys that heads share  None, or 0
    ============= ============================================== =========

    A key that heads share is not scaled, because that would change the logits of heads
    below the threshold too. To scale it nevertheless, pass the largest logit of each
    group, and describe query and key by groups, with a power of 0.5.

    Args:
      projections: Takes the path of a leaf, as in ``blocks/0/attn/q/kernel``, and the
        leaf, and returns its `QKProjection`, or None for leaves that do not affect the
        logits. Under `optax.inject_hyperparams`, pass
        ``static_args=("projections",)``.
      threshold: :math:`\tau`, positive.

    Returns:
      A transformation without state that needs ``params`` and the extra argument
      ``max_logits``, a mapping from layers to arrays with :math:`S_h` of each head: the
      maximum over batch, positions and devices of what the softmax is taken of. It may
      have more layers. Updates keep their shape and dtype. A logit of NaN or
      plus infinity makes the entries of its head NaN where the power is not 0.

    Raises:
      TypeError: At construction, if ``projections`` is not a function or ``threshold``
        not a number; at ``init``, if ``projections`` returns something else, or for a
        leaf that is not real and floating; in ``update``, if ``max_logits`` is not a
        mapping.
      ValueError: At construction, if ``threshold`` is not positive; at ``init``, if no
        leaf is described, or a description does not fit its leaf; in ``update`` without
        ``params``, or if layers or shapes of ``max_logits`` do not fit.

    References:
      Kimi Team, 2025, MuonClip,
      `arXiv:2507.20534 <https://arxiv.org/abs/2507.20534>`_, for multi-head and latent
      attention; queries with shared keys are scaled like those with shared rotary keys.
    """
    _check.number("threshold", threshold, 0.0, low_open=True)
    if not _paths.is_function(projections):
        raise TypeError(
            f"`projections` must be a function of (path, leaf), got {projections!r}."
        )

    def fitted(tree: Any) -> list[_Fitted | None]:
        """Returns an entry per leaf, in order."""
        specs = [
            (place, projections(place.name, place.leaf))
            for place in _paths.places(tree)
            if not place.empty
        ]
        return [
            None if spec is None else _fit(spec, place.leaf, place.name)
            for place, spec in specs
        ]

    def init(params: optax.Params) -> optax.EmptyState:
        if not any(fitted(params)):
            raise ValueError(
                "`projections` returned None for every leaf: return a `QKProjection` "
                "for the projections of queries and keys."
            )
        return optax.EmptyState()

    def update(updates, state, params=None, *, max_logits=None, **extra_args):
        del extra_args
        _check.params_given(params, "qk_clip")
        fits = fitted(updates)
        layers = {fit.spec.layer for fit in fits if fit}
        gammas = _gammas(max_logits, layers, threshold)

        def clip(u: jax.Array, p: jax.Array, fit: _Fitted | None) -> jax.Array:
            if fit is None:
                return u
            wide, p = _numerics.wide(u), p.astype(_numerics.wide_dtype(u))
            factor = fit.factor(gammas[fit.spec.layer]).astype(wide.dtype)
            # In this form, a factor of 1 leaves the update exactly as it is.
            return (factor * wide + (factor - 1) * p).astype(u.dtype)

        leaves, structure = jax.tree.flatten(updates)
        weights = _paths.at_leaves(updates, params)
        clipped = [clip(*each) for each in zip(leaves, weights, fits, strict=True)]
        return jax.tree.unflatten(structure, clipped), state

    return optax.GradientTransformationExtraArgs(init, update)
