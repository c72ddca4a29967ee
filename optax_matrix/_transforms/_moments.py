"""How moments are kept: in a float dtype, or in 8 bits per entry.

In 8 bits a moment is cut into blocks of 32 entries with a scale each, a power of two,
as in the microscaling formats (Rouhani et al., 2023, `arXiv:2310.10537
<https://arxiv.org/abs/2310.10537>`_). A slow average changes by less than the distance
of two such numbers in a step, and would stop if it were rounded to the nearest. So it
is rounded stochastically: to one of its two neighbors, such that the mean is right.
"""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from optax_matrix import _linalg, _mesh

BLOCK = 32
# The largest numbers that are used.
EIGHT_BITS = {"int8": 127, "float8_e4m3fn": 448}
# Averages of squares need its range: updates are divided by their roots, and in int8
# all below 1/127 of the largest of a block would be the same.
OF_SQUARES = "float8_e4m3fn"


class Blocks(NamedTuple):
    """A moment in 8 bits per entry."""

    codes: jax.Array  # int8 or float8_e4m3fn, with the shape of the moment
    # bfloat16, one for 32 codes along one axis; NaN if one of these is not finite.
    scales: jax.Array


def is_blocks(node: Any) -> bool:
    """Returns whether a node of a state is a moment in 8 bits."""
    return isinstance(node, Blocks)


Moment: TypeAlias = jax.Array | Blocks


def zeros(like: Any, dtype: str | None) -> Moment:
    """Returns a moment of zeros.

    Args:
      like: An array of the same shape and sharding.
      dtype: That of the moment; None is that of statistics about `like`. An array none
        of whose axes can be cut into blocks keeps that of statistics, too.
    """
    wide = _linalg.at_least_float32(like.dtype)
    if dtype not in EIGHT_BITS:
        return jnp.zeros_like(like, dtype=dtype or wide)
    axis = _block_axis(like)
    if axis is None:
        return jnp.zeros_like(like, dtype=wide)
    codes = jnp.zeros_like(like, dtype=dtype)
    return Blocks(codes, jnp.max(_cut(codes, axis), axis + 1).astype(jnp.bfloat16))


def read(
    moment: Moment, dtype: DTypeLike | None = None, *, square: bool = False
) -> jax.Array:
    """Returns a moment as an array of a dtype, for arithmetic.

    Args:
      moment: The moment.
      dtype: The dtype of the array; None is that of statistics.
      square: Whether it is an average of squares, see `write`.
    """
    if not isinstance(moment, Blocks):
        return moment.astype(dtype or _linalg.at_least_float32(moment.dtype))
    dtype = dtype or jnp.float32
    axis = _cut_axis(moment)
    x = _cut(moment.codes.astype(dtype), axis)
    x = x * jnp.expand_dims(moment.scales.astype(dtype), axis + 1)
    x = x.reshape(moment.codes.shape)
    return jnp.square(x) if square else x


def write(
    new: jax.Array, like: Moment, count: jax.Array, *, square: bool = False
) -> Moment:
    """Returns a moment as it is kept.

    Args:
      new: The moment.
      like: The moment before, which has the dtype.
      count: The number of the update, which determines the rounding.
      square: Whether it is an average of squares. In 8 bits its root is kept, for its
        range, and what is not zero does not become zero, because updates are divided
        by it.
    """
    if not isinstance(like, Blocks):
        return new.astype(like.dtype)
    axis, dtype = _cut_axis(like), like.codes.dtype
    sizes = _cut(jnp.sqrt(new) if square else jnp.abs(new), axis)
    largest = jnp.max(sizes, axis + 1)
    top = EIGHT_BITS[dtype.name]
    part, exponent = jnp.frexp(largest / top)
    exponent = exponent - (part == 0.5)  # The largest number itself is used.
    # From 2**-100 on, the scale has an inverse in float32.
    scale = jnp.ldexp(jnp.ones_like(largest), jnp.maximum(exponent, -100))
    # A maximum need not be NaN if an entry is.
    finite = jnp.all(jnp.isfinite(sizes), axis + 1)
    scale = jnp.where(finite, scale, jnp.nan)
    y = (sizes / jnp.expand_dims(scale, axis + 1)).reshape(new.shape)
    low, step = _below(y, dtype.name)
    key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), count)
    chance = jax.random.uniform(key, new.shape, jnp.float32)
    share = (y - low) / step
    if square:  # The mean of the square is right, not that of the root.
        share = share * (y + low) / (2 * low + step)
    y = low + step * (chance < share)
    if square:
        y = jnp.where((new > 0) & (y == 0), step, y)
    else:
        y = jnp.copysign(y, new)
    y = jnp.clip(y, -top, top)  # If rounding makes the largest one larger.
    return Blocks(y.astype(dtype), scale.astype(jnp.bfloat16))


def _below(y: jax.Array, dtype: str) -> tuple[jax.Array, Any]:
    """Returns the largest number of a dtype up to y >= 0, and the step to the next."""
    if dtype == "int8":
        return jnp.floor(y), 1.0
    # e4m3: three bits after the first one, and no smaller exponent than -6.
    exponent = jnp.maximum(jnp.frexp(y)[1] - 1, -6)
    step = jnp.ldexp(jnp.ones_like(y), exponent - 3)
    return jnp.floor(y / step) * step, step


def _block_axis(x: Any) -> int | None:
    """Returns the last axis of which every device has whole blocks, by the type."""
    shape, sharding = x.shape, _mesh.sharding_of_type(x)
    if sharding is not None:
        shape = sharding.shard_shape(shape)
    axes = [axis for axis, size in enumerate(shape) if size and size % BLOCK == 0]
    return axes[-1] if axes else None


def _cut_axis(blocks: Blocks) -> int:
    pairs = zip(blocks.codes.shape, blocks.scales.shape, strict=True)
    return next(axis for axis, (size, count) in enumerate(pairs) if size != count)


def _cut(x: jax.Array, axis: int) -> jax.Array:
    shape = x.shape
    count = shape[axis] // BLOCK
    return x.reshape(*shape[:axis], count, BLOCK, *shape[axis + 1 :])
