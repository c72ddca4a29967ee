"""Arithmetic that several transforms share: dtypes, averages, per-matrix norms."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_matrix import _linalg
from optax_matrix._layout import MatrixView


def wide(x: jax.Array) -> jax.Array:
    """`x` in the dtype of statistics: float32, or float64 if `x` is float64."""
    return x.astype(wide_dtype(x))


def wide_dtype(x: Any) -> Any:
    """The dtype of statistics about `x`."""
    return _linalg.at_least_float32(x.dtype)


def as_scalar(value: ArrayLike, like: jax.Array) -> jax.Array:
    """A hyperparameter in the dtype it is used in; it may be traced or float32."""
    return jnp.asarray(value, like.dtype)


def next_count(count: jax.Array) -> jax.Array:
    """The number of updates with this one, stopping at the largest int32."""
    return jnp.asarray(optax.safe_increment(count))


def moving_average(old: jax.Array, new: jax.Array, decay: ArrayLike) -> jax.Array:
    """`decay * old + (1 - decay) * new`."""
    decay = as_scalar(decay, new)
    return decay * old + (1 - decay) * new


def bias_correction(decay: ArrayLike, count: jax.Array, like: jax.Array) -> jax.Array:
    """`1 - decay**count`: the weight a zero-started average of `count` terms has."""
    return 1 - as_scalar(decay, like) ** count.astype(like.dtype)


def frobenius(view: MatrixView, x: jax.Array) -> jax.Array:
    """Frobenius norm of each matrix of `x`, in `view.sum`'s shape.

    Divides by each matrix's largest entry first: in float32 the squares of 1e-30 or
    1e30 would underflow or overflow.
    """
    largest = view.max(jnp.abs(x))
    unit = jnp.where(largest > 0, largest, 1)
    return unit * jnp.sqrt(view.sum(jnp.square(x / view.expand(unit))))


def divide_or_zero(x: jax.Array, by: jax.Array) -> jax.Array:
    """`x / by`, and 0 where `by` is 0."""
    return jnp.where(by == 0, 0, x / jnp.where(by == 0, 1, by))
