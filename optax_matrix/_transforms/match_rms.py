"""Scales each matrix of an update to a given root mean square entry."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout
from optax_matrix._transforms import _numerics, _stateless


def match_rms(
    rms: ArrayLike | None = 0.2, *, layout: _layout.Layout = None
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each matrix of an update so that its entries have a given RMS.

    For an :math:`m \times n` matrix and :math:`\rho` = ``rms``,

    .. math:: U \leftarrow \rho \sqrt{mn} \; U / \|U\|_F.

    The step size then does not depend on earlier stages: chains that differ in one
    stage are compared by direction, and AdamW's learning rates carry over.

    Args:
      rms: :math:`\rho`, positive. 0.2 is about the RMS of AdamW's updates (Liu et al.).
        None disables RMS matching.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack is scaled separately.

    Returns:
      A transformation without state. Updates keep their shape and dtype. Zero matrices
      stay zero; NaN or Inf in one matrix does not affect the others.

    Raises:
      ValueError: At construction, if ``rms`` is not positive; at ``init``, if a leaf
        does not fit ``layout``, with its path.
      TypeError: At construction, if ``rms`` is not a number; at ``init``, for leaves
        that are not real floating, with their paths.

    References:
      Liu et al., 2025, `arXiv:2502.16982 <https://arxiv.org/abs/2502.16982>`_, section
      2.2; Si et al., 2025, `arXiv:2507.11005 <https://arxiv.org/abs/2507.11005>`_.
    """
    if rms is None:
        return _stateless.unchanged()
    _check.number("rms", rms, 0.0, low_open=True)

    def rescale(view: _layout.MatrixView, u: jax.Array) -> jax.Array:
        wide = _numerics.wide(u)
        norm = _numerics.safe_norm(view, wide)
        unit = _numerics.divide_or_zero(wide, view.expand(norm))
        length = jnp.sqrt(jnp.asarray(view.expand(view.size()), wide.dtype))
        factor = _numerics.as_scalar(rms, wide) * length
        return (unit * factor).astype(u.dtype)

    return _stateless.per_matrix(rescale, layout)
