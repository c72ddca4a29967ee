"""Symmetric matrices in half the memory: their triangles, folded into a rectangle.

With A cut after its first h = ⌈m/2⌉ rows and columns into A₁₁, A₂₁ and A₂₂, the lower
triangle of A₁₁ and the upper triangle of A₂₂ fit into each other, and A₂₁ goes below
them (the "rectangular full packed" format of LAPACK, Gustavson et al., 2010). Only
slices and masks are needed, no gather.
"""

import jax.numpy as jnp
from jax import Array


def pack(a: Array) -> Array:
    """Returns the m(m+1)/2 different entries of a symmetric matrix (m, m).

    They are an array (m + 1, m / 2) for even m, and else (m, (m + 1) / 2).
    """
    m = a.shape[-1]
    h, even = (m + 1) // 2, 1 - m % 2
    first = jnp.pad(jnp.tril(a[:h, :h]), ((even, 0), (0, 0)))
    second = jnp.pad(jnp.triu(a[h:, h:]), ((0, 1), (1 - even, 0)))
    return jnp.concatenate([first + second, a[h:, :h]])


def unpack(packed: Array) -> Array:
    """Returns the symmetric matrix (m, m)."""
    rows, h = packed.shape
    even = int(rows == 2 * h + 1)
    k = rows - even - h
    top, below = packed[: h + even], packed[h + even :]
    first = jnp.tril(top[even:])
    second = jnp.triu(top[:k, 1 - even :])
    first = first + jnp.tril(first, -1).T
    second = second + jnp.triu(second, 1).T
    upper = jnp.concatenate([first, below.T], 1)
    return jnp.concatenate([upper, jnp.concatenate([below, second], 1)])
