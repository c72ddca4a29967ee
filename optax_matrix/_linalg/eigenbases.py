"""Eigenbases of symmetric matrices: from nothing, and followed from step to step."""

import jax.numpy as jnp
from jax import Array

from optax_matrix._linalg import numerics
from optax_matrix._linalg.numerics import WHOLE, Parts


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


def power_product(
    a: Array, q: Array, sort: bool = True, parts: Parts = WHOLE
) -> tuple[Array, Array]:
    """Multiplies a basis by A: a step of orthogonal iteration, but for `q_factor`.

    A Q, its columns ordered by the Rayleigh quotients qᵀAq that they had before.

    Args:
      a: (..., m, m), symmetric.
      q: (..., m, m), orthogonal.
      sort: Whether to order the columns.
      parts: Among whom the product is shared; all have A and Q, and get the result.

    Returns:
      The product, and the (..., m) positions that its columns had in `q`.
    """
    product = jnp.matmul(parts.own(a), q, precision="highest")
    product = parts.gather(product, a.shape[-1])
    order = jnp.broadcast_to(jnp.arange(q.shape[-1]), (*q.shape[:-2], q.shape[-1]))
    if sort:
        order = jnp.argsort(-jnp.sum(q * product, axis=-2), axis=-1)
        product = jnp.take_along_axis(product, order[..., None, :], axis=-1)
    return product, order


def q_factor(x: Array) -> Array:
    """Returns the Q factor of (..., m, m); NaN where `x` is not finite."""
    return jnp.where(_finite(x), jnp.linalg.qr(x)[0], jnp.nan)


def _finite(a: Array) -> Array:
    """Which matrices are: factorizations of 1×1 and diagonal ones do not show it."""
    return jnp.all(jnp.isfinite(a), axis=(-2, -1), keepdims=True)
