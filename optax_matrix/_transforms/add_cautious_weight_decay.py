"""Weight decay on the entries that the update shrinks."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout
from optax_matrix._transforms import _arguments, _numerics


def add_cautious_weight_decay(
    weight_decay: ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the decayed parameter to the update where both have the same sign.

    With :math:`\lambda` = ``weight_decay`` and all operations elementwise,

    .. math:: U \leftarrow U + \lambda \, [U \odot W \ge 0] \odot W.

    Put it where `optax.add_decayed_weights` would be, before the learning rate changes
    the sign: a step :math:`-\eta U` with :math:`U W \ge 0` moves an entry towards zero,
    and only those entries decay. Wrap it in `optax.masked` to exclude leaves.

    Args:
      weight_decay: :math:`\lambda`, not negative, per unit of learning rate.

    Returns:
      A transformation without state that needs ``params``, for leaves of any shape.
      Updates keep their shape and dtype.

    Raises:
      ValueError: At construction, if ``weight_decay`` is a negative number; in
        ``update`` without ``params``.

    References:
      Chen et al., 2025, Cautious Weight Decay,
      `arXiv:2510.12402 <https://arxiv.org/abs/2510.12402>`_.
    """
    _arguments.number("weight_decay", weight_decay, 0.0)

    def init(params: optax.Params) -> optax.EmptyState:
        _layout.check_all_floating(params)
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _check.params_given(params, "add_cautious_weight_decay")

        def decay(u: jax.Array, p: jax.Array) -> jax.Array:
            wide, p = _numerics.wide(u), p.astype(_numerics.wide_dtype(u))
            # Signs, not the product: that underflows to 0 and would let it decay.
            shrinks = jnp.sign(wide) * jnp.sign(p) >= 0
            strength = _numerics.as_scalar(weight_decay, wide)
            return (wide + jnp.where(shrinks, strength * p, 0)).astype(u.dtype)

        return jax.tree.map(decay, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)
