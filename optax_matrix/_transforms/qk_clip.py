"""Weakens the query and key projections of heads with large attention logits."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout, _paths
from optax_matrix._layout import layout as _spec
from optax_matrix._transforms import _arguments, _numerics


@dataclasses.dataclass(frozen=True)
class QKHeads:
    r"""Says how a leaf shares in the attention logits of a layer.

    A head whose logits are to become :math:`\gamma` times as large has its coordinates
    of the leaf multiplied by :math:`\gamma^p`, with :math:`p` = ``power``. For each
    product of a query and a key the powers must sum to 1.

    Args:
      layer: The key of the layer in the extra argument ``max_logits``.
      axes: The axes of the leaf that correspond to those of ``max_logits[layer]``. The
        last one, often the only one, counts heads, or heads and their channels in one
        axis. Axes before it count layers that are stacked.
      power: :math:`p`, not negative, for all coordinates of the last of ``axes``, or
        one for each of them.
      heads: The head of each of these coordinates; None: heads one after another, with
        the same number of channels each.

    Raises:
      TypeError: If ``layer`` is not a string or an axis is not an integer.
      ValueError: If an axis is named twice or a power is negative.

    Example:
      >>> query = QKHeads("attn", axes=1)  # (d, heads * head_dim), (d, heads, head_dim)
      >>> shared_keys = QKHeads("attn", axes=1, power=1.0)  # the query; keys stay
      >>> scanned = QKHeads("layers/attn", axes=(0, 2))  # (layers, d, heads, head_dim)
    """

    layer: str
    axes: int | tuple[int, ...]
    power: float | Sequence[float] | np.ndarray = 0.5
    heads: Sequence[int] | np.ndarray | None = None

    def __post_init__(self) -> None:
        """Checks what needs no shape."""
        if not isinstance(self.layer, str):
            raise TypeError(f"`layer` must be a string, got {self.layer!r}.")
        axes = _spec.int_tuple("axes", self.axes)
        if not axes or len(set(axes)) != len(axes):
            raise ValueError(
                f"`axes` must name at least one axis and none twice, got {axes}."
            )
        powers = np.asarray(self.power, np.float64)
        if powers.ndim > 1 or not np.all(powers >= 0):
            raise ValueError(
                "`power` must be one number that is not negative, or one per "
                f"coordinate, got {self.power}."
            )


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """A `QKHeads` for a leaf of known shape."""

    path: str
    spec: QKHeads
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    def factor(self, gamma: jax.Array) -> jax.Array:
        """Returns what the leaf is multiplied by, in a shape that broadcasts to it."""
        size = self.shape[self.axes[-1]]
        sizes = tuple(self.shape[axis] for axis in self.axes[:-1])
        if gamma.ndim != len(self.axes) or gamma.shape[:-1] != sizes:
            wanted = ", ".join([*map(str, sizes), "heads"])
            raise ValueError(
                f"`max_logits['{self.spec.layer}']` has the shape {gamma.shape}, but "
                f"the axes {self.axes} of '{self.path}', of shape {self.shape}, need "
                f"({wanted})."
            )
        heads, count = self.spec.heads, gamma.shape[-1]
        if heads is None:
            if size % count:
                raise ValueError(
                    f"`max_logits['{self.spec.layer}']` has {count} heads, which do "
                    f"not divide the {size} coordinates of axis {self.axes[-1]} of "
                    f"'{self.path}'. Name the head of each in `QKHeads(heads=...)`."
                )
            heads = np.repeat(np.arange(count), size // count)
        elif np.min(heads) < 0 or np.max(heads) >= count:
            raise ValueError(
                f"`heads` of '{self.path}' names {np.min(heads)} to {np.max(heads)}, "
                f"but `max_logits['{self.spec.layer}']` has heads 0 to {count - 1}."
            )
        gamma = gamma[..., np.asarray(heads)]
        powers = np.broadcast_to(np.asarray(self.spec.power), gamma.shape)
        factor = gamma ** jnp.asarray(powers, gamma.dtype)
        factor = factor.transpose(np.argsort(self.axes))
        kept = [n if a in self.axes else 1 for a, n in enumerate(self.shape)]
        return factor.reshape(kept)


def _fit(spec: Any, leaf: Any, path: str) -> _Fitted:
    """Checks a `QKHeads` against the shape of its leaf."""
    if not isinstance(spec, QKHeads):
        raise TypeError(
            f"`heads` must return a `QKHeads` or None, got {spec!r} at '{path}'."
        )
    _layout.check_floating(leaf, path)
    shape = tuple(jnp.shape(leaf))
    given = _spec.int_tuple("axes", spec.axes)
    axes = tuple(axis % len(shape) if shape else axis for axis in given)
    inside = all(-len(shape) <= axis < len(shape) for axis in given)
    if not inside or len(set(axes)) < len(axes):
        raise ValueError(
            f"`axes` {given} do not fit the leaf '{path}' of shape {shape}."
        )
    size = shape[axes[-1]]
    for name in ("power", "heads"):
        value = np.asarray(getattr(spec, name))
        if value.ndim and value.shape != (size,):
            raise ValueError(
                f"`{name}` has the shape {value.shape}, but axis {axes[-1]} of "
                f"'{path}' has {size} coordinates."
            )
    return _Fitted(path, spec, shape, axes)


def _gammas(
    logits: Any, layers: set[str], threshold: ArrayLike
) -> Mapping[str, jax.Array]:
    """Returns what the logits of each head are to be multiplied by, by layer."""
    if logits is None:
        raise ValueError(
            "`qk_clip` needs the largest attention logits: call `tx.update(updates, "
            "state, params, max_logits={layer: logits})`, got None."
        )
    if set(logits) != layers:
        raise ValueError(
            f"`max_logits` must have the layers {sorted(layers)}, got {sorted(logits)}."
        )

    def gamma(found: ArrayLike) -> jax.Array:
        found = jnp.asarray(found, jnp.result_type(found, jnp.float32))
        limit = _numerics.as_scalar(threshold, found)
        # An infinite logit would set the head to zero.
        shrunk = jnp.where(jnp.isfinite(found), limit / found, jnp.nan)
        return jnp.where(found <= limit, 1.0, shrunk)

    return {layer: gamma(found) for layer, found in logits.items()}


Heads: TypeAlias = Callable[[str, Any], QKHeads | None]


def qk_clip(
    heads: Heads, threshold: ArrayLike = 100.0
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks query and key projections of heads whose largest logit is too large.

    With :math:`S_h` the largest attention logit of head :math:`h` in the batch,
    :math:`\tau` = ``threshold``, :math:`p` the power of a coordinate that belongs to
    :math:`h`, and elementwise,

    .. math::
      \gamma_h = \min(1, \tau / S_h), \qquad
      U \leftarrow \gamma_h^p (W + U) - W,

    so that the parameters after the step, :math:`W + U`, are multiplied by
    :math:`\gamma_h^p`. Heads below the threshold are not changed. Put it at the end of
    a chain, after learning rate and weight decay, and after `optax.MultiSteps`, which
    would pass the logits of the last micro-batch alone::

        tx = optax.chain(om.muon(0.02), om.qk_clip(heads))
        tx.update(grads, state, params, max_logits={"blocks/0/attn": logits})

    ===================== ======================================= ====================
    attention             leaf                                    ``power``
    ===================== ======================================= ====================
    multi-head            query, key                              0.5
    grouped-query         query; keys are shared and stay         1
    latent (MLA)          query, key: channels without position   0.5
    latent                query: rotary channels                  1; their key stays
    any                   values; channels of values              0, or None
    ===================== ======================================= ====================

    Keys that heads share are not changed, because that would change the logits of heads
    below the threshold too.

    Args:
      heads: Takes the path of a leaf, as in ``blocks/0/attn/q/kernel``, and the leaf,
        and returns its `QKHeads`, or None for leaves that have no part in the logits.
      threshold: :math:`\tau`, positive.

    Returns:
      A transformation without state that needs ``params`` and the extra argument
      ``max_logits``: a mapping from the layers to arrays of :math:`S_h`, one per head,
      with the largest over the batch, all of its micro-batches and devices, after the
      scaling that precedes the softmax. Updates keep their shape and dtype. Logits that
      are not finite make the parameters of their head NaN.

    Raises:
      TypeError: At ``init``, if ``heads`` returns anything else, or for a leaf that is
        not real and floating.
      ValueError: At construction, if ``threshold`` is not positive; at ``init``, if no
        leaf has heads, or axes or lengths do not fit a leaf; in ``update`` without
        ``params`` or ``max_logits``, or if its layers or shapes do not fit.

    References:
      Kimi Team, 2025, MuonClip,
      `arXiv:2507.20534 <https://arxiv.org/abs/2507.20534>`_. It describes multi-head
      and latent attention; the rule for shared keys follows from the latter.
    """
    _arguments.number("threshold", threshold, 0.0, low_open=True)
    if not _paths.is_function(heads):
        raise TypeError(f"`heads` must be a function of (path, leaf), got {heads!r}.")

    def fitted(tree: Any) -> list[_Fitted | None]:
        """Returns an entry per leaf, in order."""
        fits = []
        for place in _paths.places(tree):
            if not place.empty:
                spec = heads(place.name, place.leaf)
                fits.append(spec and _fit(spec, place.leaf, place.name))
        return fits

    def init(params: optax.Params) -> optax.EmptyState:
        if not any(fitted(params)):
            raise ValueError(
                "`heads` returned None for every leaf: return a `QKHeads` for the "
                "projections of queries and keys."
            )
        return optax.EmptyState()

    def update(updates, state, params=None, *, max_logits=None, **extra_args):
        del extra_args
        _check.params_given(params, "qk_clip")
        fits = fitted(params)
        layers = {fit.spec.layer for fit in fits if fit}
        gammas = _gammas(max_logits, layers, threshold)

        def clip(u: jax.Array, p: jax.Array, fit: _Fitted | None) -> jax.Array:
            if fit is None:
                return u
            wide, p = _numerics.wide(u), p.astype(_numerics.wide_dtype(u))
            factor = fit.factor(gammas[fit.spec.layer]).astype(wide.dtype)
            # In this form, a factor of 1 leaves the update exactly as it is.
            return (factor * wide + (factor - 1) * p).astype(u.dtype)

        leaves, tree = jax.tree.flatten(updates)
        clipped = map(clip, leaves, jax.tree.leaves(params), fits)
        return jax.tree.unflatten(tree, clipped), state

    return optax.GradientTransformationExtraArgs(init, update)
