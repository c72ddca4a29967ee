"""Rescales steps so that their tangential part does not change the norm."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_matrix import _check, _layout
from optax_matrix._transforms import _arguments, _numerics


class RadialRetractState(NamedTuple):
    """State of `radial_retract`."""

    count: jax.Array  # int32, updates seen so far


def radial_retract(
    weight_decay: optax.ScalarOrSchedule = 0.0, *, layout: _layout.Layout = None
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales each step so that only its radial part changes the matrix's norm.

    A step :math:`U` lengthens a matrix also by its tangential part, to second order.
    This keeps the first order:

    .. math::
      R = \|W\|_F + \langle U, W \rangle / \|W\|_F, \qquad
      W^+ = R \, \frac{W + U}{\|W + U\|_F}, \qquad
      U \leftarrow (1 - \lambda \, [U \odot W < 0]) \odot W^+ - W.

    The last factor is cautious weight decay, of the entries that the step shrinks; it
    comes after the rescaling, which would undo a part of it. Put this last in the
    chain: its input must be the final step, including learning rate and sign.
    `hyperball_retract` keeps the norm that a matrix has at ``init``.

    Args:
      weight_decay: :math:`\lambda` per step, not negative, or a schedule: the learning
        rate times what `add_cautious_weight_decay` would be given.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack is rescaled separately.

    Returns:
      A transformation that needs ``params``. Updates keep their shape and dtype. A step
      from a zero matrix is not rescaled; one whose :math:`R` would be negative ends at
      zero. The state is the number of updates.

    Raises:
      ValueError: At construction, if ``weight_decay`` is a negative number; at
        ``init``, if a leaf does not fit ``layout``, with its path; in ``update``
        without ``params``.

    References:
      The modded-nanogpt optimization track, record 46, 2026; Chen et al., 2025,
      Cautious Weight Decay, `arXiv:2510.12402 <https://arxiv.org/abs/2510.12402>`_.
    """
    _arguments.number_or_schedule("weight_decay", weight_decay, 0.0)

    def init(params: optax.Params) -> RadialRetractState:
        _layout.tree_views(layout, params)  # Raises for a leaf that does not fit.
        return RadialRetractState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _check.params_given(params, "radial_retract")
        decay = _numerics.value_at(weight_decay, state.count)

        def retract(view: _layout.MatrixView, u: jax.Array, p: jax.Array) -> jax.Array:
            wide, p = _numerics.wide(u), p.astype(_numerics.wide_dtype(u))
            norm, end = _numerics.norm(view, p), p + wide
            radial = _numerics.divide_or_zero(view.sum(wide * p), norm)
            length = _numerics.norm(view, end)
            radius = jnp.maximum(norm + radial, 0)
            scale = _numerics.divide_or_zero(radius, length)
            scale = jnp.where(norm == 0, 1, scale)
            # Signs, not the product, which underflows.
            shrinks = jnp.sign(wide) * jnp.sign(p) < 0
            kept = 1 - _numerics.as_scalar(decay, wide) * shrinks
            return (view.expand(scale) * end * kept - p).astype(u.dtype)

        done = _layout.tree_map(retract, layout, updates, params)
        return done, RadialRetractState(_numerics.next_count(state.count))

    return optax.GradientTransformationExtraArgs(init, update)
