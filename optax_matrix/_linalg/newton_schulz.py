"""Newton-Schulz orthogonalization, on the matrix or on its Gram matrix."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_matrix._linalg import numerics
from optax_matrix._linalg.coefficients import Normalization, Row
from optax_matrix._linalg.numerics import Precision

Method = Literal["auto", "plain", "gram"]

METHODS: tuple[Method, ...] = ("auto", "plain", "gram")


def block_gain(rounding: float) -> float:
    """Returns the largest norm of Q that one block may reach.

    min(2.5 ε^{-1/3}, 500): 12.6 for bfloat16, 25 for float16 and TF32, 500 for float32
    and float64. In bfloat16 Polar Express diverges from 15 on, and Jordan's rows need
    11.9 for two steps. In float32 a gain of 500 costs up to 2e-4 (jordan) and 1e-3
    (polar_express) of accuracy in directions that started near zero.

    Args:
      rounding: ε of a matmul, see `numerics.rounding`.
    """
    return min(2.5 * rounding ** (-1 / 3), 500.0)


def restart_points(rows: Sequence[Row], gain: float) -> tuple[int, ...]:
    """Returns the steps before which Gram Newton-Schulz forms ``X Xᵀ`` afresh.

    Within a block Q grows to norm ∏ aᵢ on small singular values while it stays near 1
    on large ones, so its rounding error relative to the large ones is ε ∏ aᵢ; and an
    error ε of R near a zero eigenvalue grows to ε ∏ aᵢ². The plain iteration keeps both
    near ε. A step that would take ∏ aᵢ beyond `gain` starts a new block.

    Args:
      rows: Coefficients ``(a, b, c)`` of the run.
      gain: Largest ∏ aᵢ within a block of more than one step, see `block_gain`.
        bfloat16's splits the tables as 2+2+1 (jordan), 1+1+2+1 (quintic), 1+1+1+2+3
        (polar_express), 1+1+1+2 (polar_express5, cans), 2+2 (aol), 2+2+1 (cubic5),
        3+3+3+3 (track3) and 6+6+6+2 (cubic); float32's leaves jordan and quintic in one
        block.

    Returns:
      Increasing step indices, each in [1, len(rows)); empty when one block will do.
    """
    points, start, norm = [], 0, 1.0
    for i, (a, _, _) in enumerate(rows):
        if i > start and norm * a > gain:
            points.append(i)
            start, norm = i, 1.0
        norm *= a
    return tuple(points)


def newton_schulz_flops(
    m: int, n: int, steps: int, restarts: int | None = None, cubic: int = 0
) -> int:
    """Returns the matmul FLOPs of one m×n matrix.

    With ``rect = 2m²n`` and ``small = 2m³`` for m ≤ n, the plain iteration costs
    ``steps (2 rect + small)``. In Gram form each of ``k = restarts + 1`` blocks costs
    two rectangular products (forming R, applying Q), each step one small product for
    R², and each step but the first of a block three more (one for Q, two for R).
    A row with c = 0 saves one small product in either form.

    Args:
      m: One side.
      n: The other side.
      steps: Number of steps.
      restarts: Number of restarts of the Gram form; None for the plain iteration.
      cubic: Number of steps with c = 0.

    Returns:
      FLOPs, counting a multiply-add as two.
    """
    m, n = min(m, n), max(m, n)
    rect, small = 2 * m * m * n, 2 * m**3
    if restarts is None:
        return steps * (2 * rect + small) - cubic * small
    blocks = restarts + 1
    return 2 * blocks * rect + (steps - cubic + 3 * (steps - blocks)) * small


def gram_is_cheaper(m: int, n: int, steps: int, restarts: int) -> bool:
    """Returns whether the Gram form takes fewer FLOPs than the plain iteration.

    By `newton_schulz_flops`; it comes down to ``2n > 3m`` for the smaller side m,
    unless every step is a block of its own and the two cost the same.

    Args:
      m: One side.
      n: The other side.
      steps: Number of steps.
      restarts: Number of restarts of the Gram form.
    """
    gram = newton_schulz_flops(m, n, steps, restarts)
    return gram < newton_schulz_flops(m, n, steps)


def newton_schulz(
    x: Array,
    rows: Sequence[Row],
    *,
    normalization: Normalization = "frobenius",
    method: Method = "auto",
    dtype: np.dtype | None = None,
    precision: Precision = None,
) -> Array:
    r"""Moves every singular value towards 1 by odd quintics, by matmuls alone.

    With X scaled for :math:`\sigma_{\max} \le 1` and (a, b, c) a row of ``rows``,

    .. math::
      A = X X^T, \qquad X \leftarrow aX + (bA + cA^2) X,

    or, in Gram form, the same polynomials applied to R = XXᵀ,

    .. math::
      Z = bR + cR^2, \quad Q \leftarrow aQ + QZ, \quad
      R \leftarrow (aI + Z) R (aI + Z), \qquad X \leftarrow QX,

    where X and R are renewed at `restart_points`. The two agree to rounding. The
    singular vectors are kept, but for ``normalization="aol"``, which rescales the
    inputs or outputs (whichever are fewer) one by one and so turns the result a little.

    Args:
      x: Matrices, (..., m, n), real floating.
      rows: Coefficients, first applied first; see `coefficients.resolve`.
      normalization: ``"frobenius"`` divides by ‖X‖; ``"schatten4"`` by the tighter
        ‖XXᵀ‖^{1/2}; ``"aol"`` row i (of the wide orientation) by (Σⱼ|XXᵀ|ᵢⱼ)^{1/2}. The
        last two need no additional product, as the first step uses XXᵀ.
      method: ``"plain"``, ``"gram"``, or ``"auto"`` for the one with fewer FLOPs.
      dtype: Dtype of the products; None is float64 for float64 and float32 otherwise.
      precision: Precision of the matmuls. None is JAX's default, which for float32
        means TF32 on recent NVIDIA GPUs and bfloat16 passes on TPU; enough for an
        optimizer, not to see the two methods agree to float32 rounding.

    Returns:
      (..., m, n) in the dtype of `x`. A zero matrix gives zero; one with a NaN or Inf
      gives NaN, and only there.

    Raises:
      ValueError: If `x` has fewer than two axes.
      TypeError: If `x` is not real floating.

    Cost:
      `newton_schulz_flops`; memory of about two copies of `x` and three m×m.

    Precision:
      Inputs of any magnitude that float32 holds as normal numbers.

    References:
      Jordan et al., 2024, `Muon <https://kellerjordan.github.io/posts/muon/>`_.
      Differs: no ε in the norm; the compute dtype is float32 unless asked otherwise.

      Zhang et al., 2026, `Gram Newton-Schulz
      <https://github.com/Dao-AILab/gram-newton-schulz>`_. Differs: restarts follow from
      the coefficients and the number of steps. Theirs, one after step 2, is made for
      five steps; over all 8 of Polar Express it diverges in bfloat16 (tested).

      Boissin et al., 2025, `Turbo-Muon <https://arxiv.org/abs/2512.04632>`_: the AOL
      rescaling.
    """
    numerics.check_matrix(x)
    if x.size == 0:
        return x
    tall = numerics.is_tall(x)
    y = numerics.unit_peak(numerics.transpose(x) if tall else x)
    dtype = numerics.compute_dtype(x, dtype)
    half = jnp.finfo(dtype).bits < 32
    if half:
        # Unscaled, the Gram matrix could overflow float16.
        y = (y / numerics.frobenius(y)).astype(dtype)
    gram = numerics.gram(y, precision)
    scale = _scale(gram, normalization)
    gram = (scale * gram * numerics.transpose(scale)).astype(dtype)
    if half:
        y = (scale * y).astype(dtype)

    m, n = y.shape[-2:]
    restarts = gram_restarts(m, n, rows, method, dtype, precision)
    if restarts is None:
        restarts = tuple(range(1, len(rows)))

    starts, stops = (0, *restarts), (*restarts, len(rows))
    for start, stop in zip(starts, stops, strict=True):
        if start:
            gram = numerics.gram(y, precision)
        block = rows[start:stop]
        if half and len(block) == 1:
            # Adding a to the diagonal of a half-precision Z would round it once more.
            z = _quadratic(gram, block[0], precision)
            y = block[0][0] * y + jnp.matmul(z, y, precision=precision)
            continue
        q = gram_factor(gram, block, precision)
        if not start and not half:
            # Scale the small factor instead of y: one pass over y fewer.
            q = q * numerics.transpose(scale)
        y = jnp.matmul(q, y, precision=precision)
    return (numerics.transpose(y) if tall else y).astype(x.dtype)


def gram_restarts(
    m: int,
    n: int,
    rows: Sequence[Row],
    method: Method,
    dtype: np.dtype,
    precision: Precision,
    backend: str | None = None,
) -> tuple[int, ...] | None:
    """Returns where the Gram form of a run restarts; None if the run is plain.

    Args:
      m: One side.
      n: The other.
      rows: Coefficients.
      method: ``"plain"``, ``"gram"``, or ``"auto"`` to choose the cheaper one.
      dtype: The dtype of the products.
      precision: The precision of the matmuls.
      backend: The backend that multiplies; None is the default backend of JAX.
    """
    if method == "plain":
        return None
    gain = block_gain(numerics.rounding(dtype, precision, backend))
    restarts = restart_points(rows, gain)
    steps = len(rows)
    cheaper = gram_is_cheaper(m, n, steps, len(restarts))
    return restarts if method == "gram" or cheaper else None


def _scale(gram: Array, normalization: Normalization) -> Array:
    """Returns the factor of X, (..., 1, 1) or (..., m, 1), given XXᵀ; 0 for zeros."""
    gram = gram.astype(numerics.at_least_float32(gram.dtype))
    if normalization == "frobenius":
        square = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    elif normalization == "schatten4":
        square = numerics.frobenius(gram)
    else:
        square = jnp.sum(jnp.abs(gram), axis=-1, keepdims=True)
    return numerics.inverse_root(square)


def gram_factor(gram: Array, rows: Sequence[Row], precision: Precision = None) -> Array:
    """Returns Q, a polynomial in R = XXᵀ, such that QX is Newton-Schulz run on X.

    Args:
      gram: R, (..., m, m), symmetric with eigenvalues in [0, 1].
      rows: Coefficients, first applied first, at least one.
      precision: The precision of the matmuls.

    Returns:
      (..., m, m) in the dtype of `gram`. One call is one block: beyond the first of
      `restart_points`, rounding errors of R dominate.
    """
    if not rows:
        raise ValueError("`rows` must have at least one row, got none.")

    def product(x: Array, y: Array) -> Array:
        return jnp.matmul(x, y, precision=precision)

    def factor(r: Array, row: Row) -> Array:
        # With a on the diagonal rather than a Y added after ZY: one pass over Y fewer.
        return row[0] * numerics.eye_like(r) + _quadratic(r, row, precision)

    r, p = gram, factor(gram, rows[0])
    q = p
    for row in rows[1:]:
        r = product(product(p, r), p)
        p = factor(r, row)
        q = product(q, p)
    return q


def _quadratic(r: Array, row: Row, precision: Precision) -> Array:
    _, b, c = row
    return b * r if c == 0.0 else b * r + c * jnp.matmul(r, r, precision=precision)
