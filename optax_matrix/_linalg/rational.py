"""Rational iterations for the polar factor: Halley's (QDWH), Zolotarev's."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import linalg as lax_linalg
from scipy import special

from optax_matrix._linalg import numerics
from optax_matrix._linalg.coefficients import Row
from optax_matrix._linalg.newton_schulz import gram_factor, newton_schulz_flops
from optax_matrix._linalg.numerics import Precision


class RationalMap(NamedTuple):
    r"""The map :math:`h(\sigma) = \sigma (\alpha + \sum_j w_j / (1 + c_j \sigma^2))`.

    Attributes:
      constant: :math:`\alpha`.
      weights: :math:`w_j`.
      shifts: :math:`c_j`, the largest first.
    """

    constant: float
    weights: tuple[float, ...]
    shifts: tuple[float, ...]

    def __call__(self, sigma: float) -> float:
        """Maps a singular value."""
        terms = zip(self.weights, self.shifts, strict=True)
        square = sigma * sigma
        return sigma * (self.constant + sum(w / (1.0 + c * square) for w, c in terms))


def zolotarev(lower_bound: float, poles: int = 1) -> RationalMap:
    r"""Returns the odd rational map with maximum 1 that takes [ℓ, 1] closest to 1.

    With r ``poles``, the complete elliptic integral K and Jacobi's sn and cn for the
    modulus :math:`\sqrt{1 - \ell^2}`,

    .. math::
      h(\sigma) \propto \sigma \prod_{j=1}^{r}
        \frac{\sigma^2 + e_{2j}}{\sigma^2 + e_{2j-1}}, \qquad
      e_i = \ell^2 \, \frac{\operatorname{sn}^2(u_i)}{\operatorname{cn}^2(u_i)}, \quad
      u_i = \frac{iK}{2r+1}, \quad h(1) = 1.

    It maps [ℓ, 1] onto [h(ℓ), 1] and has 2r + 2 extrema there, which characterizes the
    best map of its degree with maximum 1. One pole gives Halley's weights: with
    :math:`d = (4(1-\ell^2)/\ell^4)^{1/3}`,

    .. math::
      h(\sigma) = \sigma \frac{a + b\sigma^2}{1 + c\sigma^2}, \quad
      a = \sqrt{1+d} + \tfrac12 \sqrt{8 - 4d + 8(2-\ell^2)/(\ell^2\sqrt{1+d})}, \quad
      b = (a-1)^2/4, \quad c = a + b - 1.

    Args:
      lower_bound: ℓ, in (0, 1]. Below 1e-7, rounding of :math:`1 - \ell^2` spoils sn
        and cn.
      poles: r, at least 1.
    """
    square = lower_bound * lower_bound
    steps = np.arange(1, 2 * poles + 1) / (2 * poles + 1)
    sn, cn, _, _ = special.ellipj(steps * special.ellipkm1(square), 1.0 - square)
    roots = square * (sn / cn) ** 2
    below, above = roots[0::2], roots[1::2]
    scale = np.prod((1.0 + below) / (1.0 + above))
    weights = [
        scale * np.prod(above - e) / np.prod(np.delete(below, j) - e) / e
        for j, e in enumerate(below)
    ]
    return RationalMap(
        float(scale), tuple(map(float, weights)), tuple(float(1.0 / e) for e in below)
    )


def rational_polar(
    x: Array,
    maps: Sequence[RationalMap],
    rows: Sequence[Row] = (),
    *,
    dtype: np.dtype | None = None,
    precision: Precision = None,
) -> Array:
    r"""Moves every singular value towards 1 by rational maps.

    With A = XXᵀ on the smaller side, X scaled by the Schatten-4 bound
    :math:`\|A\|^{1/2} \ge \sigma_{\max}`, each map is

    .. math:: X \leftarrow QX, \qquad Q = \alpha I + \sum_j w_j (I + c_j A)^{-1}.

    The last map may be followed by Newton-Schulz steps on QAQ. Their factor is
    multiplied into Q, so they need no product with X.

    Args:
      x: Matrices, (..., m, n), real floating.
      maps: At least one, for singular values in [0, 1].
      rows: The Newton-Schulz steps after the last map, first applied first.
      dtype: Type of the products, float32 or float64; None is float64 for float64 and
        float32 otherwise.
      precision: Of the matmuls. Lower than ``"highest"`` can make I + cA indefinite,
        and then the factorization gives NaN.

    Returns:
      (..., m, n) in the dtype of `x`. A zero matrix gives zero; one with a NaN or Inf
      gives NaN, and only there.

    Raises:
      ValueError: If `x` has fewer than two axes, or if the dtype of the products is too
        coarse for the maps: I + cA could be indefinite after rounding.
      TypeError: If `x` is not real floating.

    Cost:
      `rational_flops`. On CPU the factorization is OpenBLAS's: set
      ``OPENBLAS_NUM_THREADS=1``, or its threads and XLA's wait for each other.

    References:
      Nakatsukasa, Bai and Gygi, 2010, `Optimizing Halley's iteration for computing the
      matrix polar decomposition <https://doi.org/10.1137/090774999>`_; Nakatsukasa and
      Freund, 2016, `Zolotarev's functions <https://doi.org/10.1137/140990334>`_.
      Differ: ℓ is chosen and not estimated; always the Cholesky form.
    """
    numerics.check_matrix(x)
    if x.size == 0:
        return x
    tall = numerics.is_tall(x)
    y = numerics.unit_peak(numerics.transpose(x) if tall else x)
    y = y.astype(numerics.compute_dtype(x, dtype))
    _check_shifts(maps, y.dtype)

    for step, h in enumerate(maps):
        gram, scale = numerics.gram(y, precision), jnp.ones((), y.dtype)
        if step == 0:
            gram, scale = _scaled(gram)
        after = rows if step == len(maps) - 1 else ()
        if _solves(y.shape[-2], y.shape[-1], h, after):
            y = _solved(gram, y * scale, h)
        else:
            # Scale the small factor instead of y: one pass over y fewer.
            factor = _factor(gram, h, after, precision) * scale
            y = jnp.matmul(factor, y, precision=precision)
    return (numerics.transpose(y) if tall else y).astype(x.dtype)


def rational_factor(
    x: Array,
    h: RationalMap,
    rows: Sequence[Row] = (),
    *,
    dtype: np.dtype | None = None,
    precision: Precision = None,
) -> Array:
    """Returns Q: Q X/‖X‖, or X/‖X‖ Q if X is tall, approximates the polar factor.

    Args:
      x: X, (..., m, n), real floating.
      h: The map, one of `rational_polar`.
      rows: The Newton-Schulz steps after it.
      dtype: As for `rational_polar`.
      precision: As for `rational_polar`.

    Returns:
      (..., k, k) in the dtype of the products, with k the smaller side.

    Raises:
      ValueError: As `rational_polar`.
      TypeError: As `rational_polar`.
    """
    numerics.check_matrix(x)
    tall = numerics.is_tall(x)
    y = numerics.unit_frobenius(numerics.transpose(x) if tall else x)
    y = y.astype(numerics.compute_dtype(x, dtype))
    _check_shifts([h], y.dtype)
    gram, scale = _scaled(numerics.gram(y, precision))
    return _factor(gram, h, rows, precision) * scale


def rational_flops(
    m: int, n: int, maps: Sequence[RationalMap], rows: Sequence[Row] = ()
) -> int:
    """Returns the FLOPs of one m×n matrix.

    For m ≤ n a map takes a product XXᵀ, 2m²n, and for each pole a Cholesky
    factorization, m³/3, and an inverse: a triangular solve, m³, and a product, 2m³;
    then a product with X, 2m²n. A map with one pole solves two triangular systems
    instead, m²n each, if n < 2m. Newton-Schulz steps after the last map take products
    of m×m matrices.

    Args:
      m: One side.
      n: The other side.
      maps: The maps.
      rows: The Newton-Schulz steps after the last one.

    Returns:
      FLOPs, counting a multiply-add as two.
    """
    m, n = min(m, n), max(m, n)
    rect, total = 2 * m * m * n, 0
    for step, h in enumerate(maps):
        after = rows if step == len(maps) - 1 else ()
        total += 2 * rect + len(h.shifts) * (m**3 // 3)
        if not _solves(m, n, h, after):
            total += len(h.shifts) * 3 * m**3
        if after:
            cubic = sum(row[2] == 0.0 for row in after)
            # QAQ and the product of the factors, but none with X.
            total += newton_schulz_flops(m, m, len(after), 0, cubic) + 2 * m**3
    return total


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


def _check_shifts(maps: Sequence[RationalMap], dtype: np.dtype) -> None:
    """Raises if rounding can make I + cA indefinite, which gives NaN.

    The largest eigenvalue, c, has a rounding error of about c ε, and the smallest is 1.
    Longer sums have larger errors, so the limit is well below c ε = 1.
    """
    shift = max(max(h.shifts) for h in maps)
    if shift * float(jnp.finfo(dtype).eps) > 0.1:
        raise ValueError(
            f"`lower_bound` is too small for this number of poles in {dtype}: with "
            f"c = {shift:.1e}, I + cA may be indefinite after rounding. Increase "
            "`lower_bound`, decrease `poles`, or compute in float64 (`jax_enable_x64`)."
        )


def _scaled(gram: Array) -> tuple[Array, Array]:
    """Returns A scaled for σ_max ≤ 1, and the factor of X that does it."""
    square = numerics.frobenius(gram)
    return gram / square, numerics.inverse_root(square)


def _solves(m: int, n: int, h: RationalMap, rows: Sequence[Row]) -> bool:
    """Returns whether to solve against X instead of multiplying it by an inverse.

    Solves take fewer FLOPs for any n, but more time than the inverse and the product
    from about n = 2m on, as docs/polar_methods.md has it for a CPU.
    """
    return not rows and len(h.shifts) == 1 and n < 2 * m


def _solved(gram: Array, x: Array, h: RationalMap) -> Array:
    """Returns QX by two triangular solves, for a map with one pole."""
    (weight,), (shift,) = h.weights, h.shifts
    a = numerics.eye_like(gram) + shift * gram
    lower = lax_linalg.cholesky(a, symmetrize_input=False)
    y = lax_linalg.triangular_solve(lower, x, left_side=True, lower=True)
    y = lax_linalg.triangular_solve(
        lower, y, left_side=True, lower=True, transpose_a=True
    )
    return h.constant * x + weight * y


def _factor(
    gram: Array, h: RationalMap, rows: Sequence[Row], precision: Precision
) -> Array:
    """Returns Q for A with eigenvalues in [0, 1]."""
    eye = numerics.eye_like(gram)
    q = h.constant * eye
    for weight, shift in zip(h.weights, h.shifts, strict=True):
        q = q + weight * spd_inverse(eye + shift * gram, precision)
    if not rows:
        return q
    r = jnp.matmul(q, gram, precision=precision)
    r = jnp.matmul(r, q, precision=precision)
    return jnp.matmul(gram_factor(r, rows, precision), q, precision=precision)
