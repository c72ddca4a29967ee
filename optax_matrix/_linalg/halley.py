"""Halley's rational iteration for the polar factor (QDWH, Cholesky form)."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from optax_matrix._linalg import numerics
from optax_matrix._linalg.inverse import inverse_flops, inverse_traffic, spd_inverse
from optax_matrix._linalg.numerics import WHOLE, Parts, Precision, Traffic


def halley_weights(lower_bound: float) -> tuple[float, float, float]:
    r"""Returns the weights (a, b, c) of the best rational map for [ℓ, 1].

    The map is :math:`h(\sigma) = \sigma (a + b\sigma^2) / (1 + c\sigma^2)` with

    .. math::
      d = (4(1-\ell^2)/\ell^4)^{1/3}, \quad
      a = \sqrt{1+d} + \tfrac12 \sqrt{8 - 4d + 8(2-\ell^2)/(\ell^2\sqrt{1+d})}, \quad
      b = (a-1)^2/4, \quad c = a + b - 1.

    Args:
      lower_bound: ℓ, in (0, 1].
    """
    square = lower_bound * lower_bound
    d = (4.0 * (1.0 - square) / (square * square)) ** (1.0 / 3.0)
    root = math.sqrt(1.0 + d)
    a = root + 0.5 * math.sqrt(8.0 - 4.0 * d + 8.0 * (2.0 - square) / (square * root))
    b = (a - 1.0) ** 2 / 4.0
    return a, b, a + b - 1.0


def halley(
    x: Array,
    *,
    lower_bound: float = 1e-3,
    steps: int = 1,
    dtype: np.dtype | None = None,
    precision: Precision = None,
    parts: Parts | None = None,
) -> Array:
    r"""Moves every singular value towards 1 by one or more rational maps.

    With A = XXᵀ on the smaller side, X scaled by the Schatten-4 bound
    :math:`\|A\|^{1/2} \ge \sigma_{\max}`, and (a, b, c) = `halley_weights` of ℓ,

    .. math::
      X \leftarrow \left[\tfrac bc I + (a - \tfrac bc)(I + cA)^{-1}\right] X, \qquad
      \ell \leftarrow \ell (a + b\ell^2) / (1 + c\ell^2).

    Scaled singular values in [ℓ, 1] land in [h(ℓ), 1], where h(ℓ) is 0.25, 0.51 and
    0.87 for ℓ = 1e-3, 1e-2, 1e-1 after one step; smaller ones are multiplied by up to
    a, about 2(2/ℓ²)^{1/3}, and stay small.

    Args:
      x: Matrices, (..., m, n), real floating.
      lower_bound: ℓ, in (0, 1]: what the smallest singular value that matters is,
        relative to the Schatten-4 norm. The inverse has condition number up to
        1 + c ≈ 1.6 ℓ^{-4/3}, so a smaller ℓ costs float32 accuracy.
      steps: Number of maps, at least 1; two map [ℓ, 1] into
        [0.96, 1] for ℓ = 1e-3 and into [0.995, 1] for 1e-2.
      dtype: Type of the products, float32 or float64; None is float64 for float64 and
        else float32.
      precision: Of the matmuls. Lower than ``"highest"`` can make I + cA indefinite,
        and then the factorization gives NaN.
      parts: None for whole matrices. Otherwise `x` is one part of each matrix, cut
        across the last axis, which is the longer side of the whole. Parts sum the Gram
        matrices, and share the factorization and the columns of the inverse.

    Returns:
      (..., m, n) in the dtype of `x`. A zero matrix gives zero; one with a NaN or Inf
      gives NaN, and only there.

    Raises:
      ValueError: If `x` has fewer than two axes.
      TypeError: If `x` is not real floating.

    Cost:
      `halley_flops`: per step two rectangular products, and one Cholesky factorization
      and explicit inverse of the small side. On CPU the factorization is OpenBLAS's:
      set ``OPENBLAS_NUM_THREADS=1``, or its threads and XLA's wait for each other.

    References:
      Nakatsukasa, Bai and Gygi, 2010, `Optimizing Halley's iteration for computing the
      matrix polar decomposition <https://doi.org/10.1137/090774999>`_. Differs: ℓ is
      chosen and not estimated; always the Cholesky form, with an explicit inverse, so
      that the large matrix is only ever multiplied.
    """
    numerics.check_matrix(x)
    if x.size == 0:
        return x
    tall = parts is None and numerics.is_tall(x)
    parts = parts or WHOLE
    y = numerics.unit_peak(numerics.transpose(x) if tall else x, parts)
    y = y.astype(numerics.compute_dtype(x, dtype))

    scale = jnp.ones((), y.dtype)
    for step in range(steps):
        gram = numerics.gram(y, precision, parts)
        if step == 0:
            square = numerics.frobenius(gram)
            gram, scale = gram / square, numerics.inverse_root(square)
        a, b, c = halley_weights(lower_bound)
        eye = numerics.eye_like(gram)
        inverse = spd_inverse(eye + c * gram, precision, parts)
        # The scale on the small factor rather than on y: a pass less over y.
        factor = (b / c * eye + (a - b / c) * inverse) * scale
        y, scale = jnp.matmul(factor, y, precision=precision), 1.0
        square = lower_bound * lower_bound
        # Rounding must not carry the bound past 1, where the weights are not real.
        lower_bound = min(lower_bound * (a + b * square) / (1.0 + c * square), 1.0)
    return (numerics.transpose(y) if tall else y).astype(x.dtype)


def halley_flops(m: int, n: int, steps: int, parts: int = 1) -> int:
    """Returns the FLOPs of one m×n matrix, or of a part of it.

    A step is two rectangular products, 2m²n each for m ≤ n, and the inverse of the
    small side, see `inverse_flops`: 10/3 m³ for a whole matrix.

    Args:
      m: One side.
      n: The other.
      steps: Number of steps.
      parts: In how many the longer side is cut.

    Returns:
      FLOPs, counting a multiply-add as two.
    """
    m, n = min(m, n), max(m, n)
    return steps * (4 * m * m * -(-n // parts) + inverse_flops(m, parts))


def halley_traffic(m: int, n: int, steps: int, parts: int, dtype: DTypeLike) -> Traffic:
    """Returns what the parts of one matrix tell one another.

    A Gram matrix and an inverse a step.

    Args:
      m: One side.
      n: The other.
      steps: Number of steps.
      parts: In how many the longer side is cut.
      dtype: Of the products.
    """
    gram = numerics.traffic(min(m, n), 1, 0, parts, dtype)
    inverse = inverse_traffic(min(m, n), parts, dtype)
    return Traffic(*(steps * sum(pair) for pair in zip(gram, inverse, strict=True)))
