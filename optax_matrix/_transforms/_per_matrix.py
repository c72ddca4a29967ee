"""Shared code of transformations that keep a state per matrix, on its owner."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from optax_matrix import _layout, _placement
from optax_matrix._transforms import _numerics

Scalars = Mapping[str, Any]


class PerMatrixState(NamedTuple):
    """State of the transformations that keep a state for each matrix."""

    count: jax.Array  # int32, updates seen so far
    # By shape, a `MatrixStack` with the state of every matrix of the shape.
    matrices: Any


def per_matrix(
    make: Callable[[int, int, DTypeLike], Any],
    work: Callable[[Sequence[_placement.Leaf]], Any],
    scalars: Mapping[str, Any],
    layout: _layout.Layout,
    place: _placement.Placement,
    block_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that does some work on every matrix.

    Args:
      make: Makes the state of one matrix from its inputs, outputs and dtype.
      work: Returns the work for `map_matrices` on the leaves.
      scalars: Its hyperparameters, which may be traced, schedules, or trees of them.
        It gets their values, and ``count``, the number of earlier updates.
      layout: Which axes of a leaf are the matrix.
      place: Where leaves lie.
      block_size: The largest block, see `Preconditioner`; None is whole matrices.
    """

    def resolved(tree: Any) -> list[_placement.Leaf]:
        leaves = _placement.resolve(tree, layout, place, by_type=True)
        if block_size is None:
            return leaves
        return [
            leaf._replace(view=_layout.blocked(leaf.view, block_size))
            for leaf in leaves
        ]

    def init(params: optax.Params) -> PerMatrixState:
        _layout.check_all_floating(params)
        leaves = resolved(params)
        # `optax.tree.map_params` inits a tree without leaves, and takes a leaf of that
        # state for whatever the real state has in its place.
        matrices = jnp.zeros((0,), jnp.int32)
        if leaves:
            matrices = _placement.init_states(make, leaves, place.stack_size)
        return PerMatrixState(jnp.zeros((), jnp.int32), matrices)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves = resolved(updates)
        count = _numerics.next_count(state.count)
        if not leaves:
            return updates, PerMatrixState(count, state.matrices)
        values = jax.tree.map(
            lambda value: jnp.asarray(_numerics.value_at(value, state.count)),
            dict(scalars),
        )
        done, matrices = _placement.map_matrices(
            work(leaves),
            leaves,
            state.matrices,
            values | {"count": state.count},
            stack_size=place.stack_size,
        )
        tree = jax.tree.unflatten(jax.tree.structure(updates), done)
        return tree, PerMatrixState(count, matrices)

    return optax.GradientTransformationExtraArgs(init, update)
