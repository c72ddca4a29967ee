"""Switches from one transformation to another at a step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_matrix import _check
from optax_matrix._transforms import _numerics


class SwitchAtState(NamedTuple):
    """State of `switch_at`."""

    count: jax.Array  # int32, updates seen so far
    first: Any  # state of the first, as it was at the switch from then on
    second: Any  # state of the second, kept current from the start


def switch_at(
    step: ArrayLike,
    first: optax.GradientTransformation,
    second: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Applies ``first`` until a given step, and ``second`` from then on.

    Update number t (from 0) is that of ``first`` while t < ``step``, and that of
    ``second`` from then on. Before the switch ``second`` receives every update as well,
    and its output is discarded, so that its moments and schedules are up to date when
    it takes over. After the switch ``first`` no longer runs.

    Args:
      step: The number of the first update of ``second``, not negative. It may be
        injected and changed during a run.
      first: A transformation or a whole optimizer.
      second: The transformation that takes over.

    Returns:
      A transformation whose state holds both states. Until the switch, a step costs as
      much as both; afterwards, as much as ``second``.

    Raises:
      ValueError: At construction, if ``step`` is a negative number.
      TypeError: At construction, for arguments of another type.

    Example:
      >>> import optax_matrix as om
      >>> tx = switch_at(200, om.hopper(1e-3, routing="matrix"), optax.adam(1e-3))
    """
    _check.number("step", step, 0.0)
    _check.transformation("first", first)
    _check.transformation("second", second)
    first = optax.with_extra_args_support(first)
    second = optax.with_extra_args_support(second)

    def init(params: optax.Params) -> SwitchAtState:
        return SwitchAtState(
            jnp.zeros((), jnp.int32), first.init(params), second.init(params)
        )

    def update(updates, state, params=None, **extra_args):
        late, second_state = second.update(updates, state.second, params, **extra_args)

        def run_first(first_state: Any) -> tuple[Any, Any]:
            return first.update(updates, first_state, params, **extra_args)

        def keep_second(first_state: Any) -> tuple[Any, Any]:
            return late, first_state

        chosen, first_state = jax.lax.cond(
            state.count < jnp.asarray(step).astype(jnp.int32),
            run_first,
            keep_second,
            state.first,
        )
        count = _numerics.next_count(state.count)
        return chosen, SwitchAtState(count, first_state, second_state)

    return optax.GradientTransformationExtraArgs(init, update)
