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

    over the singular values that are not zero to rounding; the others stay zero. It is
    for reference and small models: a decomposition is slow where matmuls are fast.

    Args:
      method: See `Exact`, which has all settings.
      dtype: See `Exact`.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack is orthogonalized separately.
      placement: Where leaves lie on a mesh with auto axes, see `Placement`.

    Returns:
      A transformation, as `orthogonalize`. Updates keep their shape and dtype. Zero
      matrices stay zero; NaN or Inf in one matrix does not affect the others.

    Raises:
      ValueError: At construction, for settings that `Exact` refuses; at ``init``, if a
        leaf does not fit ``layout``, with its path.
    """
    return orthogonalize(
        _linalg.Exact(method=method, dtype=dtype), layout=layout, placement=placement
    )
