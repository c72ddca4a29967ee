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

# Largest norm of Q in one block. From 15 on, Polar Express in bfloat16 overshoots the
# interval its next row was made for, and diverges; Jordan's rows need 11.9 for two.
BLOCK_GAIN = 12.5


def restart_points(rows: Sequence[Row], gain: float = BLOCK_GAIN) -> tuple[int, ...]:
    """Returns the steps before which Gram Newton-Schulz forms ``X Xᵀ`` afresh.

    Within a block Q grows to norm ∏ aᵢ on small singular values while it stays near 1
    on large ones, so its rounding error relative to the large ones is ε ∏ aᵢ; and an
    error ε of R near a zero eigenvalue grows to ε ∏ aᵢ². The plain iteration keeps both
    near ε. A step that would take ∏ aᵢ beyond `gain` starts a new block, in every dtype
    alike: matmuls of float32 may round to bfloat16 at JAX's default precision.

    Args:
      rows: Coefficients ``(a, b, c)`` of the run.
      gain: Largest ∏ aᵢ within a block of more than one step. The default splits the
        tables as 2+2+1 (jordan), 1+1+2+1 (quintic), 1+1+1+2+3 (polar_express), 1+1+1+2
        (cans), 2+2 (aol), 2+2+1 (cubic5), 3+3+3+3 (track3) and 6+6+6+2 (cubic).

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


def newton_schulz_flops(m: int, n: int, steps: int, restarts: int | None = None) -> int:
    """Returns the matmul FLOPs of one m×n matrix, m ≤ n, all quintic.

    With ``rect = 2m²n`` and ``small = 2m³``: the plain iteration costs
    ``steps (2 rect + small)``. In Gram form each of ``k = restarts + 1`` blocks costs
    two rectangular products (forming R, applying Q), each step one small product for
    R², and each step but the first of a block three more (one for Q, two for R).
    A row with c = 0 saves one small product in either form.

    Args:
      m: Smaller side.
      n: Larger side.
      steps: Number of steps.
      restarts: Number of restarts of the Gram form; None for the plain iteration.

    Returns:
      FLOPs, counting a multiply-add as two.
    """
    rect, small = 2 * m * m * n, 2 * m**3
    if restarts is None:
        return steps * (2 * rect + small)
    blocks = restarts + 1
    return 2 * blocks * rect + (steps + 3 * (steps - blocks)) * small


def gram_is_cheaper(m: int, n: int, steps: int, restarts: int) -> bool:
    """Whether Gram Newton-Schulz takes fewer FLOPs than the plain iteration.

    By `newton_schulz_flops`; it comes down to ``2n > 3m`` for the smaller side m,
    unless every step is a block of its own and the two cost the same.

    Args:
      m: One side.
      n: The other.
      steps: Number of steps.
      restarts: Number of restarts of the Gram form.
    """
    m, n = min(m, n), max(m, n)
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
        last two take no product more, as the first step uses XXᵀ.
      method: ``"plain"``, ``"gram"``, or ``"auto"`` for the one with fewer FLOPs.
      dtype: Type of the products; None is float64 for float64 and else float32.
      precision: Of the matmuls. None is JAX's default, which for float32 means TF32 on
        recent NVIDIA GPUs and bfloat16 passes on TPU; enough for an optimizer, not to
        see the two methods agree to float32 rounding.

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
    y = numerics.transpose(x) if tall else x
    y = numerics.unit_frobenius(y, numerics.compute_dtype(x, dtype))
    y, gram = _rescale(y, normalization, precision)

    restarts = restart_points(rows)
    if method == "auto":
        m, n = y.shape[-2:]
        cheaper = gram_is_cheaper(m, n, len(rows), len(restarts))
        method = "gram" if cheaper else "plain"
    if method == "plain":
        restarts = tuple(range(1, len(rows)))

    starts, stops = (0, *restarts), (*restarts, len(rows))
    for start, stop in zip(starts, stops, strict=True):
        if gram is None:
            gram = jnp.matmul(y, numerics.transpose(y), precision=precision)
        y = _block(y, gram, rows[start:stop], precision)
        gram = None
    return (numerics.transpose(y) if tall else y).astype(x.dtype)


def _rescale(
    y: Array, normalization: Normalization, precision: Precision
) -> tuple[Array, Array | None]:
    """Applies a normalization other than Frobenius; returns the Gram matrix with it."""
    if normalization == "frobenius":
        return y, None
    gram = jnp.matmul(y, numerics.transpose(y), precision=precision)
    wide = gram.astype(numerics.at_least_float32(gram.dtype))
    if normalization == "schatten4":
        scale = 1.0 / jnp.sqrt(numerics.frobenius(wide))
    else:
        total = jnp.sum(jnp.abs(wide), axis=-1, keepdims=True)
        zero = total == 0
        scale = jnp.where(zero, 0.0, 1.0 / jnp.sqrt(jnp.where(zero, 1.0, total)))
    y = (scale * y.astype(wide.dtype)).astype(y.dtype)
    gram = (scale * wide * numerics.transpose(scale)).astype(gram.dtype)
    return y, gram


def _block(y: Array, gram: Array, rows: Sequence[Row], precision: Precision) -> Array:
    """Runs `rows` on y, given its Gram matrix, and multiplies y once."""
    if len(rows) == 1:
        # No Q: adding a to the diagonal of a half-precision Z would round it once more.
        a = rows[0][0]
        z = _quadratic(gram, rows[0], precision)
        return a * y + jnp.matmul(z, y, precision=precision)
    return jnp.matmul(gram_factor(gram, rows, precision), y, precision=precision)


def gram_factor(gram: Array, rows: Sequence[Row], precision: Precision = None) -> Array:
    """Returns Q, a polynomial in R = XXᵀ, such that QX is Newton-Schulz run on X.

    Args:
      gram: R, (..., m, m), symmetric with eigenvalues in [0, 1].
      rows: Coefficients, first applied first, at least one.
      precision: Of the matmuls.

    Returns:
      (..., m, m) in the dtype of `gram`. One call is one block: beyond the first of
      `restart_points`, rounding errors of R dominate.
    """
    q, r = None, gram
    for step, row in enumerate(rows):
        a = row[0]
        z = _quadratic(r, row, precision)
        if q is None:
            eye = jnp.broadcast_to(jnp.eye(z.shape[-1], dtype=z.dtype), z.shape)
            q = a * eye + z
        else:
            q = a * q + jnp.matmul(q, z, precision=precision)
        if step + 1 < len(rows):
            rz = a * r + jnp.matmul(r, z, precision=precision)
            r = a * rz + jnp.matmul(z, rz, precision=precision)
    if q is None:
        raise ValueError("`rows` must have at least one row, got none.")
    return q


def _quadratic(r: Array, row: Row, precision: Precision) -> Array:
    _, b, c = row
    if c == 0.0:
        return b * r
    return b * r + c * jnp.matmul(r, r, precision=precision)
