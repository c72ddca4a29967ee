"""The polar factor by SVD or by eigendecomposition of the Gram matrix."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_matrix._linalg import numerics
from optax_matrix._linalg.numerics import Precision

Decomposition = Literal["svd", "eigh"]

DECOMPOSITIONS: tuple[Decomposition, ...] = ("svd", "eigh")


def exact_polar(
    x: Array,
    *,
    method: Decomposition = "svd",
    dtype: np.dtype | None = None,
    precision: Precision = None,
) -> Array:
    r"""Returns the polar factor U Vᵀ of X = U S Vᵀ, for reference and tests.

    Rank-deficient input gives the partial isometry: the sum of :math:`u_i v_i^T` over
    the singular values above a cutoff relative to the largest, eps·max(m, n) for
    ``"svd"`` and its square root for ``"eigh"``, which sees squares.

    The derivative is that of the polar factor and not that of the SVD: with
    :math:`M = U^T \dot X V`,

    .. math::
      \dot P = U \left[\frac{M_{ij} - M_{ji}}{s_i + s_j}\right] V^T
             + U S^{-1} U^T \dot X (I - V V^T),

    so repeated singular values do no harm; directions below the cutoff count as held at
    zero. Second derivatives go through those of the SVD, and do need distinct values.

    Args:
      x: Matrices, (..., m, n), real floating.
      method: ``"svd"``, or ``"eigh"`` of the smaller Gram matrix, good for condition
        numbers up to eps^{-1/2}.
      dtype: Type of the decomposition, float32 or float64; None is float64 for float64
        and else float32.
      precision: Of the matmuls around it.

    Returns:
      (..., m, n) in the dtype of `x`. A zero matrix gives zero; one with a NaN or Inf
      gives NaN, and only there.

    Raises:
      ValueError: If `x` has fewer than two axes.
      TypeError: If `x` is not real floating.

    Cost:
      About 20m²n (SVD) or 2·2m²n + 9m³ (eigh) FLOPs, m ≤ n, mostly not matmuls.

    References:
      Higham, 2008, Functions of Matrices, theorem 8.1 and section 8.2.
    """
    numerics.check_matrix(x)
    if x.size == 0:
        return x
    tall = numerics.is_tall(x)
    y = numerics.transpose(x) if tall else x
    y = numerics.unit_peak(y).astype(numerics.compute_dtype(x, dtype))
    # What a decomposition does with NaN depends on the backend; it never sees one.
    finite = jnp.all(jnp.isfinite(y), axis=(-2, -1), keepdims=True)
    y = _polar(jnp.where(finite, y, 0.0), method, precision)
    y = jnp.where(finite, y, jnp.nan)
    return (numerics.transpose(y) if tall else y).astype(x.dtype)


def _factors(
    x: Array, method: Decomposition, precision: Precision
) -> tuple[Array, Array, Array]:
    """Returns U, S as (..., 1, m), and Vᵀ with zero rows where S is below the cutoff.

    S is 0 there too, and Vᵀ is Vᵀ[:m], for x with m ≤ n.
    """
    eps = float(jnp.finfo(x.dtype).eps) * max(x.shape[-2:])
    if method == "svd":
        u, s, vt = jnp.linalg.svd(x, full_matrices=False)
        keep = s > eps * jnp.max(s, axis=-1, keepdims=True)
        s, keep = s[..., None, :], keep[..., None, :]
    else:
        gram = jnp.matmul(x, numerics.transpose(x), precision=precision)
        square, u = jnp.linalg.eigh(gram)
        keep = square > eps * jnp.max(square, axis=-1, keepdims=True)
        s = jnp.sqrt(jnp.where(keep, square, 1.0))[..., None, :]
        keep = keep[..., None, :]
        vt = jnp.matmul(numerics.transpose(u), x, precision=precision)
        vt = vt / numerics.transpose(s)
    return u, jnp.where(keep, s, 0.0), jnp.where(numerics.transpose(keep), vt, 0.0)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _polar(x: Array, method: Decomposition, precision: Precision) -> Array:
    u, _, vt = _factors(x, method, precision)
    return jnp.matmul(u, vt, precision=precision)


@_polar.defjvp
def _polar_jvp(
    method: Decomposition,
    precision: Precision,
    primals: tuple[Array],
    tangents: tuple[Array],
) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    matmul = partial(jnp.matmul, precision=precision)
    u, s, vt = _factors(x, method, precision)

    ut_dx = matmul(numerics.transpose(u), dx)
    m = matmul(ut_dx, numerics.transpose(vt))
    turned = (m - numerics.transpose(m)) * _reciprocal(s + numerics.transpose(s))
    outside = (ut_dx - matmul(m, vt)) * _reciprocal(numerics.transpose(s))
    return matmul(u, vt), matmul(u, matmul(turned, vt) + outside)


def _reciprocal(x: Array) -> Array:
    zero = x == 0
    return jnp.where(zero, 0.0, 1.0 / jnp.where(zero, 1.0, x))
