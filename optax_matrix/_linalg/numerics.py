"""What the polar methods share: dtypes, orientation and a safe scale."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from optax_matrix import _check

Precision = None | jax.lax.Precision | jax.lax.DotAlgorithmPreset

# What Cholesky factorizations and triangular solves take.
FACTORIZABLE = ("float32", "float64")
_MATRIX = (-2, -1)


def as_dtype(value: DTypeLike | None, allowed: tuple[str, ...]) -> np.dtype | None:
    """Returns a compute dtype as a hashable `numpy.dtype`, or None for None.

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
    """Returns a matmul precision in hashable form, or None for None.

    Args:
      value: None, a `jax.lax.Precision` or its name, or a `jax.lax.DotAlgorithmPreset`.

    Raises:
      ValueError: If `value` is none of these.
    """
    if value is None or isinstance(value, jax.lax.DotAlgorithmPreset):
        return value
    if isinstance(value, str | jax.lax.Precision):  # numbers would be converted too
        with contextlib.suppress(ValueError):
            return jax.lax.Precision(value)
    names = [precision.name.lower() for precision in jax.lax.Precision]
    raise ValueError(
        f"`precision` must be None, one of {', '.join(map(repr, names))}, or a "
        f"`jax.lax.DotAlgorithmPreset`, got {value!r}."
    )


def store_types(
    method: Any,
    dtype: DTypeLike | None,
    precision: Precision | str,
    allowed: tuple[str, ...],
) -> None:
    """Stores dtype and precision in a hashable form on a frozen dataclass."""
    found = as_dtype(dtype, allowed)
    # By name, because NumPy takes None for float64: `np.dtype("float64") == None`.
    object.__setattr__(method, "dtype", None if found is None else found.name)
    object.__setattr__(method, "precision", as_precision(precision))


def rounding(dtype: DTypeLike, precision: Precision, backend: str | None) -> float:
    """Returns the relative rounding of the operands of one matmul.

    At default precision only the CPU multiplies float32 as float32: GPUs use TF32 and
    TPUs bfloat16. Where the precision is not known, the coarser one is assumed.

    Args:
      dtype: The dtype of the operands.
      precision: The precision of the matmul.
      backend: ``"cpu"``, ``"gpu"`` or ``"tpu"``; None is the default backend of JAX.
    """
    backend = backend or jax.default_backend()
    own = float(jnp.finfo(dtype).eps)
    # The configured default has more names than `jax.lax.Precision`.
    default = getattr(jax.config, "jax_default_matmul_precision", None) or "default"
    name = str(default if precision is None else precision.name).lower()
    algorithm = name.endswith(("f16", "f32", "f64")) or "_f32_x" in name
    if "highest" in name or name.startswith(("float32", "f32_", "f64_")):
        return own
    if backend == "cpu" and not algorithm:
        return own
    if "tf32" in name or name in ("high", "tensorfloat32", "bfloat16_3x"):
        return max(own, float(jnp.finfo(jnp.float16).eps))
    if name == "default" and backend == "gpu":
        return max(own, float(jnp.finfo(jnp.float16).eps))
    return max(own, float(jnp.finfo(jnp.bfloat16).eps))


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
    """Returns float64 for float64 and float32 otherwise, under any promotion rule."""
    return jnp.dtype("float64" if jnp.dtype(dtype) == "float64" else "float32")


def compute_dtype(x: Array, dtype: np.dtype | None) -> np.dtype:
    """Returns `dtype`; if None, float64 for float64 input and float32 otherwise."""
    if dtype is not None:
        return dtype
    return at_least_float32(x.dtype)


def is_tall(x: Array) -> bool:
    """Returns whether the last axis is the smaller one, which is the Gram side."""
    return x.shape[-2] > x.shape[-1]


def transpose(x: Array) -> Array:
    """Swaps the two matrix axes."""
    return jnp.swapaxes(x, -2, -1)


def gram(x: Array, precision: Precision) -> Array:
    """Returns XXᵀ of each matrix."""
    return jnp.matmul(x, transpose(x), precision=precision)


def eye_like(x: Array) -> Array:
    """Returns the identity in the shape and type of square matrices."""
    return jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)


def frobenius(x: Array) -> Array:
    """Returns the Frobenius norm of each matrix, (..., 1, 1), and 1 where it is zero.

    The root has a guard of its own, so that the gradient at a zero matrix is 0, not
    NaN.
    """
    square = jnp.sum(jnp.square(x), axis=_MATRIX, keepdims=True)
    zero = square == 0
    return jnp.where(zero, 1.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def unit_peak(x: Array) -> Array:
    """Scales each matrix to a largest entry of about 1, so that squares are safe.

    In float32 everything computed from the result is the same for inputs from 1e-30
    to 1e30.

    Args:
      x: (..., m, n).

    Returns:
      (..., m, n) in float32, or float64 for float64. A matrix whose largest entry is
      zero, or below the smallest normal number (which accelerators and XLA on CPU flush
      to zero), comes out zero; one with a NaN or Inf comes out all NaN.
    """
    x = x.astype(at_least_float32(x.dtype))
    # The next scale cancels this one, so no gradient needs to pass through it.
    peak = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=_MATRIX, keepdims=True))
    zero = peak < jnp.finfo(x.dtype).tiny
    # In two halves: XLA may multiply by a reciprocal, and that of 1e38 is flushed to 0.
    root = jnp.sqrt(jnp.where(zero, 1.0, peak))
    return jnp.where(zero, 0.0, x) / root / root


def unit_frobenius(x: Array) -> Array:
    """Scales each matrix to Frobenius norm 1, from any magnitude; see `unit_peak`."""
    y = unit_peak(x)
    return y / frobenius(y)


def inverse_root(square: Array) -> Array:
    """Returns 1/√square, and 0 where `square` is 0.

    The root has a guard of its own, so that the gradient at a zero matrix is 0, not
    NaN.
    """
    zero = square == 0
    return jnp.where(zero, 0.0, 1.0 / jnp.sqrt(jnp.where(zero, 1.0, square)))
