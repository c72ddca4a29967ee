"""Momentum divided by the noise of the gradient around it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _check, _layout
from optax_matrix._transforms import _arguments, _moments, _numerics
from optax_matrix._transforms._moments import Moment


class ScaleByNoiseState(NamedTuple):
    """State of `scale_by_noise`."""

    count: jax.Array  # int32, updates seen so far
    momentum: Any  # M, with the shape of a leaf, float32 or `mu_dtype`
    variance: Any  # V, with the shape of a leaf, float32 or `nu_dtype`


def scale_by_noise(
    momentum: optax.ScalarOrSchedule = 0.95,
    *,
    gamma: ArrayLike | None = None,
    eps: ArrayLike = 1e-8,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each update by its momentum, divided by the noise of each entry.

    The noise is the deviation of an update from the momentum before it. With
    :math:`\beta` = ``momentum``, :math:`M_0 = V_0 = 0` and all operations elementwise,

    .. math::
      V_t = \beta V_{t-1} + \beta (1 - \beta) (M_{t-1} - G_t)^2, \qquad
      M_t = \beta M_{t-1} + (1 - \beta) G_t,

    and with :math:`S_t = G_t + \frac{\beta}{1 - \beta} \frac{M_t}{1 - \beta^t}` and
    :math:`\hat V_t = V_t / (1 - \beta^t)`,

    .. math::
      U_t = \frac{S_t}{\sqrt{\hat V_t} + \epsilon} \; (\text{Muon-VS}), \qquad
      U_t = \frac{S_t}{\sqrt{S_t^2 + \gamma \hat V_t} + \epsilon} \;
      (\text{Muon-NSR}, \; \gamma = \text{gamma}).

    It takes the place of `ema_momentum` before an orthogonalization, so that entries
    with much noise count less. :math:`S_t` is :math:`1/(1-\beta)` times
    the look-ahead of `ema_momentum`.

    Args:
      momentum: :math:`\beta`, in [0, 1), or a schedule; its current value is used for
        both averages and their bias corrections.
      gamma: :math:`\gamma`, not negative: the weight of the noise relative to the
        signal. 0 takes signs; a large one approaches None up to a constant factor,
        which an orthogonalization removes. None divides by the noise alone.
      eps: :math:`\epsilon`, positive, in the unit of the update, outside the root.
      mu_dtype: The dtype of :math:`M`, see `ema_momentum`; not int8, whose error would
        be divided by a small root of :math:`V`.
      nu_dtype: The dtype of :math:`V`, see `scale_by_variance`.

    Returns:
      A transformation for leaves of any shape. Updates keep their shape and dtype;
      the state is two arrays per leaf. With ``gamma`` entries are at most 1. Without,
      those of a gradient that never changes grow up to :math:`1/\epsilon` times.

    Raises:
      ValueError: At construction, for numbers outside these ranges, or another
        ``mu_dtype`` or ``nu_dtype``.
      TypeError: At construction, for arguments of another type; at ``init``, for leaves
        that are not real floating, with their paths.

    Precision:
      Squares are averaged in float32: entries below 1e-19 or above 1e19 are lost.

    References:
      Li, Fan and Li, 2026, Variance-adaptive Muon, `arXiv:2601.14603
      <https://arxiv.org/abs/2601.14603>`_ and `code
      <https://github.com/jingru-lee/Variance-Adaptive-Muon>`_. ``gamma`` is their
      ``alpha``, and :math:`\epsilon` is outside the root, as in their code. Differs:
      one of their files also scales gradients of a norm below 1 up to 1.
    """
    _arguments.number_or_schedule("momentum", momentum, 0.0, 1.0)
    if gamma is not None:
        _check.number("gamma", gamma, 0.0)
    _check.number("eps", eps, 0.0, low_open=True)
    mu_dtype = _arguments.mu_dtype(mu_dtype, divided=True)
    nu_dtype = _arguments.nu_dtype(nu_dtype)

    def init(params: optax.Params) -> ScaleByNoiseState:
        _layout.check_all_floating(params)
        return ScaleByNoiseState(
            jnp.zeros((), jnp.int32),
            _numerics.zero_moments(params, mu_dtype),
            _numerics.zero_moments(params, nu_dtype),
        )

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        count = _numerics.next_count(state.count)
        decay = _numerics.value_at(momentum, state.count)

        def average(g: jax.Array, m: Moment, v: Moment) -> jax.Array:
            g = _numerics.wide(g)
            deviation = _moments.read(m, g.dtype) - g
            square = _numerics.as_scalar(decay, g) * jnp.square(deviation)
            old = _moments.read(v, g.dtype, square=True)
            return _numerics.moving_average(old, square, decay)

        def rescale(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            weights = _numerics.bias_correction(decay, count, m)
            beta = _numerics.as_scalar(decay, m)
            signal = _numerics.wide(g) + beta / (1 - beta) * (m / weights)
            square = v / weights
            if gamma is not None:
                noise = _numerics.as_scalar(gamma, m) * square
                square = jnp.square(signal) + noise
            scale = jnp.sqrt(square) + _numerics.as_scalar(eps, m)
            return (signal / scale).astype(g.dtype)

        # The deviation is from the momentum before this update.
        variance = _numerics.with_moments(
            average, updates, state.momentum, state.variance
        )
        averages = _numerics.moving_averages(state.momentum, updates, decay)
        scaled = jax.tree.map(rescale, updates, averages, variance)
        kept = _numerics.stored(averages, state.momentum, count)
        variance = _numerics.stored(variance, state.variance, count, square=True)
        return scaled, ScaleByNoiseState(count, kept, variance)

    return optax.GradientTransformationExtraArgs(init, update)
