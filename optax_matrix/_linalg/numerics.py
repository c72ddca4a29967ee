"""What every polar method does first: types, orientation and a safe scale."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from optax_matrix import _check

Precision = None | jax.lax.Precision | jax.lax.DotAlgorithmPreset

_MATRIX = (-2, -1)


def as_dtype(value: DTypeLike | None, allowed: tuple[str, ...]) -> np.dtype | None:
    """Returns a compute dtype as a hashable `numpy.dtype`; None passes.

    Args:
      value: Anything NumPy reads as a dtype, or None.
      allowed: Names of the dtypes the caller can compute in.

    Raises:
      ValueError: If `value` is not one of `allowed`.
    """
    if value is None:
        return None
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        _check.one_of("dtype", value, allowed)
        raise
    _check.one_of("dtype", dtype.name, allowed)
    return dtype


def as_precision(value: Any) -> Precision:
    """Returns a matmul precision in hashable form; None passes.

    Args:
      value: None, a `jax.lax.Precision` or its name, or a `jax.lax.DotAlgorithmPreset`.

    Raises:
      ValueError: If `value` is none of these.
    """
    if value is None or isinstance(value, jax.lax.DotAlgorithmPreset):
        return value
    try:
        return jax.lax.Precision(value)
    except ValueError:
        names = [precision.name.lower() for precision in jax.lax.Precision]
        raise ValueError(
            f"`precision` must be None, one of {', '.join(map(repr, names))}, or a "
            f"`jax.lax.DotAlgorithmPreset`, got {value!r}."
        ) from None


def check_matrix(x: Array) -> None:
    """Raises unless `x` is a real floating (..., m, n).

    Raises:
      ValueError: If `x` has fewer than two axes.
      TypeError: If `x` is not real and floating.
    """
    if x.ndim < 2:
        raise ValueError(
            f"A polar factor needs at least 2 axes (..., m, n), got shape {x.shape}."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"A polar factor needs a real floating array, got dtype {x.dtype}. Cast it "
            "first."
        )


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """Returns float64 for float64 and else float32, under any promotion rule."""
    return jnp.dtype("float64" if jnp.dtype(dtype) == "float64" else "float32")


def compute_dtype(x: Array, dtype: np.dtype | None) -> np.dtype:
    """Returns `dtype`, or by default float64 for float64 input and float32 for all."""
    if dtype is not None:
        return dtype
    return at_least_float32(x.dtype)


def is_tall(x: Array) -> bool:
    """Whether the last axis is the smaller one, so that it is the Gram side."""
    return x.shape[-2] > x.shape[-1]


def transpose(x: Array) -> Array:
    """Swaps the two matrix axes."""
    return jnp.swapaxes(x, -2, -1)


def frobenius(x: Array) -> Array:
    """Returns each matrix's Frobenius norm, (..., 1, 1), 1 where it is zero.

    Twice guarded, so that the gradient at a zero matrix is 0 and not NaN.
    """
    square = jnp.sum(jnp.square(x), axis=_MATRIX, keepdims=True)
    zero = square == 0
    return jnp.where(zero, 1.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def unit_frobenius(x: Array, dtype: np.dtype) -> Array:
    """Scales each matrix to Frobenius norm 1, whatever its magnitude.

    Dividing by the largest entry first keeps the squares from under- and overflowing:
    in float32 the result is the same for inputs from 1e-30 to 1e30.

    Args:
      x: (..., m, n).
      dtype: Type of the result. The norm is computed in float32 at least, since a half
        type would lose the scale of `x` if it were cast first.

    Returns:
      (..., m, n) of `dtype`. A matrix whose largest entry is zero, or below the
      smallest normal number (which accelerators and XLA on CPU flush to zero), comes
      out zero; one with a NaN or Inf comes out all NaN.
    """
    x = x.astype(at_least_float32(x.dtype))
    # Nothing depends on this scale, as the next one cancels it: no gradient through it.
    peak = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=_MATRIX, keepdims=True))
    zero = peak < jnp.finfo(x.dtype).tiny
    # In two halves: XLA may multiply by a reciprocal, and that of 1e38 is flushed to 0.
    root = jnp.sqrt(jnp.where(zero, 1.0, peak))
    x = jnp.where(zero, 0.0, x) / root / root
    return (x / frobenius(x)).astype(dtype)
