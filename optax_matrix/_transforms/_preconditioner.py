"""The frame of the preconditioners: a rule for one matrix, applied to all of a tree."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _check, _layout, _linalg, _placement
from optax_matrix._linalg import Traffic
from optax_matrix._transforms import _numerics


class PreconditionState(NamedTuple):
    """State of the preconditioners."""

    count: jax.Array  # int32, updates seen so far
    # By shape, the state of every matrix of it; first axes are spread over devices.
    matrices: dict[str, Any]


class Health(NamedTuple):
    """How the refreshes of a root or a basis went."""

    failures: jax.Array  # int32, failed in a row; the last good result is in use
    stuck: jax.Array  # bool, whether they ever were `max_failures`


def healthy() -> Health:
    """Of a side that was never refreshed."""
    return Health(jnp.zeros((), jnp.int32), jnp.zeros((), bool))


def after_refresh(health: Health, good: jax.Array, max_failures: ArrayLike) -> Health:
    """With one more refresh, which was good or failed."""
    failures = jnp.where(good, 0, health.failures + 1)
    return Health(failures, health.stuck | (failures >= max_failures))


def per_matrix(
    rule: _placement.MatrixRule,
    cadence: _placement.Cadence,
    scalars: Mapping[str, ArrayLike],
    *,
    block_size: int | None,
    layout: _layout.Layout,
    placement: _placement.Placement | None,
) -> optax.GradientTransformationExtraArgs:
    """A transformation that applies `rule` to every matrix, or block of one."""
    place = placement or _placement.Placement()

    def views(tree: optax.Params) -> list[_layout.MatrixView]:
        whole = [view for view, _ in _layout.tree_views(layout, tree)]
        if block_size is None:
            return whole
        return [_layout.blocked(view, block_size) for view in whole]

    def init(params: optax.Params) -> PreconditionState:
        leaves, shardings = jax.tree.leaves(params), place.of(params, as_typed=True)
        states = _placement.init(rule, views(params), leaves, shardings, place.strategy)
        return PreconditionState(jnp.zeros((), jnp.int32), states)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        traced = {name: jnp.asarray(value) for name, value in scalars.items()}
        done, matrices = _placement.update(
            rule,
            cadence,
            views(updates),
            jax.tree.leaves(updates),
            place.of(updates, as_typed=True),
            state.matrices,
            traced | {"count": state.count},
            place.strategy,
        )
        count = _numerics.next_count(state.count)
        tree = jax.tree.unflatten(jax.tree.structure(updates), done)
        return tree, PreconditionState(count, matrices)

    return optax.GradientTransformationExtraArgs(init, update)


def update_flops(
    m: int, n: int, sides: tuple[bool, bool], rotations: int, parts: int
) -> int:
    """What one of the parts of a matrix has of an update without refresh, of matmuls.

    Args:
      m: Inputs.
      n: Outputs.
      sides: Which of the two have a statistic.
      rotations: How many products there are besides with the matrices of each side.
      parts: In how many parts the rows of each product are.
    """
    rows, columns = -(-m // parts), -(-n // parts)
    left, right = sides
    of_left = (1 + rotations) * 2 * rows * m * n
    of_right = 2 * columns * m * n + rotations * 2 * rows * n * n
    return left * of_left + right * of_right


def update_traffic(
    m: int,
    n: int,
    sides: tuple[bool, bool],
    between: int,
    parts: int,
    dtype: DTypeLike,
    factor_dtype: str | None,
) -> Traffic:
    """What one of the parts of a matrix receives from the others in such an update.

    Args:
      m: Inputs.
      n: Outputs.
      sides: Of which the matrix is gathered to multiply with.
      between: How many m×n matrices are gathered between products, besides what the
        rule takes and what it returns.
      parts: In how many parts the rows of each are.
      dtype: Of the updates.
      factor_dtype: Of the factors in the state; None is that of the arithmetic.
    """
    (left, right), wide = sides, _linalg.at_least_float32(dtype)
    total = (left * m * m + right * n * n) * jnp.dtype(factor_dtype or wide).itemsize
    total += (2 * jnp.dtype(dtype).itemsize + between * wide.itemsize) * m * n
    return Traffic(0, left + right + 2 + between, total * (parts - 1) // parts)


def as_cadence(start: int, every: int, stagger: bool) -> _placement.Cadence:
    """Checks the arguments of that name."""
    _check.static_int("start", start, 0)
    _check.static_int("refresh", every, 1)
    return _placement.Cadence(start, every, bool(stagger))


def check_sizes(max_dim: int, block_size: int | None) -> None:
    """Checks the arguments of that name."""
    _check.static_int("max_dim", max_dim, 1)
    if block_size is not None:
        _check.static_int("block_size", block_size, 1)


def as_state_dtype(name: str, value: DTypeLike | None) -> str | None:
    """The name of a dtype that state is kept in; None is that of the arithmetic."""
    if value is None:
        return None
    allowed = ("bfloat16", "float32", "float64")
    try:
        found = jnp.dtype(value).name
    except TypeError:
        _check.one_of(name, value, allowed)
        raise
    _check.one_of(name, found, allowed)
    return found
