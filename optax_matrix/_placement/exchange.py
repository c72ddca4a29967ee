"""The exchanges with the owners of a group's matrices, inside `shard_map`."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from optax_matrix._placement.groups import Group


def to_owners(group: Group, x: Array) -> Array:
    """Gives every device the matrices that it owns.

    Args:
      group: The group.
      x: What this device holds of every matrix, (count, *group.piece).

    Returns:
      The matrices of this device, (slots, inputs, outputs); zeros where it has fewer.
    """
    grid = _by_axis(group, deal(group, x))
    sharded = _sharded_axes(group)
    # Devices that differ in the other axes alone hold the same pieces, so each takes
    # what it needs without an exchange.
    for position, axis in reversed(list(enumerate(group.axes))):
        if axis not in sharded:
            index = lax.axis_index(axis)
            grid = lax.dynamic_index_in_dim(grid, index, 1 + position, keepdims=False)
    slots, piece = grid.shape[0], group.piece
    if sharded:
        sent = jnp.reshape(grid, (slots, group.pieces, *piece))
        grid = lax.all_to_all(sent, sharded, 1, 1, tiled=True)
    sizes = [group.size_of(axis) for axis in sharded]
    grid = jnp.reshape(grid, (slots, *sizes, *piece))
    return jnp.reshape(jnp.transpose(grid, _assembly(group)), (slots, *group.shape))


def from_owners(group: Group, x: Array, count: int) -> Array:
    """Gives every device its piece of every matrix: the inverse of `to_owners`.

    Args:
      group: The group.
      x: The matrices of this device, (slots, inputs, outputs).
      count: The number of matrices of all devices.

    Returns:
      What this device holds of every matrix, (count, *group.piece).
    """
    slots, sharded, assembly = x.shape[0], _sharded_axes(group), _assembly(group)
    if not sharded:
        grid = jnp.reshape(x, (slots, *group.piece))
        if group.axes:
            grid = lax.all_gather(grid, group.axes, axis=1)
        return _undeal(group, jnp.reshape(grid, (slots, -1, *group.piece)), count)
    cut = (slots, *[group.size_of(axis) for axis in sharded], *group.piece)
    grid = jnp.reshape(x, tuple(cut[i] for i in assembly))
    grid = jnp.transpose(grid, tuple(int(i) for i in np.argsort(assembly)))
    one = [group.size_of(a) if a in sharded else 1 for a in group.axes]
    grid = jnp.reshape(grid, (slots, *one, *group.piece))
    grid = jnp.broadcast_to(grid, (slots, *group.axis_sizes, *group.piece))
    sent = jnp.reshape(grid, (slots, group.owners, *group.piece))
    received = lax.all_to_all(sent, group.axes, 1, 1, tiled=True)
    return _undeal(group, received, count)


def owns_last(group: Group) -> Array:
    """Returns whether this device owns a matrix in the last slot."""
    place = (lax.axis_index(group.axes) - group.first) % group.owners
    return place < group.count - group.full_slots * group.owners


def deal(group: Group, x: Array) -> Array:
    """Deals (count, ...) to the owners, (slots, owners, ...), padded with zeros.

    Matrix i is in slot ``i // owners`` of owner ``(first + i) % owners``.
    """
    slots = -(-x.shape[0] // group.owners)
    missing = slots * group.owners - x.shape[0]
    x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    grid = jnp.reshape(x, (slots, group.owners, *x.shape[1:]))
    return jnp.roll(grid, group.first, axis=1) if group.first else grid


def _undeal(group: Group, grid: Array, count: int) -> Array:
    """Returns (count, ...) in the order of the matrices: the inverse of `deal`."""
    grid = jnp.roll(grid, -group.first, axis=1) if group.first else grid
    return jnp.reshape(grid, (-1, *grid.shape[2:]))[:count]


def _by_axis(group: Group, grid: Array) -> Array:
    """Returns (slots, owners, ...) with an axis for each mesh axis of the owners."""
    return jnp.reshape(grid, (grid.shape[0], *group.axis_sizes, *grid.shape[2:]))


def _sharded_axes(group: Group) -> tuple[str, ...]:
    """Returns the mesh axes that matrices are sharded over, in the mesh's order."""
    used = {axis for axes in group.over for axis in axes}
    return tuple(axis for axis in group.axes if axis in used)


def _assembly(group: Group) -> tuple[int, ...]:
    """Returns the order of (slots, *sharded mesh axes, *piece) that makes matrices.

    Each axis of a piece comes right after the mesh axes that shard it.
    """
    sharded = _sharded_axes(group)
    order = [0]
    for i, axes in enumerate(group.over):
        order += [1 + sharded.index(axis) for axis in axes]
        order.append(1 + len(sharded) + i)
    return tuple(order)


def exchange_count(group: Group) -> int:
    """Returns the number of exchanges of one round."""
    if group.owners == 1:
        return 0
    return 2 if group.pieces > 1 else 1


def exchanged_bytes(group: Group, itemsize: int) -> int:
    """Returns the bytes that one device receives in the exchanges of all rounds."""
    piece = math.prod(group.piece) * itemsize
    inward, outward = group.pieces - 1, group.owners - 1
    return group.slots * (inward + outward) * piece
