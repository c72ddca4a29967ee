"""Keeps every matrix of the parameters at a given spectral norm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout
from optax_matrix._transforms import _numerics, _top_singular


def spectral_sphere_retract(
    radius: ArrayLike = 1.0, *, layout: _layout.Layout = None
) -> optax.GradientTransformationExtraArgs:
    r"""Retracts each step onto the sphere of a given spectral norm.

    For an :math:`m \times n` matrix and :math:`c` = ``radius``,

    .. math::
      R = c \sqrt{n/m}, \qquad U \leftarrow R \, \frac{W + U}{\sigma_1(W + U)} - W.

    Put it last in the chain: its input must be the final step, including learning rate
    and sign, and its output must be added to the parameters unchanged. The first update
    brings matrices onto the sphere.

    Args:
      radius: :math:`c`, positive: the largest RMS of the outputs for inputs of RMS 1.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack is retracted separately.

    Returns:
      A transformation that needs ``params``. Updates keep their shape and dtype. A step
      that ends at zero ends there. NaN or Inf in one matrix does not affect the others.
      The state is one float32 vector over the outputs per matrix.

    Raises:
      ValueError: At construction, if ``radius`` is not positive; at ``init``, if a leaf
        does not fit ``layout``, with its path; in ``update`` without ``params``.
      TypeError: At construction, if ``radius`` is not a number; at ``init``, for leaves
        that are not real floating, with their paths.

    Precision:
      :math:`\sigma_1` is found by 16 Lanczos iterations that start from the vector of
      the update before. It is exact to rounding where a side has at most 16 entries.
      For longer sides it is never too large, so that the norm is at least :math:`R`;
      where the leading singular values are close, the vector may be wrong, but the
      value lies between them. Random steps of 1 % of the norm leave less than 1e-6. The
      error does not grow, because the norm is measured anew in every update.

    Sharding:
      Any. Each iteration adds up two vectors per matrix. Leaves that ``layout`` splits
      into several matrices are gathered; others stay where they are.

    References:
      Controlled LLM Training on Spectral Sphere, 2026, `arXiv:2601.08393
      <https://arxiv.org/abs/2601.08393>`_. Differs: retracts after the step, so
      gradients are taken on the sphere and weight decay has an effect; in the authors'
      code the next retraction undoes it. Lanczos instead of power iterations.
    """
    _check.number("radius", radius, 0.0, low_open=True)

    def factor(view: _layout.MatrixView, value: jax.Array) -> jax.Array:
        shape = np.sqrt(np.asarray(view.fan_out()) / np.maximum(view.fan_in(), 1))
        target = _numerics.as_scalar(radius, value) * jnp.asarray(shape, value.dtype)
        return _numerics.divide_or_zero(jnp.broadcast_to(target, value.shape), value)

    return _top_singular.scaled_weights(factor, layout, "spectral_sphere_retract")
