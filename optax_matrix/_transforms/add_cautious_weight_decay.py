"""Weight decay on the entries that the update shrinks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_matrix import _check, _layout
from optax_matrix._transforms import _arguments, _numerics


class AddCautiousWeightDecayState(NamedTuple):
    """State of `add_cautious_weight_decay`."""

    count: jax.Array  # int32, updates seen so far


def add_cautious_weight_decay(
    weight_decay: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the decayed parameter to the update where both have the same sign.

    With :math:`\lambda` = ``weight_decay`` and all operations elementwise,

    .. math:: U \leftarrow U + \lambda \, [U \odot W \ge 0] \odot W.

    Put it where `optax.add_decayed_weights` would be, before the learning rate changes
    the sign: a step :math:`-\eta U` with :math:`U W \ge 0` moves an entry towards zero,
    and only those entries decay. Wrap it in `optax.masked` to exclude leaves.

    Args:
      weight_decay: :math:`\lambda`, not negative, per unit of learning rate; or a
        schedule.

    Returns:
      A transformation that needs ``params``, for leaves of any shape. Updates keep
      their shape and dtype. The state is the number of updates.

    Raises:
      ValueError: At construction, if ``weight_decay`` is a negative number; in
        ``update`` without ``params``.

    References:
      Chen et al., 2025, Cautious Weight Decay,
      `arXiv:2510.12402 <https://arxiv.org/abs/2510.12402>`_.
    """
    _arguments.number_or_schedule("weight_decay", weight_decay, 0.0)

    def init(params: optax.Params) -> AddCautiousWeightDecayState:
        _layout.check_all_floating(params)
        return AddCautiousWeightDecayState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _check.params_given(params, "add_cautious_weight_decay")
        strength = _numerics.value_at(weight_decay, state.count)

        def decay(u: jax.Array, p: jax.Array) -> jax.Array:
            wide, p = _numerics.wide(u), p.astype(_numerics.wide_dtype(u))
            # Signs, not the product: that underflows to 0 and would let it decay.
            shrinks = jnp.sign(wide) * jnp.sign(p) >= 0
            decayed = _numerics.as_scalar(strength, wide) * p
            return (wide + jnp.where(shrinks, decayed, 0)).astype(u.dtype)

        count = _numerics.next_count(state.count)
        done = jax.tree.map(decay, updates, params)
        return done, AddCautiousWeightDecayState(count)

    return optax.GradientTransformationExtraArgs(init, update)
