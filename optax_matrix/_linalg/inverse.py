"""Inverse of symmetric positive definite matrices, by Cholesky, shared among parts."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.lax import linalg as lax_linalg
from jax.typing import DTypeLike

from optax_matrix._linalg import numerics
from optax_matrix._linalg.numerics import Parts, Precision, Traffic


def spd_inverse(a: Array, precision: Precision, parts: Parts) -> Array:
    """Returns A⁻¹, from A = LLᵀ: as L⁻ᵀL⁻¹, or column by column if parts share it.

    Args:
      a: A, (..., m, m); only its lower triangle is read.
      precision: Of the product L⁻ᵀL⁻¹ of whole matrices. Parts multiply only within
        the factorization, at the highest precision.
      parts: Who share the work; all have A, and get all of the inverse.

    Returns:
      (..., m, m). All NaN where A is not positive definite.

    Cost:
      `inverse_flops` and `inverse_traffic`.
    """
    lower = _cholesky(a, parts)
    unit = numerics.transpose(parts.own(numerics.eye_like(a)))
    half = lax_linalg.triangular_solve(lower, unit, left_side=True, lower=True)
    if parts.count == 1:
        # A product is faster than another solve, but takes all columns.
        return jnp.matmul(numerics.transpose(half), half, precision=precision)
    mine = lax_linalg.triangular_solve(
        lower, half, left_side=True, lower=True, transpose_a=True
    )
    return parts.gather(numerics.transpose(mine), a.shape[-1])


def inverse_flops(m: int, parts: int = 1) -> int:
    """Returns the FLOPs of one m×m matrix, or of what one of its parts does.

    A factorization, m³/3, a triangular solve, m³, and a product, 2m³. A part solves
    twice for its columns instead, m² each. Of a panel of w columns it factorizes the
    block on the diagonal, w³/3, as all do, takes off its r rows of the panel what the s
    columns before explain, 2rsw, and solves for those below the block, w² each.

    Args:
      m: The side.
      parts: How many share the work.

    Returns:
      FLOPs, counting a multiply-add as two.
    """
    if parts == 1:
        return m**3 // 3 + 3 * m**3
    flops = 2 * m * m * -(-m // parts)
    for panel in _panels(m, parts):
        width = panel.stop - panel.start
        rows = panel.block_rows + panel.rows_below
        flops += width**3 // 3 + panel.rows_below * width**2
        flops += 2 * rows * panel.start * width
    return flops


def inverse_traffic(m: int, parts: int, dtype: DTypeLike) -> Traffic:
    """Returns what the parts of one m×m matrix tell one another.

    Of every panel they gather the block on the diagonal (but the first, which needs no
    product) and what is below (the last has nothing there), and then the inverse.

    Args:
      m: The side.
      parts: How many share the work.
      dtype: Of the matrix.
    """
    panels = _panels(m, parts)
    _, gathers, moved = numerics.traffic(m, 0, 1, parts, dtype)
    for panel in panels:
        entries = (panel.block_rows + panel.rows_below) * (panel.stop - panel.start)
        moved += entries * (parts - 1) * jnp.dtype(dtype).itemsize
    return Traffic(0, gathers + 2 * (len(panels) - 1), moved)


class _Panel(NamedTuple):
    """Columns of a factorization, and the rows that each part has of them.

    Attributes:
      start: The first column.
      stop: One more than the last.
      block_rows: Of the block on the diagonal, 0 where all have it to begin with.
      rows_below: Of what is below it.
    """

    start: int
    stop: int
    block_rows: int
    rows_below: int


def _panels(m: int, parts: int) -> list[_Panel]:
    """The panels of an m×m matrix, √parts / 2 of them, rounded up.

    Few, as each is two gathers; yet the blocks on the diagonal, which all parts
    factorize, then take at most 4/3 m³ over all parts. All else of a Halley step of a
    square matrix is 6.41 m³ at most, so that it is at most 1.06 of the 22/3 m³ that a
    whole one takes.
    """
    count = min(math.isqrt(parts - 1) // 2 + 1, m)
    panels = []
    for i in range(count):
        start, stop = i * m // count, (i + 1) * m // count
        block = -(-(stop - start) // parts) if start else 0
        panels.append(_Panel(start, stop, block, -(-(m - stop) // parts)))
    return panels


def _cholesky(a: Array, parts: Parts) -> Array:
    """L, from left to right: a panel is A less what the panels before it account for.

    All have all of L so far, so each row of a panel can be worked on by anyone.
    """
    m, lower = a.shape[-1], a[..., :0]
    for panel in _panels(m, parts.count):
        start, stop = panel.start, panel.stop
        block = a[..., :stop, :stop]
        if start:
            mine = _own_rows(a, lower, panel, start, stop, parts)
            block = parts.gather(mine, stop - start)
        block = lax_linalg.cholesky(block, symmetrize_input=False)
        rows = [jnp.zeros_like(a[..., :start, start:stop]), block]
        if stop < m:
            mine = _own_rows(a, lower, panel, stop, m, parts)
            below = lax_linalg.triangular_solve(
                block, mine, left_side=False, lower=True, transpose_a=True
            )
            rows.append(parts.gather(below, m - stop))
        lower = jnp.concatenate((lower, jnp.concatenate(rows, axis=-2)), axis=-1)
    return lower


def _own_rows(
    a: Array, lower: Array, panel: _Panel, first: int, last: int, parts: Parts
) -> Array:
    """This part's rows of those from `first` to `last` of a panel of A - LLᵀ."""
    left = parts.own(lower[..., first:last, :])
    right = numerics.transpose(lower[..., panel.start : panel.stop, :])
    # As exact as a factorization of the whole, whatever the user's products are.
    explained = jnp.matmul(left, right, precision="highest")
    return parts.own(a[..., first:last, panel.start : panel.stop]) - explained
