"""Weakens the part of an update that changes the norm of its parameter."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout
from optax_matrix._transforms import _numerics, _stateless


def radial_brake(
    outward: ArrayLike = 0.5,
    inward: ArrayLike = 1.0,
    *,
    layout: _layout.Layout = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the part of each matrix's update that is parallel to its parameter.

    With :math:`c = \langle U, W \rangle / \|W\|_F^2`, which is negative where the
    step :math:`-\eta U` lengthens :math:`W`, and :math:`s` = ``outward`` there and
    ``inward`` elsewhere,

    .. math:: U \leftarrow U + (s - 1) \, c \, W.

    Put it where weight decay would be, before the learning rate changes the sign.

    Args:
      outward: The factor of a part that lengthens the parameter, not negative. 0 keeps
        only the tangential part.
      inward: The factor of a part that shortens it, not negative.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack is scaled separately.

    Returns:
      A transformation without state that needs ``params``. Updates keep their shape and
      dtype. A zero parameter has no radial part.

    Raises:
      ValueError: At construction, for negative numbers; at ``init``, if a leaf does not
        fit ``layout``, with its path; in ``update`` without ``params``.

    References:
      The modded-nanogpt optimization track, record 46, 2026, with 0.5 outward; Radial
      Brake of NVIDIA's Emerging-Optimizers.
    """
    _check.number("outward", outward, 0.0)
    _check.number("inward", inward, 0.0)

    def brake(view: _layout.MatrixView, u: jax.Array, p: jax.Array) -> jax.Array:
        wide, p = _numerics.wide(u), p.astype(_numerics.wide_dtype(u))
        along = view.sum(wide * p)
        factor = jnp.where(
            along < 0,
            _numerics.as_scalar(outward, wide),
            _numerics.as_scalar(inward, wide),
        )
        part = _numerics.divide_or_zero(along, view.sum(jnp.square(p)))
        return (wide + view.expand((factor - 1) * part) * p).astype(u.dtype)

    return _stateless.per_matrix_and_param(brake, layout, "radial_brake")
