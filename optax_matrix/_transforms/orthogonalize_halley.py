"""Orthogonalizes each matrix of an update by a Halley iteration."""

import optax
from jax.typing import DTypeLike

from optax_matrix import _layout, _linalg, _placement
from optax_matrix._transforms.orthogonalize import orthogonalize


def orthogonalize_halley(
    lower_bound: float = 1e-2,
    *,
    steps: int = 1,
    dtype: DTypeLike | None = None,
    layout: _layout.Layout = None,
    placement: _placement.Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Moves the singular values of each matrix towards one by a rational function.

    One step of the dynamically weighted Halley iteration (QDWH), with :math:`\ell` =
    ``lower_bound``, :math:`A = X X^\top` and :math:`X` scaled to spectral norm at most
    one, is

    .. math::
      X \leftarrow \left[ \tfrac{b}{c} I + (a - \tfrac{b}{c}) (I + c A)^{-1} \right] X,

    :math:`d = (4(1-\ell^2)/\ell^4)^{1/3}`,
    :math:`a = \sqrt{1+d} + \tfrac12 \sqrt{8 - 4d + 8(2-\ell^2)/(\ell^2\sqrt{1+d})}`,
    :math:`b = (a-1)^2/4`, :math:`c = a + b - 1`. One Cholesky factorization of the
    small side takes the place of the inverse.

    Args:
      lower_bound: See `Halley`, which has all settings.
      steps: See `Halley`.
      dtype: See `Halley`.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack is orthogonalized separately.
      placement: Where leaves lie on a mesh with auto axes, see `Placement`.

    Returns:
      A transformation without state. Updates keep their shape and dtype, and do not
      depend on the scale of the input. Zero matrices stay zero; NaN or Inf in one
      matrix does not affect the others.

    Raises:
      TypeError, ValueError: At construction, for settings that `Halley` refuses; at
        ``init``, if a leaf does not fit ``layout``, with its path.

    Cost:
      Each step takes about as long as 2 products with the long side, see
      ``Halley.flops``.

    References:
      Nakatsukasa, Bai and Gygi, 2010, Optimizing Halley's iteration for computing the
      matrix polar decomposition, SIAM J. Matrix Anal. Appl. 31.
    """
    halley = _linalg.Halley(lower_bound=lower_bound, steps=steps, dtype=dtype)
    return orthogonalize(halley, layout=layout, placement=placement)
