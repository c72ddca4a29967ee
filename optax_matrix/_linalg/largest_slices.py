"""Orthogonalizes the largest inputs or outputs of a matrix only."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from optax_matrix import _check
from optax_matrix._linalg.numerics import at_least_float32
from optax_matrix._linalg.polar import NewtonSchulz, PolarMethod, as_method

_FIVE_STEPS = NewtonSchulz(coefficients="polar_express5")


@dataclass(frozen=True)
class LargestSlices:
    """Orthogonalizes the largest slices of a matrix; all others become zero.

    The slices are the inputs or the outputs, whichever are fewer, and the outputs of a
    square matrix. The ``ceil(fraction * min(inputs, outputs))`` slices with the largest
    sums of absolute values make a smaller matrix, and its polar factor is put in their
    places. Equal sums are taken in order, and NaN counts as largest.

    Args:
      fraction: The share of the slices, in (0, 1]. 1 is ``method`` itself.
      method: How to orthogonalize the smaller matrix, as in `orthogonalize`; by default
        five steps of Polar Express, as in Dion2.

    Raises:
      ValueError: If ``fraction`` is not in (0, 1], or for an unknown method.
      TypeError: If ``fraction`` is not a Python number, or ``method`` is not a method.

    Example:
      >>> x = jnp.array([[4.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
      >>> print(jnp.abs(LargestSlices(0.5, "exact").polar(x)))
      [[1. 0.]
       [0. 0.]
       [0. 0.]]

    References:
      Ahn et al., 2025, Dion2, `arXiv:2512.16928 <https://arxiv.org/abs/2512.16928>`_.
    """

    # On a mesh it could be given a square matrix transposed, and select inputs.
    transposable: ClassVar[bool] = False
    fraction: float = 0.25
    method: str | PolarMethod = _FIVE_STEPS

    def __post_init__(self) -> None:
        """Checks the arguments and stores the method of a name."""
        _check.static_number("fraction", self.fraction)
        _check.in_range(
            "fraction", self.fraction, 0.0, 1.0, low_open=True, high_open=False
        )
        object.__setattr__(self, "method", as_method(self.method))

    def polar(self, x: Array) -> Array:
        """Orthogonalizes the largest slices of each matrix of (..., m, n)."""
        m, n = x.shape[-2:]
        count = self._count(m, n)
        axis, across = (-2, -1) if m < n else (-1, -2)
        sums = jnp.sum(jnp.abs(x), across, at_least_float32(x.dtype), keepdims=True)
        sums = jnp.where(jnp.isnan(sums), jnp.inf, sums)
        order = jnp.argsort(sums, axis, stable=True, descending=True)
        taken = jnp.argsort(order, axis) < count
        largest = jax.lax.slice_in_dim(order, 0, count, axis=axis % x.ndim)
        # In their order in the matrix, which matters to MUD.
        part = jnp.take_along_axis(x, jnp.sort(largest, axis), axis)
        polar = as_method(self.method).polar(part)
        # Back to their places, with zeros elsewhere.
        place = jnp.maximum(jnp.cumsum(taken, axis) - 1, 0)
        return jnp.where(taken, jnp.take_along_axis(polar, place, axis), 0)

    @property
    def flops(self) -> Callable[..., int]:
        """The FLOPs of the smaller matrix; missing if ``method`` has no formula."""
        method: Any = self.method
        inner = method.flops
        return lambda m, n, *rest: inner(max(m, n), self._count(m, n), *rest)

    def _count(self, m: int, n: int) -> int:
        return math.ceil(self.fraction * min(m, n))
