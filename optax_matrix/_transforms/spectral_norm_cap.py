"""Limits the spectral norm of every matrix of the parameters."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout
from optax_matrix._transforms import _numerics, _top_singular


def spectral_norm_cap(
    limit: ArrayLike, *, layout: _layout.Layout = None
) -> optax.GradientTransformationExtraArgs:
    r"""Scales down each matrix that a step makes longer than a given spectral norm.

    With :math:`L` = ``limit``, which bounds the Lipschitz constant of the layer,

    .. math:: U \leftarrow \min(1, L / \sigma_1(W + U)) \, (W + U) - W.

    Put it last in the chain: its input must be the final step, including learning rate
    and sign, and its output must be added to the parameters unchanged. Steps that stay
    below the limit are returned unchanged.

    Args:
      limit: :math:`L`, positive.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack has its own norm.

    Returns:
      A transformation that needs ``params``, with the state, the precision and the
      sharding of `spectral_sphere_retract`. Updates keep their shape and dtype.

    Raises:
      ValueError: At construction, if ``limit`` is not positive; at ``init``, if a leaf
        does not fit ``layout``, with its path; in ``update`` without ``params``.
      TypeError: At construction, if ``limit`` is not a number; at ``init``, for leaves
        that are not real floating, with their paths.

    References:
      Gouk et al., 2018, `arXiv:1804.04368 <https://arxiv.org/abs/1804.04368>`_; with
      Muon, Newhouse et al., 2025, `arXiv:2507.13338
      <https://arxiv.org/abs/2507.13338>`_, who compare it with caps that clip singular
      values one by one.
    """
    _check.number("limit", limit, 0.0, low_open=True)

    def factor(view: _layout.MatrixView, value: jax.Array) -> jax.Array:
        del view
        most = _numerics.as_scalar(limit, value)
        # Not a minimum of 1 and a quotient: NaN must stay NaN, and 0 is below the cap.
        return jnp.where(value <= most, 1, most / jnp.where(value <= most, 1, value))

    return _top_singular.scaled_weights(factor, layout, "spectral_norm_cap")
