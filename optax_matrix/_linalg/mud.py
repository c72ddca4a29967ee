"""MUD: decorrelation by triangular solves."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import linalg as lax_linalg

from optax_matrix._linalg import numerics
from optax_matrix._linalg.numerics import Precision


def mud(
    x: Array,
    *,
    passes: int = 1,
    dtype: np.dtype | None = None,
    precision: Precision = None,
) -> Array:
    r"""Decorrelates the slices of the smaller side, one after another.

    The slices are the outputs of X, as rows of Q; or its inputs if they are fewer. Each
    pass is

    .. math::
      q_i \leftarrow q_i / \|q_i\|, \qquad
      Q \leftarrow \operatorname{tril}(Q Q^\top)^{-1} Q, \qquad
      q_i \leftarrow q_i / \|q_i\|.

    It is a Gauss-Seidel step towards :math:`QQ^\top = I`. Singular vectors are not
    kept, and singular values can move away from 1.

    Args:
      x: Matrices, (..., m, n), real floating.
      passes: Number of passes, at least 1.
      dtype: Type of the products, float32 or float64; None is float64 for float64 and
        float32 otherwise.
      precision: Of the matmuls.

    Returns:
      (..., m, n) in the dtype of `x`. Zero slices stay zero; a matrix with a NaN or Inf
      gives NaN, and only there.

    Raises:
      ValueError: If `x` has fewer than two axes.
      TypeError: If `x` is not real floating.

    References:
      MUD (MomentUm Decorrelation), 2026, `arXiv:2603.17970
      <https://arxiv.org/abs/2603.17970>`_.
    """
    numerics.check_matrix(x)
    if x.size == 0:
        return x
    turn = x.shape[-2] >= x.shape[-1]
    # By the norm of the whole matrix first, which spreads NaN to all of it.
    q = numerics.unit_frobenius(numerics.transpose(x) if turn else x)
    q = _unit(q.astype(numerics.compute_dtype(x, dtype)))
    for _ in range(passes):
        # The diagonal is 1, and is not read: a slice of zeros does no harm.
        gram = numerics.gram(q, precision)
        q = lax_linalg.triangular_solve(
            gram, q, left_side=True, lower=True, unit_diagonal=True
        )
        q = _unit(q)
    return (numerics.transpose(q) if turn else q).astype(x.dtype)


def mud_flops(m: int, n: int, passes: int) -> int:
    """Returns the FLOPs of one m×n matrix.

    For m ≤ n a pass takes a product QQᵀ, 2m²n, and a triangular solve, m²n.

    Args:
      m: One side.
      n: The other side.
      passes: Number of passes.

    Returns:
      FLOPs, counting a multiply-add as two.
    """
    m, n = min(m, n), max(m, n)
    return passes * 3 * m * m * n


def _unit(q: Array) -> Array:
    square = jnp.sum(jnp.square(q), axis=-1, keepdims=True)
    return q * numerics.inverse_root(square)
