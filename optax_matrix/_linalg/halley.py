"""Halley's rational iteration for the polar factor (QDWH, Cholesky form)."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import linalg as lax_linalg

from optax_matrix._linalg import numerics
from optax_matrix._linalg.numerics import Precision


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
        float32 otherwise.
      precision: Of the matmuls. Lower than ``"highest"`` can make I + cA indefinite,
        and then the factorization gives NaN.

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
    tall = numerics.is_tall(x)
    y = numerics.unit_peak(numerics.transpose(x) if tall else x)
    y = y.astype(numerics.compute_dtype(x, dtype))

    scale = jnp.ones((), y.dtype)
    for step in range(steps):
        gram = numerics.gram(y, precision)
        if step == 0:
            square = numerics.frobenius(gram)
            gram, scale = gram / square, numerics.inverse_root(square)
        a, b, c = halley_weights(lower_bound)
        eye = numerics.eye_like(gram)
        inverse = spd_inverse(eye + c * gram, precision)
        # Scale the small factor instead of y: one pass over y fewer.
        factor = (b / c * eye + (a - b / c) * inverse) * scale
        y, scale = jnp.matmul(factor, y, precision=precision), 1.0
        square = lower_bound * lower_bound
        # Rounding must not carry the bound past 1, where the weights are not real.
        lower_bound = min(lower_bound * (a + b * square) / (1.0 + c * square), 1.0)
    return (numerics.transpose(y) if tall else y).astype(x.dtype)


def halley_flops(m: int, n: int, steps: int) -> int:
    """Returns the FLOPs of one m×n matrix.

    For m ≤ n a step takes two rectangular products, 2m²n each, and the inverse of the
    small side: a Cholesky factorization, m³/3, a triangular solve, m³, and a product,
    2m³.

    Args:
      m: One side.
      n: The other side.
      steps: Number of steps.

    Returns:
      FLOPs, counting a multiply-add as two.
    """
    m, n = min(m, n), max(m, n)
    return steps * (4 * m * m * n + m**3 // 3 + 3 * m**3)


def spd_inverse(a: Array, precision: Precision) -> Array:
    """Returns the inverse of symmetric positive definite matrices, by Cholesky.

    A⁻¹ = L⁻ᵀL⁻¹ with A = LLᵀ: a product is faster than a second triangular solve.

    Args:
      a: A, (..., m, m); only its lower triangle is read.
      precision: The precision of the product.

    Returns:
      (..., m, m); all NaN where A is not positive definite.
    """
    lower = lax_linalg.cholesky(a, symmetrize_input=False)
    half = lax_linalg.triangular_solve(
        lower, numerics.eye_like(a), left_side=True, lower=True
    )
    return jnp.matmul(numerics.transpose(half), half, precision=precision)
