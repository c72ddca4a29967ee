"""Nesterov's look-ahead along a moving average of the steps of an optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout
from optax_matrix._evaluation import check_whole, evaluation_params
from optax_matrix._transforms import _arguments, _numerics


class EmaLookaheadState(NamedTuple):
    """State of `ema_lookahead`."""

    count: jax.Array  # int32, updates seen so far
    movement: Any  # m, an average of steps, float32, with the shapes of the parameters
    strength: jax.Array  # float32, how far the parameters are ahead, in units of m
    inner: Any  # state of the optimizer

    def evaluation_params(self, params: optax.Params) -> optax.Params:
        """Returns the parameters without the look-ahead."""
        check_whole(params, self.movement)

        def back(p: jax.Array, m: jax.Array) -> jax.Array:
            return (p.astype(m.dtype) - self.strength * m).astype(p.dtype)

        behind = jax.tree.map(back, params, self.movement)
        return evaluation_params(self.inner, behind)


def ema_lookahead(
    inner: optax.GradientTransformation,
    strength: optax.ScalarOrSchedule = 0.3,
    *,
    momentum: ArrayLike = 0.99,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes gradients ahead of the parameters, along an average of their movement.

    EMA-Nesterov. With :math:`A` the step of ``inner``, :math:`\beta_t` = ``strength``,
    :math:`\gamma` = ``momentum`` and :math:`m_0 = 0`,

    .. math::
      \theta_{t+1} = A(\theta_t + \beta_t m_t), \qquad
      m_{t+1} = \gamma m_t + (1 - \gamma) (\theta_{t+1} - \theta_t).

    The parameters that are trained are :math:`\theta_t + \beta_t m_t`, where the
    gradient is taken; `evaluation_params` returns :math:`\theta_t`.

    Args:
      inner: The whole optimizer, with its learning rate and routing. `optax.MultiSteps`
        and around it `optax.apply_if_finite` go around this wrapper, not inside: it
        moves the parameters in every update.
      strength: :math:`\beta`, not negative, or a schedule of the number of gradients
        before; pass schedules here, because `optax.inject_hyperparams` would be one
        update late. It should be 0 at the end of a run and in its first steps: the
        record has 0.3 from step 300 to 1,950 of 2,900, times a learning rate over its
        peak.
      momentum: :math:`\gamma`, in [0, 1).

    Returns:
      A transformation that needs ``params``. The state is one float32 array per
      parameter and that of ``inner``. In bfloat16, parameters lose as much of the
      look-ahead as rounding takes.

    Raises:
      ValueError: At construction, for numbers outside these ranges; in ``update``
        without ``params``.
      TypeError: At construction, if ``inner`` is not a transformation.

    References:
      `arXiv:2605.25395 <https://arxiv.org/abs/2605.25395>`_, and the modded-nanogpt
      optimization track, records 40 to 46, 2026.
    """
    _check.transformation("inner", inner)
    _arguments.number_or_schedule("strength", strength, 0.0)
    _check.number("momentum", momentum, 0.0, 1.0)
    wrapped = optax.with_extra_args_support(inner)

    def at(count: jax.Array) -> jax.Array:
        # A copy, because the state may be donated and a given array be used again.
        return jnp.array(_numerics.value_at(strength, count), jnp.float32, copy=True)

    def init(params: optax.Params) -> EmaLookaheadState:
        _layout.check_all_floating(params)
        count = jnp.zeros((), jnp.int32)
        zeros = _numerics.zero_moments(params, None)
        return EmaLookaheadState(count, zeros, at(count), wrapped.init(params))

    def update(updates, state, params=None, **extra_args):
        _check.params_given(params, "ema_lookahead")
        steps, inner_state = wrapped.update(updates, state.inner, params, **extra_args)
        count = _numerics.next_count(state.count)
        ahead = at(count)

        def average(u: jax.Array, m: jax.Array) -> jax.Array:
            moved = state.strength * m + u.astype(m.dtype)
            return _numerics.moving_average(m, moved, momentum)

        def to_ahead(u: jax.Array, m: jax.Array) -> jax.Array:
            return (u.astype(m.dtype) + ahead * m).astype(u.dtype)

        movement = jax.tree.map(average, steps, state.movement)
        steps = jax.tree.map(to_ahead, steps, movement)
        return steps, EmaLookaheadState(count, movement, ahead, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
