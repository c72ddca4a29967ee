"""A momentum that mixes moving averages of several decays."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from optax_matrix import _layout
from optax_matrix._transforms import _arguments, _numerics


class MixedMomentumState(NamedTuple):
    """State of `mixed_momentum`."""

    count: jax.Array  # int32, updates seen so far
    momenta: tuple[Any, ...]  # one M per decay, like that of `ema_momentum`


def mixed_momentum(
    decays: Sequence[optax.ScalarOrSchedule] = (0.85, 0.98),
    weights: Sequence[optax.ScalarOrSchedule] = (0.4385, 0.5615),
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each update by a mixture of moving averages of different ages.

    With :math:`\beta_k` of ``decays``, :math:`w_k` of ``weights`` and :math:`\mu` =
    ``momentum``,

    .. math::
      M_k \leftarrow \beta_k M_k + (1 - \beta_k) G, \qquad
      U = \mu \sum_k w_k M_k + (1 - \mu) G.

    An average of decay :math:`\beta` has the mean age :math:`\beta / (1 - \beta)`, and
    the mixture the weighted mean of these ages. The defaults are those of "bi-Maxwell"
    momentum, of age 30; K-Maxwell momentum mixes eight averages by schedules. With one
    decay, the same ``momentum`` and the weight 1 it is `ema_momentum`.

    Args:
      decays: :math:`\beta_k`, each in [0, 1) or a schedule.
      weights: :math:`w_k`, each not negative or a schedule, as many as there are
        ``decays``. If they do not sum to 1, the size of the update changes.
      momentum: :math:`\mu`, in [0, 1) or a schedule: the share of the averages, the
        rest is that of the present gradient.
      mu_dtype: See `ema_momentum`.

    Returns:
      A transformation for leaves of any shape. Updates keep their shape and dtype; the
      state is one array per leaf and decay.

    Raises:
      ValueError: At construction, if numbers are outside these ranges, if there are no
        ``decays``, or if ``weights`` has another length.
      TypeError: At construction, for arguments of another type; at ``init``, for leaves
        that are not real floating, with their paths.

    References:
      The modded-nanogpt optimization track, 2026, pull requests `339
      <https://github.com/KellerJordan/modded-nanogpt/pull/339>`_ (two averages) and
      `357 <https://github.com/KellerJordan/modded-nanogpt/pull/357>`_ (eight). They
      replace a single average at step 1000, as schedules of ``weights`` do here, but
      start the new averages only then.
    """
    _arguments.mixture(decays, weights)
    _arguments.number_or_schedule("momentum", momentum, 0.0, 1.0)
    mu_dtype = _arguments.mu_dtype(mu_dtype)

    def init(params: optax.Params) -> MixedMomentumState:
        _layout.check_all_floating(params)
        zeros = tuple(_numerics.zero_moments(params, mu_dtype) for _ in decays)
        return MixedMomentumState(jnp.zeros((), jnp.int32), zeros)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        share = _numerics.value_at(momentum, state.count)
        mix = [_numerics.value_at(weight, state.count) for weight in weights]

        def mixed(g: jax.Array, *averages: jax.Array) -> jax.Array:
            wide = _numerics.wide(g)
            return _numerics.mixture(wide, averages, mix, share).astype(g.dtype)

        averages = tuple(
            _numerics.moving_averages(
                old, updates, _numerics.value_at(decay, state.count)
            )
            for old, decay in zip(state.momenta, decays, strict=True)
        )
        count = _numerics.next_count(state.count)
        mixture = jax.tree.map(mixed, updates, *averages)
        kept = tuple(
            # With random numbers of its own, so that errors do not add up.
            _numerics.stored(new, old, len(decays) * count + i)
            for i, (new, old) in enumerate(zip(averages, state.momenta, strict=True))
        )
        return mixture, MixedMomentumState(count, kept)

    return optax.GradientTransformationExtraArgs(init, update)
