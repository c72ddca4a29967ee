"""How one device goes through its matrices: in a loop, or as stacks."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Matrices of one array that a loop is unrolled over; more compile too long.
UNROLLED = 16


def over_matrices(
    fn: Callable[[Array], Array], arrays: Sequence[Array], stack_size: int
) -> list[Array]:
    """`fn` on the matrices of arrays (count, m, n), all of one shape.

    Args:
      fn: Maps (m, n), and with ``stack_size`` above 1 (count, m, n), to the same shape.
      arrays: The matrices; an array is gone through by itself if `stack_size` is 1.
      stack_size: How many matrices one call takes; 1 is a loop.

    Returns:
      One array of results for each of `arrays`.
    """
    if stack_size == 1:
        once = jax.jit(fn)  # traced for the first matrix, and not for every one
        return [_looped(once, x) for x in arrays]
    whole = arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)
    count = whole.shape[0]
    if count <= stack_size:
        done = fn(whole)
    else:
        even = count // stack_size * stack_size
        grid = jnp.reshape(whole[:even], (-1, stack_size, *whole.shape[1:]))
        done = jnp.reshape(jax.lax.map(fn, grid), whole[:even].shape)
        if even < count:
            done = jnp.concatenate([done, fn(whole[even:])])
    ends = np.cumsum([x.shape[0] for x in arrays])
    return jnp.split(done, ends[:-1])


def over_units(
    fn: Callable[..., Any],
    trees: Sequence[Any],
    stack_size: int,
    unrolled: int = UNROLLED,
) -> Any:
    """`fn` on what trees have for each matrix, their leaves all (count, ...).

    Args:
      fn: Takes a tree for each of `trees`, without the leading axis.
      trees: What to go through.
      stack_size: How many matrices are worked on at once; 1 is a loop.
      unrolled: The longest loop to unroll.

    Returns:
      The results, again with a leading axis.
    """
    count = jax.tree.leaves(trees)[0].shape[0]
    if stack_size > 1:
        return jax.lax.map(lambda xs: fn(*xs), tuple(trees), batch_size=stack_size)
    if count > unrolled:
        return jax.lax.map(lambda xs: fn(*xs), tuple(trees))
    units = [jax.tree.map(lambda x, i=i: x[i], tuple(trees)) for i in range(count)]
    once = jax.jit(fn)
    done = [once(*unit) for unit in units]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *done)


def _looped(fn: Callable[[Array], Array], x: Array) -> Array:
    count = x.shape[0]
    if count > UNROLLED:
        return jax.lax.map(fn, x)
    done = [fn(jnp.squeeze(x, 0) if count == 1 else x[i]) for i in range(count)]
    return done[0][None] if count == 1 else jnp.stack(done)
