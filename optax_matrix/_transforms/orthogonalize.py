"""Replaces each matrix of an update by its polar factor."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_matrix import _layout, _linalg, _placement
from optax_matrix._transforms import _numerics, _stateless


class OrthogonalizeState(NamedTuple):
    """State of `orthogonalize` with a `Placement` that has a ``period``."""

    count: jax.Array  # int32, updates seen so far


@dataclasses.dataclass(frozen=True)
class Polar:
    """Takes polar factors of matrices of one shape; work for `map_matrices`."""

    method: _linalg.PolarMethod
    stack_size: int | None

    def __call__(
        self, arrays: Sequence[jax.Array], state: Any, scalars: Any
    ) -> tuple[list[jax.Array], Any]:
        """Returns the polar factors."""
        del scalars
        m, n = arrays[0].shape[-2:]
        size = self.stack_size or _placement.stack_size(m, n)
        return _placement.map_stacks(self.method.polar, arrays, size), state


def orthogonalize(
    method: str | _linalg.PolarMethod | None = "newton_schulz",
    *,
    layout: _layout.Layout = None,
    placement: _placement.Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each matrix of an update by its polar factor, exactly or approximately.

    With the singular value decomposition :math:`X = U S V^\top`,

    .. math:: X \leftarrow \operatorname{polar}(X) = U V^\top.

    Args:
      method: ``"newton_schulz"``, ``"halley"``, ``"zolotarev"``, ``"mud"`` or
        ``"exact"`` with default settings; or an object with settings: `NewtonSchulz`,
        `Halley`, `Zolotarev`, `MUD`, `Exact`, `LargestSlices`, or any `PolarMethod`.
        None returns updates unchanged. docs/polar_methods.md compares them.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack is orthogonalized separately.
      placement: Where leaves lie on a mesh with auto axes, and the size of stacks, see
        `Placement`. None: infer shardings from explicit axes and choose the size of
        stacks automatically. With a ``period``, most updates take the polar factors of
        what each device holds of a matrix.

    Returns:
      A transformation without state, but for a counter with a ``period``. Updates keep
      their shape and dtype. Zero matrices stay zero; NaN or Inf in one matrix does not
      affect the others.

    Raises:
      ValueError: At construction, for an unknown method, or a ``period`` without one;
        at ``init``, if a leaf does not fit ``layout``, or its sharding does not divide
        it, with its path, and for a ``period`` on auto axes without their shardings.
      TypeError: At construction, if ``method`` is not a method; at ``init``, for leaves
        that are not real floating, with their paths.

    Sharding:
      Any. Each matrix has one owner, a device that receives the matrix whole in one
      exchange for all matrices of a shape, and sends the result back in another. With a
      ``period`` the updates between have no exchange. See docs/sharding.md.
    """
    place = _placement.as_placement(placement, periodic=method is not None)
    if method is None:
        return _stateless.unchanged()
    polar = _linalg.as_method(method)
    work = Polar(polar, place.stack_size)
    transposable = bool(getattr(polar, "transposable", False))

    def init(params: optax.Params) -> OrthogonalizeState | optax.EmptyState:
        leaves = _placement.resolve(params, layout, place)
        # Raises what `update` would raise.
        _placement.make_plans(leaves, transposable, place.stack_size)
        if place.period == 1:
            return optax.EmptyState()
        _placement.check_visible(leaves, place)
        return OrthogonalizeState(jnp.zeros((), jnp.int32))

    def whole(leaves: Sequence[_placement.Leaf]) -> list[jax.Array]:
        return _placement.map_matrices(
            work, leaves, transposable=transposable, stack_size=place.stack_size
        )[0]

    def pieces(leaves: Sequence[_placement.Leaf]) -> list[jax.Array]:
        done, ratios = _placement.map_pieces(work, leaves, transposable=transposable)
        return [
            (_numerics.wide(x) * (place.piece_scale * ratio)).astype(x.dtype)
            for x, ratio in zip(done, ratios, strict=True)
        ]

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves = _placement.resolve(updates, layout, place)
        if place.period == 1:
            done = whole(leaves)
        else:
            due = state.count % place.period == 0
            done = jax.lax.cond(due, lambda: whole(leaves), lambda: pieces(leaves))
            state = OrthogonalizeState(_numerics.next_count(state.count))
        return jax.tree.unflatten(jax.tree.structure(updates), done), state

    return optax.GradientTransformationExtraArgs(init, update)
