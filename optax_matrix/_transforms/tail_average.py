"""Averages the parameters over the end of a run, for evaluation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout
from optax_matrix._evaluation import check_whole, evaluation_params
from optax_matrix._transforms import _numerics


class TailAverageState(NamedTuple):
    """State of `tail_average`."""

    count: jax.Array  # int32, updates seen so far
    average: Any  # float32, with the shapes of the parameters
    weight: jax.Array  # float32, the share of the average in the evaluation
    inner: Any  # state of the optimizer

    def evaluation_params(self, params: optax.Params) -> optax.Params:
        """Returns the parameters blended with their average."""
        check_whole(params, self.average)

        def blend(p: jax.Array, a: jax.Array) -> jax.Array:
            wide = p.astype(a.dtype)
            return (wide + self.weight * (a - wide)).astype(p.dtype)

        present = evaluation_params(self.inner, params)
        return jax.tree.map(blend, present, self.average)


def tail_average(
    inner: optax.GradientTransformation,
    start: ArrayLike,
    *,
    horizon: ArrayLike = 150.0,
    weight: ArrayLike = 0.6,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the parameters over the end of a run, without changing their training.

    With :math:`\tau` = ``horizon``, :math:`\lambda` = ``weight`` and the parameters
    :math:`\theta_t` after :math:`t` updates of ``inner``,

    .. math::
      A_t = \theta_t \; (t \le start), \qquad
      A_t = A_{t-1} + (\theta_t - A_{t-1}) / \tau \; (t > start).

    `evaluation_params` returns :math:`(1 - \lambda) \theta_t + \lambda A_t`. An
    average alone lags behind a loss that still falls; the blend lags less.

    Args:
      inner: The whole optimizer, which may be an `ema_lookahead`: then its parameters
        without the look-ahead are averaged. `optax.MultiSteps` goes around this
        wrapper, which counts updates.
      start: The number of updates after which the average begins, not negative.
      horizon: :math:`\tau`, at least 1, in updates.
      weight: :math:`\lambda`, in [0, 1]; 1 is the average alone.

    Returns:
      A transformation that needs ``params``; its updates are those of ``inner``. The
      state is one float32 array per parameter and that of ``inner``.

    Raises:
      ValueError: At construction, for numbers outside these ranges; in ``update``
        without ``params``.
      TypeError: At construction, for arguments of another type.

    References:
      The modded-nanogpt optimization track, records 45 and 46, 2026 (from step 2,400 of
      2,900; the embedding is left out there).
    """
    _check.transformation("inner", inner)
    _check.whole_number("start", start, 0)
    _check.number("horizon", horizon, 1.0)
    _check.number("weight", weight, 0.0, 1.0, high_open=False)
    wrapped = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> TailAverageState:
        _layout.check_all_floating(params)
        count = jnp.zeros((), jnp.int32)
        # Copies, because the state and what it is made of may both be donated.
        share = jnp.array(weight, jnp.float32, copy=True)
        average = jax.tree.map(
            lambda p: jnp.array(p, _numerics.wide_dtype(p), copy=True), params
        )
        return TailAverageState(count, average, share, wrapped.init(params))

    def update(updates, state, params: Any = None, **extra_args):
        _check.params_given(params, "tail_average")
        steps, inner_state = wrapped.update(updates, state.inner, params, **extra_args)
        count = _numerics.next_count(state.count)
        share = jnp.array(weight, jnp.float32, copy=True)
        present = evaluation_params(inner_state, optax.apply_updates(params, steps))

        def average(p: jax.Array, a: jax.Array) -> jax.Array:
            wide = p.astype(a.dtype)
            later = a + (wide - a) / _numerics.as_scalar(horizon, a)
            return jnp.where(count > start, later, wide)

        averages = jax.tree.map(average, present, state.average)
        return steps, TailAverageState(count, averages, share, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
