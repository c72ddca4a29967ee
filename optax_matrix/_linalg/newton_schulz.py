"""Newton-Schulz orthogonalization, on the matrix or on its Gram matrix."""

import itertools
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from optax_matrix._linalg import numerics
from optax_matrix._linalg.coefficients import Normalization, Row
from optax_matrix._linalg.numerics import WHOLE, Parts, Precision, Traffic

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
        (polar_express), 1+1+1+2 (cans), 2+2 (aol), 2+2+1 (cubic5), 3+3+3+3 (track3) and
        6+6+6+2 (cubic); float32's leaves jordan and quintic in one block.

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
    m: int,
    n: int,
    steps: int,
    restarts: int | None = None,
    parts: int = 1,
    cubic: int = 0,
) -> int:
    """Returns the matmul FLOPs of one m×n matrix, or of a part of it.

    With ``rect = 2m²n`` and ``small = 2m³``: the plain iteration costs
    ``steps (2 rect + small)``. In Gram form each of ``k = restarts + 1`` blocks costs
    two rectangular products (forming R, applying Q), each step one small product for
    R², and each step but the first of a block three more (one for Q, two for R).
    A row with c = 0 saves one small product in either form.

    Args:
      m: One side.
      n: The other.
      steps: Number of steps.
      restarts: Number of restarts of the Gram form; None for the plain iteration.
      parts: In how many the longer side is cut; each has its rows of small products.
      cubic: How many steps have c = 0.

    Returns:
      FLOPs, counting a multiply-add as two.
    """
    m, n = min(m, n), max(m, n)
    rect, small = 2 * m * m * -(-n // parts), 2 * m * m * -(-m // parts)
    if restarts is None:
        return steps * (2 * rect + small) - cubic * small
    blocks = restarts + 1
    return 2 * blocks * rect + (steps - cubic + 3 * (steps - blocks)) * small


def gram_is_cheaper(m: int, n: int, steps: int, restarts: int, parts: int = 1) -> bool:
    """Whether Gram Newton-Schulz takes fewer FLOPs than the plain iteration.

    By `newton_schulz_flops`; it comes down to ``2n > 3m`` for the smaller side m of a
    whole matrix, unless every step is a block of its own and the two cost the same.

    Args:
      m: One side.
      n: The other.
      steps: Number of steps.
      restarts: Number of restarts of the Gram form.
      parts: In how many the longer side is cut.
    """
    gram = newton_schulz_flops(m, n, steps, restarts, parts)
    return gram < newton_schulz_flops(m, n, steps, parts=parts)


def newton_schulz(
    x: Array,
    rows: Sequence[Row],
    *,
    normalization: Normalization = "frobenius",
    method: Method = "auto",
    dtype: np.dtype | None = None,
    precision: Precision = None,
    parts: Parts | None = None,
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
        last two take no product more, as the first step uses XXᵀ.
      method: ``"plain"``, ``"gram"``, or ``"auto"`` for the one with fewer FLOPs.
      dtype: Type of the products; None is float64 for float64 and else float32.
      precision: Of the matmuls. None is JAX's default, which for float32 means TF32 on
        recent NVIDIA GPUs and bfloat16 passes on TPU; enough for an optimizer, not to
        see the two methods agree to float32 rounding.
      parts: None for whole matrices. Otherwise `x` is one part of each matrix, cut
        across the last axis, which is the longer side of the whole. Parts sum the Gram
        matrices, and each makes its rows of the products of small matrices.

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
    tall = parts is None and numerics.is_tall(x)
    parts = parts or WHOLE
    y = numerics.unit_peak(numerics.transpose(x) if tall else x, parts)
    dtype = numerics.compute_dtype(x, dtype)
    half = jnp.finfo(dtype).bits < 32
    if half:
        # Unscaled, the Gram matrix could overflow float16.
        y = (y / numerics.frobenius(y, parts)).astype(dtype)
    gram = numerics.gram(y, precision, parts)
    scale = _scale(gram, normalization)
    gram = (scale * gram * numerics.transpose(scale)).astype(dtype)
    if half:
        y = (scale * y).astype(dtype)

    m, n = y.shape[-2], y.shape[-1] * parts.count
    restarts = gram_restarts(m, n, rows, method, dtype, precision, parts.count)
    if restarts is None:
        restarts = tuple(range(1, len(rows)))

    starts, stops = (0, *restarts), (*restarts, len(rows))
    for start, stop in zip(starts, stops, strict=True):
        if start:
            gram = numerics.gram(y, precision, parts)
        block = rows[start:stop]
        if half and len(block) == 1:
            # Adding a to the diagonal of a half-precision Z would round it once more.
            z = _quadratic(gram, block[0], precision, parts)
            y = block[0][0] * y + jnp.matmul(z, y, precision=precision)
            continue
        q = gram_factor(gram, block, precision, parts)
        if not start and not half:
            # On the small factor rather than on y: a pass less over y.
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
    parts: int = 1,
) -> tuple[int, ...] | None:
    """Returns where the Gram form of a run restarts; None if the run is plain.

    Args:
      m: One side.
      n: The other.
      rows: Coefficients.
      method: As asked for; ``"auto"`` is decided here.
      dtype: Of the products.
      precision: Of the matmuls.
      parts: In how many the longer side is cut.
    """
    if method == "plain":
        return None
    gain = block_gain(numerics.rounding(dtype, precision))
    restarts = restart_points(rows, gain)
    steps = len(rows)
    cheaper = gram_is_cheaper(m, n, steps, len(restarts), parts)
    return restarts if method == "gram" or cheaper else None


def _scale(gram: Array, normalization: Normalization) -> Array:
    """What to multiply X by, (..., 1, 1) or (..., m, 1), given XXᵀ; 0 for zeros."""
    gram = gram.astype(numerics.at_least_float32(gram.dtype))
    if normalization == "frobenius":
        square = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    elif normalization == "schatten4":
        square = numerics.frobenius(gram)
    else:
        square = jnp.sum(jnp.abs(gram), axis=-1, keepdims=True)
    return numerics.inverse_root(square)


def newton_schulz_traffic(
    m: int,
    n: int,
    rows: Sequence[Row],
    restarts: Sequence[int] | None,
    parts: int,
    dtype: DTypeLike,
) -> Traffic:
    """Returns what the parts of one matrix tell one another.

    A sum of the Gram matrix for each block; a gather of R², of R from the second step
    of a block on, and of its Q unless that took one step. The plain iteration is as
    blocks of one step each.

    Args:
      m: One side.
      n: The other.
      rows: Coefficients.
      restarts: Where the Gram form restarts; None for the plain iteration.
      parts: In how many the longer side is cut.
      dtype: Of the products.
    """
    steps = len(rows)
    blocks = steps if restarts is None else len(restarts) + 1
    edges = range(steps) if restarts is None else (0, *restarts)
    lengths = [b - a for a, b in itertools.pairwise((*edges, steps))]
    squares = sum(row[2] != 0.0 for row in rows)
    gathers = squares + steps - blocks + sum(length > 1 for length in lengths)
    return numerics.traffic(min(m, n), blocks, gathers, parts, dtype)


def gram_factor(
    gram: Array,
    rows: Sequence[Row],
    precision: Precision = None,
    parts: Parts = WHOLE,
) -> Array:
    """Returns Q, a polynomial in R = XXᵀ, such that QX is Newton-Schulz run on X.

    Args:
      gram: R, (..., m, m), symmetric with eigenvalues in [0, 1].
      rows: Coefficients, first applied first, at least one.
      precision: Of the matmuls.
      parts: Among whom the products are shared; all have R, and get Q.

    Returns:
      (..., m, m) in the dtype of `gram`. One call is one block: beyond the first of
      `restart_points`, rounding errors of R dominate.
    """
    if not rows:
        raise ValueError("`rows` must have at least one row, got none.")

    def product(x: Array, y: Array) -> Array:
        return jnp.matmul(x, y, precision=precision)

    def factor(r: Array, row: Row) -> Array:
        # With a on the diagonal rather than a Y added after ZY: a pass less over Y.
        return row[0] * numerics.eye_like(r) + _quadratic(r, row, precision, parts)

    m = gram.shape[-1]
    r, p = gram, factor(gram, rows[0])
    if len(rows) == 1:
        return p
    q = parts.own(p)
    for row in rows[1:]:
        r = parts.gather(product(product(parts.own(p), r), p), m)
        p = factor(r, row)
        q = product(q, p)
    return parts.gather(q, m)


def _quadratic(r: Array, row: Row, precision: Precision, parts: Parts) -> Array:
    _, b, c = row
    if c == 0.0:
        return b * r
    square = jnp.matmul(parts.own(r), r, precision=precision)
    return b * r + c * parts.gather(square, r.shape[-1])
