"""Halley's rational iteration for the polar factor (QDWH, Cholesky form)."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import linalg as lax_linalg

from optax_matrix._linalg import numerics
from optax_matrix._linalg.numerics import WHOLE, Parts, Precision


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
        across the last axis, which is the longer side of the whole.

    Returns:
      (..., m, n) in the dtype of `x`. A zero matrix gives zero; one with a NaN or Inf
      gives NaN, and only there.

    Raises:
      ValueError: If `x` has fewer than two axes.
      TypeError: If `x` is not real floating.

    Cost:
      `halley_flops`: per step two rectangular products, and one inverse of the small
      side, most of it matmuls too.

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
        inverse = _spd_inverse(eye + c * gram, precision)
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
    small side: its factor takes about m³ and the factor's square m³.

    Args:
      m: One side.
      n: The other.
      steps: Number of steps.
      parts: In how many the longer side is cut; each repeats the inverse.
    """
    m, n = min(m, n), max(m, n)
    return steps * (4 * m * m * -(-n // parts) + 2 * m**3)


# Below this side the factorization is the library's. Measured on CPU at 384: bases of
# 32 to 96 took 0.7 of the time of one call for the whole.
_FACTOR_BASE = 192


def _spd_inverse(a: Array, precision: Precision) -> Array:
    """Inverse of symmetric positive definite matrices, A⁻¹ = WᵀW with W = L⁻¹."""

    def product(x: Array, y: Array) -> Array:
        return jnp.matmul(x, y, precision=precision)

    w = _inverse_factor(a, precision)
    h = _half(a.shape[-1])
    if not h:
        return product(numerics.transpose(w), w)
    # The upper right block of W is zero.
    w1, w21, w2 = w[..., :h, :h], w[..., h:, :h], w[..., h:, h:]
    w1t, w21t, w2t = map(numerics.transpose, (w1, w21, w2))
    across = product(w21t, w2)
    return _blocks(
        product(w1t, w1) + product(w21t, w21),
        across,
        numerics.transpose(across),
        product(w2t, w2),
    )


def _inverse_factor(a: Array, precision: Precision) -> Array:
    """L⁻¹ of A = LLᵀ, by halves, so that all but small blocks is matmuls.

    Factorizations and triangular solves run at a fraction of a matmul's rate.
    """
    h = _half(a.shape[-1])
    if not h:
        lower = lax_linalg.cholesky(a, symmetrize_input=False)
        eye = numerics.eye_like(a)
        return lax_linalg.triangular_solve(lower, eye, left_side=True, lower=True)

    def product(x: Array, y: Array) -> Array:
        return jnp.matmul(x, y, precision=precision)

    w1 = _inverse_factor(a[..., :h, :h], precision)
    minus_l21 = product(-a[..., h:, :h], numerics.transpose(w1))
    rest = a[..., h:, h:] - product(minus_l21, numerics.transpose(minus_l21))
    w2 = _inverse_factor(rest, precision)
    w21 = product(w2, product(minus_l21, w1))
    return _blocks(w1, jnp.zeros_like(numerics.transpose(w21)), w21, w2)


def _half(side: int) -> int:
    """Where to cut a side; 0 if it is small enough as it is."""
    return side // 2 if side > _FACTOR_BASE else 0


def _blocks(a: Array, b: Array, c: Array, d: Array) -> Array:
    upper = jnp.concatenate([a, b], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([c, d], axis=-1)], axis=-2)
