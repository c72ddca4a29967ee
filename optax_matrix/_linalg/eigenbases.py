"""Eigenbases of symmetric matrices, from scratch or by power steps."""

import jax.numpy as jnp
from jax import Array

from optax_matrix._linalg import numerics


def eigenbasis(a: Array) -> Array:
    """Returns eigenvectors as columns, by descending eigenvalue.

    Args:
      a: (..., m, m), symmetric, float32 or float64.

    Returns:
      (..., m, m), orthogonal; NaN where `a` is not finite.
    """
    a = (a + numerics.transpose(a)) / 2
    q = jnp.linalg.eigh(a, symmetrize_input=False)[1][..., ::-1]
    return jnp.where(_finite(a), q, jnp.nan)


def power_product(a: Array, q: Array, sort: bool = True) -> tuple[Array, Array]:
    """Multiplies a basis by A: one step of orthogonal iteration before `q_factor`.

    Args:
      a: (..., m, m), symmetric.
      q: (..., m, m), orthogonal.
      sort: Whether to order the columns of AQ by the Rayleigh quotients qᵀAq of the
        columns of Q, largest first.

    Returns:
      AQ, and the (..., m) positions that its columns had in `q`.
    """
    product = jnp.matmul(a, q, precision="highest")
    order = jnp.broadcast_to(jnp.arange(q.shape[-1]), (*q.shape[:-2], q.shape[-1]))
    if sort:
        order = jnp.argsort(-jnp.sum(q * product, axis=-2), axis=-1)
        product = jnp.take_along_axis(product, order[..., None, :], axis=-1)
    return product, order


def q_factor(x: Array) -> Array:
    """Returns the Q factor of (..., m, m); NaN where `x` is not finite."""
    return jnp.where(_finite(x), jnp.linalg.qr(x)[0], jnp.nan)


def positive_q_factor(x: Array) -> Array:
    """Returns the Q factor for which R has a positive diagonal.

    Args:
      x: (..., m, n), real floating.

    Returns:
      (..., m, n) with orthonormal columns; rows, of the factor of the transpose, if
      there are more columns than rows. NaN where `x` is not finite.
    """
    wide = x.shape[-1] > x.shape[-2]
    y = numerics.transpose(x) if wide else x
    y = y.astype(numerics.at_least_float32(x.dtype))
    q, r = jnp.linalg.qr(y)
    signs = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1)
    q = jnp.where(_finite(y), q * signs[..., None, :], jnp.nan)
    return (numerics.transpose(q) if wide else q).astype(x.dtype)


def _finite(a: Array) -> Array:
    """Returns which matrices are finite: a factorization may not show it."""
    return jnp.all(jnp.isfinite(a), axis=(-2, -1), keepdims=True)
