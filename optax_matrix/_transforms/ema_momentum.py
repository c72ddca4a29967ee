"""Muon's momentum: a moving average of gradients with a look-ahead."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from optax_matrix import _check, _layout
from optax_matrix._transforms import _arguments, _numerics


class EmaMomentumState(NamedTuple):
    """State of `ema_momentum`."""

    count: jax.Array  # int32, updates seen so far
    momentum: Any  # M, with the shape of a leaf, float32 or `mu_dtype`


def ema_momentum(
    momentum: optax.ScalarOrSchedule = 0.95,
    *,
    nesterov: bool = True,
    debias: bool = False,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each update by a moving average of updates with a look-ahead.

    With :math:`\beta` = ``momentum`` and :math:`M_0 = 0`,

    .. math::
      M_t = \beta M_{t-1} + (1 - \beta) G_t, \qquad
      U_t = \beta M_t + (1 - \beta) G_t,

    or :math:`U_t = M_t` without ``nesterov``. `optax.ema` has no look-ahead, and
    `optax.trace` sums instead of averaging (its updates are :math:`1/(1-\beta)` times
    as large).

    Args:
      momentum: :math:`\beta`, in [0, 1), or a schedule. The default averages over
        about 20 steps.
      nesterov: Whether to look ahead.
      debias: Whether to divide each of the two terms by the sum of its weights,
        :math:`M_t` by :math:`1-\beta^{t+1}` and :math:`G_t` by :math:`1-\beta^t`
        (without ``nesterov``: :math:`M_t` by :math:`1-\beta^t`), as
        `optax.contrib.muon` does. With ``nesterov`` this changes the mix of the two
        in the first steps, so it changes Muon's trajectory. With a schedule the
        weights are those of its present value, as in `optax.inject_hyperparams`.
      mu_dtype: The dtype of :math:`M`: bfloat16, float32 or float64, and int8 or
        float8_e4m3fn for 8 bits per entry, rounded stochastically, in blocks of 32 with
        a scale each (docs/memory.md). Arrays none of whose axes has a multiple of 32
        entries have no blocks, and are float32. None is float32, and float64 for
        float64 updates.

    Returns:
      A transformation for leaves of any shape. Updates keep their shape and dtype;
      the state is one array per leaf.

    Raises:
      ValueError: At construction, if ``momentum`` is outside [0, 1) or ``mu_dtype`` is
        another dtype.
      TypeError: At construction, for arguments of another type; at ``init``, for leaves
        that are not real floating, with their paths.

    References:
      Jordan et al., 2024, `Muon <https://kellerjordan.github.io/posts/muon/>`_;
      nesterov momentum in Adam's form: Dozat, 2016; blocks of 8 bits: Rouhani et al.,
      2023, `arXiv:2310.10537 <https://arxiv.org/abs/2310.10537>`_.
    """
    _arguments.number_or_schedule("momentum", momentum, 0.0, 1.0)
    _check.boolean("nesterov", nesterov)
    _check.boolean("debias", debias)
    mu_dtype = _arguments.mu_dtype(mu_dtype)

    def init(params: optax.Params) -> EmaMomentumState:
        _layout.check_all_floating(params)
        zeros = _numerics.zero_moments(params, mu_dtype)
        return EmaMomentumState(jnp.zeros((), jnp.int32), zeros)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        count = _numerics.next_count(state.count)
        decay = _numerics.value_at(momentum, state.count)

        def look_ahead(g: jax.Array, m: jax.Array) -> jax.Array:
            wide_g = _numerics.wide(g)
            if debias:
                seen = _numerics.next_count(count) if nesterov else count
                m = m / _numerics.bias_correction(decay, seen, m)
            if not nesterov:
                return m.astype(g.dtype)
            if debias:
                wide_g = wide_g / _numerics.bias_correction(decay, count, wide_g)
            return _numerics.moving_average(m, wide_g, decay).astype(g.dtype)

        averages = _numerics.moving_averages(state.momentum, updates, decay)
        ahead = jax.tree.map(look_ahead, updates, averages)
        kept = _numerics.stored(averages, state.momentum, count)
        return ahead, EmaMomentumState(count, kept)

    return optax.GradientTransformationExtraArgs(init, update)
