"""Orthogonalizes each matrix of an update exactly."""

from typing import Literal

import optax
from jax.typing import DTypeLike

from optax_matrix import _layout, _linalg, _placement
from optax_matrix._transforms.orthogonalize import orthogonalize


def orthogonalize_exact(
    method: Literal["svd", "eigh"] = "svd",
    *,
    dtype: DTypeLike | None = None,
    layout: _layout.Layout = None,
    placement: _placement.Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each matrix of the update by its polar factor, to rounding.

    With the singular value decomposition :math:`X = U S V^\top`,

    .. math:: X \leftarrow U V^\top,

    over the singular values that are not zero to rounding; the others stay zero. For
    reference and small models: it is a decomposition, where the iterations are matmuls.

    Args:
      method: ``"svd"``, or ``"eigh"`` of the Gram matrix, good down to
        singular values of the root of the rounding unit, relative to the largest.
      dtype: In which to compute; None is float32, float64 for float64 updates.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack is taken by itself.
      placement: Where leaves lie and how many are worked on at once, see `Placement`.

    Returns:
      A transformation without state. Updates keep their shape and dtype; a zero matrix
      stays zero, a non-finite one spoils no other.

    Raises:
      ValueError: At construction, for settings that `Exact` refuses; at ``init``, if a
        leaf does not fit ``layout``, with its path.
    """
    return orthogonalize(
        _linalg.Exact(method=method, dtype=dtype), layout=layout, placement=placement
    )
