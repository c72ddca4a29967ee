"""The frame of the preconditioners: a rule for one matrix, applied to all of a tree."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _check, _layout, _placement
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
