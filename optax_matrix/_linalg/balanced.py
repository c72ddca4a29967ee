"""A polar factor whose entries add up to zero."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from optax_matrix._linalg import numerics
from optax_matrix._linalg.polar import PolarMethod

_MATRIX = (-2, -1)


@dataclass(frozen=True)
class Balanced:
    r"""Orthogonalizes X + λE, with λ such that the entries of the result sum to zero.

    All entries of E are equal, and its norm is 1. The polar factor of X + λE is the
    matrix with singular values of at most 1 that has the largest inner product with X
    among those whose entries sum to zero.

    The sum does not decrease with λ, because it is the derivative of the nuclear norm,
    so λ is found by bisection. In orthonormal bases that start with the vectors of E,
    let a be the first entry of X, b the rest of its row and c the rest of its column.
    The norm of X + λE is at least that without b and c, and without the first entry it
    is at most ‖b‖ + ‖c‖ larger than that of the remaining block. So the norm is least
    where |a + λ| ≤ ‖b‖ + ‖c‖.

    For square matrices it may be least where X + λE is singular. There the sum jumps if
    ``method`` is exact, and the result is not balanced. Newton-Schulz is continuous.

    Args:
      method: How to orthogonalize.
      bisections: Number of bisections, at least 1.
    """

    method: PolarMethod
    bisections: int

    @property
    def transposable(self) -> bool:
        """Whether ``polar(x.mT)`` is ``polar(x).mT``."""
        return bool(getattr(self.method, "transposable", False))

    @property
    def flops(self) -> Callable[..., int]:
        """The FLOPs of all applications; missing if `method` has no formula."""
        method: Any = self.method
        inner = method.flops
        return lambda *given: (self.bisections + 1) * inner(*given)

    def polar(self, x: Array) -> Array:
        """Orthogonalizes each matrix of (..., m, n)."""
        y = numerics.unit_peak(x)
        root = jnp.sqrt(jnp.asarray(y.shape[-2] * y.shape[-1], y.dtype))

        def around(y: Array, axis: int) -> Array:
            """Returns ‖b‖ or ‖c‖, from the means over the other axis."""
            means = jnp.mean(y, axis=axis, keepdims=True)
            off = means - jnp.mean(means, axis=_MATRIX, keepdims=True)
            length = jnp.sqrt(jnp.sum(jnp.square(off), axis=_MATRIX, keepdims=True))
            return length * y.shape[axis] ** 0.5

        def bisect(_: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            low, high, *_ = carry
            middle = (low + high) / 2
            found = self.method.polar(y + middle / root)
            above = jnp.sum(found, axis=_MATRIX, keepdims=True) > 0
            return jnp.where(above, low, middle), jnp.where(above, middle, high), found

        first = jnp.sum(y, axis=_MATRIX, keepdims=True) / root
        width = around(y, -2) + around(y, -1)
        start = (-first - width, -first + width, y)
        # The last matrix is the result, in the middle of the last bracket.
        *_, found = jax.lax.fori_loop(0, self.bisections + 1, bisect, start)
        return found.astype(x.dtype)
