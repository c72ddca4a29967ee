"""The exchanges with the owners of a group's matrices, inside `shard_map`."""

import jax.numpy as jnp
from jax import Array, lax

from optax_matrix._placement.groups import Group


def to_owners(group: Group, x: Array) -> Array:
    """Gives every device the matrices that it owns.

    Args:
      group: The group.
      x: This device's piece of every matrix, (count, *group.piece).

    Returns:
      The matrices of this device, (slots, inputs, outputs), padded with zeros.
    """
    grid = deal(group, x)
    slots = len(grid)
    grid = jnp.reshape(grid, (slots, *group.axis_sizes, *group.piece))
    for position, axis in enumerate(group.axes, start=1):
        # Devices that differ in this axis hold the same pieces, so each takes what it
        # needs without an exchange.
        if axis not in group.sharded_axes:
            grid = lax.dynamic_index_in_dim(grid, lax.axis_index(axis), position)
    if group.sharded_axes:
        sent = jnp.reshape(grid, (slots, group.pieces, *group.piece))
        grid = lax.all_to_all(sent, group.sharded_axes, 1, 1, tiled=True)
    grid = jnp.reshape(grid, (slots, *group.shards, *group.piece))
    return jnp.reshape(jnp.transpose(grid, _assembly(group)), (slots, *group.shape))


def from_owners(group: Group, x: Array, count: int) -> Array:
    """Gives every device its piece of every matrix: the inverse of `to_owners`.

    Args:
      group: The group.
      x: The matrices of this device, (slots, inputs, outputs).
      count: The number of matrices of all devices.

    Returns:
      This device's piece of every matrix, (count, *group.piece).
    """
    slots, owners = len(x), group.owners
    if not group.sharded_axes:
        grid = jnp.reshape(x, (slots, *group.piece))
        if group.axes:
            grid = lax.all_gather(grid, group.axes, axis=1)
        return _undeal(group, jnp.reshape(grid, (slots, owners, *group.piece)), count)
    assembly, sizes = _assembly(group), (slots, *group.shards, *group.piece)
    grid = jnp.reshape(x, tuple(sizes[i] for i in assembly))
    grid = jnp.moveaxis(grid, range(grid.ndim), assembly)
    grid = jnp.broadcast_to(grid, (slots, *group.axis_sizes, *group.piece))
    sent = jnp.reshape(grid, (slots, owners, *group.piece))
    return _undeal(group, lax.all_to_all(sent, group.axes, 1, 1, tiled=True), count)


def owns_last(group: Group) -> Array:
    """Returns whether this device owns a matrix in the last slot."""
    place = (lax.axis_index(group.axes) - group.first) % group.owners
    return place < group.count - group.full_slots * group.owners


def deal(group: Group, x: Array) -> Array:
    """Arranges (count, ...) as (slots, owners, ...), padded with zeros.

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


def _assembly(group: Group) -> tuple[int, ...]:
    """Returns the order of (slots, *group.shards, *group.piece) that makes matrices.

    Each axis of a piece comes right after the mesh axes that shard it; those that shard
    nothing come first.
    """
    owner_axes = group.axes
    order = [0]
    order += [
        1 + owner_axes.index(a) for a in owner_axes if a not in group.sharded_axes
    ]
    for i, axes in enumerate(group.over):
        order += [1 + owner_axes.index(axis) for axis in axes]
        order.append(1 + len(owner_axes) + i)
    return tuple(order)
