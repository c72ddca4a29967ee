"""One transformation up to a step, another from there on."""

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
    """Applies `first` to the updates with numbers below `step`, then `second`.

    Update number t (from 0) is ``first``'s while t < ``step`` and ``second``'s from
    then on. Before the switch ``second`` sees every update too, its own output thrown
    away: its moments are warm and its schedules have counted on when it takes over.
    After the switch ``first`` no longer runs.

    Args:
      step: The number of the first update that ``second`` makes, not negative. It may
        be injected, and changed during a run.
      first: A transformation or a whole optimizer.
      second: The one that takes over.

    Returns:
      A transformation whose state holds both states. Until the switch a step costs
      both, afterwards only ``second``.

    Raises:
      ValueError: At construction, if ``step`` is a negative number.

    Example:
      >>> import optax_matrix as om
      >>> tx = switch_at(200, om.hopper(1e-3, routing="matrix"), optax.adam(1e-3))
    """
    _check.in_range("step", step, 0.0)
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
