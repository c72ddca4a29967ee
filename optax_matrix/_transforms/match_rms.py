"""Scales each matrix of an update to a given root mean square entry."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout
from optax_matrix._transforms import _numerics, _stateless


def match_rms(
    target: ArrayLike = 0.2, *, layout: _layout.Layout = None
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each matrix of the update so that its entries have a given RMS.

    For an :math:`m \times n` matrix and :math:`\rho` = ``target``,

    .. math:: U \leftarrow \rho \sqrt{mn} \; U / \|U\|_F.

    The step size then no longer depends on what came before: chains that differ in one
    stage are compared by direction, and AdamW's learning rates carry over.

    Args:
      target: :math:`\rho`, positive. 0.2 is about the RMS of AdamW's updates (Liu et
        al.).
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack is scaled by itself.

    Returns:
      A transformation without state. Updates keep their shape and dtype; a zero matrix
      stays zero, a non-finite one spoils no other.

    Raises:
      ValueError: At construction, if ``target`` is a number that is not positive; at
        ``init``, if a leaf does not fit ``layout``, with its path.

    References:
      Liu et al., 2025, `arXiv:2502.16982 <https://arxiv.org/abs/2502.16982>`_, section
      2.2; Si et al., 2025, `arXiv:2507.11005 <https://arxiv.org/abs/2507.11005>`_.
    """
    _check.in_range("target", target, 0.0, low_open=True)

    def rescale(view: _layout.MatrixView, u: jax.Array) -> jax.Array:
        wide = _numerics.wide(u)
        norm = _numerics.frobenius(view, wide)
        unit = _numerics.divide_or_zero(wide, view.expand(norm))
        length = jnp.sqrt(jnp.asarray(view.size(), wide.dtype))
        length = jnp.broadcast_to(length, norm.shape)
        rms = _numerics.as_scalar(target, wide)
        return (unit * view.expand(rms * length)).astype(u.dtype)

    return _stateless.per_matrix(rescale, layout)
