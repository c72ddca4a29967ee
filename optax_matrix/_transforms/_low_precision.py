"""Parameters of 16 bits that have a given norm in spite of their rounding."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from optax_matrix._layout import MatrixView
from optax_matrix._transforms import _numerics


def step_to_norm(
    view: MatrixView,
    param: jax.Array,
    target: jax.Array,
    norm: jax.Array,
    update_dtype: DTypeLike,
) -> jax.Array:
    """The update, in float32, whose application lands near `target` with norm `norm`.

    Rounding `target` to bfloat16 changes its norm by about 4e-5 for a 64 × 64 matrix,
    hundreds of times float32's rounding. So this looks at where
    ``optax.apply_updates`` will land, scales the target by what is missing, and then
    moves the smallest entries, by one unit in the last place each, until their share
    makes up the rest. What remains is the step of one such entry.
    """
    wide_param = _numerics.wide(param)

    def representable(update: jax.Array) -> jax.Array:
        return _round_to(update, update_dtype)

    def landing(update: jax.Array) -> jax.Array:
        return _round_to(wide_param + update, param.dtype)

    update = representable(target - wide_param)
    for _ in range(2):
        reached = _numerics.frobenius(view, landing(update))
        target = target * view.expand(_numerics.divide_or_zero(norm, reached))
        update = representable(target - wide_param)

    landed = landing(update)
    missing = jnp.square(norm) - view.sum(jnp.square(landed))
    bits = _magnitude_bits(landed, param.dtype)
    up = view.expand(missing) > 0
    moved_bits = jnp.where(up, bits + 1, jnp.maximum(bits, 1) - 1)
    moved = jnp.sign(landed) * _from_bits(moved_bits, param.dtype)
    moved_update = representable(moved - wide_param)
    # Entries that cannot be made to land on their neighbour stay.
    movable = landing(moved_update) == moved
    gain = jnp.where(movable, jnp.abs(jnp.square(moved) - jnp.square(landed)), 0)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        total = view.sum(jnp.where(bits < view.expand(middle), gain, 0))
        fits = total <= jnp.abs(missing)
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    low = jnp.zeros_like(missing, dtype=jnp.int32)
    high = jnp.full_like(low, 2**15)
    limit, _ = jax.lax.fori_loop(0, 15, halve, (low, high))
    return jnp.where(movable & (bits < view.expand(limit)), moved_update, update)


def _round_to(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`x` rounded to `dtype` but kept wide: a cast there and back may be elided."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def _magnitude_bits(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The bits of abs(x) in a 16-bit `dtype`: integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x).astype(dtype), jnp.uint16)
    return bits.astype(jnp.int32)


def _from_bits(bits: jax.Array, dtype: DTypeLike) -> jax.Array:
    half = jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), dtype)
    return half.astype(jnp.float32)
