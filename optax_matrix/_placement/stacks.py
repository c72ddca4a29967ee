"""How one device works on its matrices: in a loop, or in stacks."""

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_matrix._placement.placement import Leaf

# The entries of a stack that an accelerator multiplies in one batched product. Beyond
# this a product fills the device anyway, and the temporaries of a stack cost memory.
STACK_ENTRIES = 2**26
# The longest loop over the matrices of one array that is unrolled: longer ones take too
# long to compile.
UNROLLED = 16


def stack_size(m: int, n: int, backend: str | None = None) -> int:
    """Returns how many m×n matrices one device multiplies in one batched product.

    1 on CPU, where a batched product runs one matrix after another and gains nothing
    over a loop, while stacking copies; `STACK_ENTRIES` entries elsewhere.
    """
    if (backend or jax.default_backend()) == "cpu":
        return 1
    return max(1, STACK_ENTRIES // (m * n))


def map_stacks(
    fn: Callable[[Array], Array], arrays: Sequence[Array], size: int
) -> list[Array]:
    """Applies `fn` to all matrices of several arrays of one matrix shape.

    Args:
      fn: Maps (m, n), and with a `size` above 1 (count, m, n), to the same shape.
      arrays: The matrices, (count, m, n) each.
      size: How many matrices one call takes; 1 loops over each array separately.

    Returns:
      The results, one array for each of `arrays`.
    """
    if size == 1:
        once = jax.jit(fn)  # so that only the first matrix is traced
        return [_looped(once, x) for x in arrays]
    whole = concatenated(arrays)
    count = whole.shape[0]
    if count <= size:
        done = fn(whole)
    else:
        even = count // size * size
        grid = jnp.reshape(whole[:even], (-1, size, *whole.shape[1:]))
        done = jnp.reshape(jax.lax.map(fn, grid), whole[:even].shape)
        if even < count:
            done = jnp.concatenate([done, fn(whole[even:])])
    return split_like(done, arrays)


def map_stack(fn: Callable[..., Any], trees: Sequence[Any], size: int) -> Any:
    """Applies `fn` to what trees hold of each matrix; all leaves are (count, ...).

    Args:
      fn: Takes a tree for each of `trees`, without the leading axis.
      trees: What to map over.
      size: How many matrices are worked on at once; 1 is a loop.

    Returns:
      The results, with the leading axis.
    """
    count = jax.tree.leaves(trees)[0].shape[0]
    if size > 1:
        return jax.lax.map(lambda xs: fn(*xs), tuple(trees), batch_size=size)
    if count > UNROLLED:
        return jax.lax.map(lambda xs: fn(*xs), tuple(trees))
    units = [jax.tree.map(lambda x, i=i: x[i], tuple(trees)) for i in range(count)]
    once = jax.jit(fn)
    return jax.tree.map(lambda *xs: jnp.stack(xs), *[once(*unit) for unit in units])


def _looped(fn: Callable[[Array], Array], x: Array) -> Array:
    count = x.shape[0]
    if count > UNROLLED:
        return jax.lax.map(fn, x)
    done = [fn(jnp.squeeze(x, 0) if count == 1 else x[i]) for i in range(count)]
    return done[0][None] if count == 1 else jnp.stack(done)


def concatenated(arrays: Sequence[Array]) -> Array:
    """Returns arrays joined along their first axis."""
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


def split_like(x: Array, arrays: Sequence[Array]) -> list[Array]:
    """Splits `x` into arrays as long as `arrays`: the inverse of `concatenated`."""
    return jnp.split(x, np.cumsum([len(a) for a in arrays])[:-1])


class Stack(NamedTuple):
    """The matrices of one shape and dtype in a tree, without a mesh.

    Attributes:
      name: The name of their state.
      members: For each stack of a leaf, the leaf and the stack, as positions, and
        whether it is transposed.
    """

    name: str
    members: list[tuple[int, int, bool]]


def by_shape(leaves: Sequence[Leaf], transposable: bool) -> list[Stack]:
    """Finds the matrices that can be stacked, in the order of the leaves."""
    found: dict[tuple[int, int, str], list[tuple[int, int, bool]]] = {}
    for i, leaf in enumerate(leaves):
        for j, (_, m, n) in enumerate(leaf.view.matrices):
            turn = transposable and m > n
            shape = (n, m) if turn else (m, n)
            key = (*shape, leaf.value.dtype.name)
            found.setdefault(key, []).append((i, j, turn))
    names = stack_names(key[:2] for key in found)
    return [Stack(*pair) for pair in zip(names, found.values(), strict=True)]


def stack_names(shapes: Iterable[tuple[int, int]]) -> list[str]:
    """Names stacks by shape, as in ``8x16``; the next one of a shape is ``8x16.2``."""
    names, seen = [], collections.Counter()
    for m, n in shapes:
        seen[m, n] += 1
        more = f".{seen[m, n]}" if seen[m, n] > 1 else ""
        names.append(f"{m}x{n}{more}")
    return names


def matrix_counts(leaves: Sequence[Leaf]) -> dict[tuple[int, int], int]:
    """Returns the number of matrices by shape, over all leaves and all devices."""
    counts: collections.Counter[tuple[int, int]] = collections.Counter()
    for leaf in leaves:
        for count, m, n in leaf.view.matrices:
            counts[m, n] += count
    return counts


def first_numbers(leaves: Sequence[Leaf]) -> dict[tuple[int, tuple[int, int]], int]:
    """Returns, by leaf and shape, the number of the leaf's first matrix of the shape.

    All matrices of a shape are numbered in the order of the leaves, whatever mesh they
    lie on.
    """
    numbers, counts = {}, collections.Counter()
    for i, leaf in enumerate(leaves):
        for count, m, n in leaf.view.matrices:
            numbers[i, (m, n)] = counts[m, n]
            counts[m, n] += count
    return numbers
