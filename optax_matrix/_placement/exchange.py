"""Brings matrices together on their devices and takes them back, inside `shard_map`."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from optax_matrix._placement.plan import Group, Kind


def bring(group: Group, units: Sequence[Array]) -> list[Array]:
    """From what a device holds of all, (count, *sizes), to its own, whole, by slot."""
    w = group.devices
    by_slot = []
    for batch, x in zip(group.batches, units, strict=True):
        slots = batch.slots(w)
        before, after = batch.first, slots * w - batch.first - batch.count
        x = jnp.pad(x, [(before, after)] + [(0, 0)] * (x.ndim - 1))
        by_slot.append(jnp.reshape(x, (slots, w, *x.shape[1:])))

    here, packed = {}, []
    for i, (batch, x) in enumerate(zip(group.batches, by_slot, strict=True)):
        if batch.kind.pieces == 1:
            # Every device has all of it: no exchange.
            me = lax.axis_index(group.axes)
            here[i] = lax.dynamic_index_in_dim(x, me, axis=1, keepdims=False)
        else:
            packed.append(jnp.swapaxes(_share(group, batch.unit, x), 0, 1))
    received = iter(_all_to_all(group, packed))
    return [
        here[i] if i in here else _assembled(group, batch.unit, next(received))
        for i, batch in enumerate(group.batches)
    ]


def _share(group: Group, kind: Kind, x: Array) -> Array:
    """What this device sends of pieces that others hold too: (slots, owners, share).

    Devices that hold the same piece send equal shares of it.
    """
    slots, w = x.shape[:2]
    size, copies = math.prod(kind.sizes), w // kind.pieces
    share = -(-size // copies)
    flat = jnp.reshape(x, (slots, w, size))
    flat = jnp.pad(flat, [(0, 0), (0, 0), (0, share * copies - size)])
    if copies == 1:
        return flat
    grid = jnp.reshape(flat, (slots, w, copies, share))
    mine = lax.axis_index(_copied(group, kind))
    return lax.dynamic_index_in_dim(grid, mine, axis=2, keepdims=False)


def _copied(group: Group, kind: Kind) -> tuple[str, ...]:
    """The mesh axes over which a kind is replicated."""
    sharded = {axis for axes in kind.over for axis in axes}
    return tuple(axis for axis in group.axes if axis not in sharded)


def _device_order(group: Group, kind: Kind) -> list[int]:
    """Positions of the mesh axes: those of copies, then those of each matrix axis."""
    order = [*_copied(group, kind), *(axis for axes in kind.over for axis in axes)]
    return [group.axes.index(axis) for axis in order]


def _assembled(group: Group, kind: Kind, x: Array) -> Array:
    """Whole units (slots, *axes) from shares (devices, slots, share)."""
    slots, share = x.shape[1:]
    size, copies = math.prod(kind.sizes), group.devices // kind.pieces
    grid = jnp.reshape(x, (*group.sizes, slots, share))
    order, k = _device_order(group, kind), len(group.sizes)
    grid = jnp.transpose(grid, (k, *order, k + 1))
    # (slots, copies, pieces, share) to (slots, pieces, copies, share)
    grid = jnp.reshape(grid, (slots, copies, kind.pieces, share))
    grid = jnp.reshape(jnp.swapaxes(grid, 1, 2), (slots, kind.pieces, copies * share))
    grid = jnp.reshape(grid[..., :size], (slots, *kind.shards, *kind.sizes))
    r = len(kind.sizes)
    between = [axis for i in range(r) for axis in (1 + i, 1 + r + i)]
    return jnp.reshape(jnp.transpose(grid, (0, *between)), (slots, *kind.whole))


def _in_pieces(kind: Kind, x: Array) -> Array:
    """Whole units (slots, *axes) as (slots, *shards, entries of a piece)."""
    slots, r = x.shape[0], len(kind.sizes)
    pairs = [i for pair in zip(kind.shards, kind.sizes, strict=True) for i in pair]
    grid = jnp.reshape(x, (slots, *pairs))
    order = (0, *range(1, 2 * r, 2), *range(2, 2 * r + 1, 2))
    grid = jnp.transpose(grid, order)
    return jnp.reshape(grid, (slots, *kind.shards, math.prod(kind.sizes)))


def take_back(group: Group, whole: Sequence[Array]) -> list[Array]:
    """The inverse of `bring`: to every device all that it holds a piece of."""
    if group.exchanged:
        packed = [
            _for_all(group, batch.unit, x)
            for batch, x in zip(group.batches, whole, strict=True)
        ]
        received = _all_to_all(group, packed)
    else:
        # What leaves every device is the same for all.
        packed = [jnp.reshape(x, (1, x.shape[0], -1)) for x in whole]
        received = _unpacked(
            lax.all_gather(_packed(packed), group.axes, tiled=True), packed
        )
    results = []
    for batch, x in zip(group.batches, received, strict=True):
        by_slot = jnp.swapaxes(x, 0, 1)  # (slots, owners, entries)
        units = jnp.reshape(by_slot, (-1, *batch.unit.sizes))
        end = batch.first + batch.count
        results.append(lax.slice_in_dim(units, batch.first, end))
    return results


def _for_all(group: Group, kind: Kind, x: Array) -> Array:
    """(slots, *axes) as what goes to each device, (devices, slots, entries)."""
    pieces = _in_pieces(kind, x)
    slots, size = pieces.shape[0], pieces.shape[-1]
    mesh = dict(zip(group.axes, group.sizes, strict=True))
    copied = _copied(group, kind)
    by_axis = [mesh[a] for axes in kind.over for a in axes]
    grid = jnp.reshape(pieces, (slots, *[1] * len(copied), *by_axis, size))
    shape = (slots, *[mesh[a] for a in copied], *by_axis, size)
    grid = jnp.broadcast_to(grid, shape)
    order = np.argsort(_device_order(group, kind))
    grid = jnp.transpose(grid, (*(int(i) + 1 for i in order), 0, grid.ndim - 1))
    return jnp.reshape(grid, (group.devices, slots, size))


def _packed(arrays: Sequence[Array]) -> Array:
    flat = [jnp.reshape(x, (x.shape[0], -1)) for x in arrays]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=1)


def _unpacked(flat: Array, like: Sequence[Array]) -> list[Array]:
    ends = np.cumsum([math.prod(x.shape[1:]) for x in like])
    parts = jnp.split(flat, ends[:-1], axis=1)
    return [
        jnp.reshape(part, (-1, *x.shape[1:]))
        for part, x in zip(parts, like, strict=True)
    ]


def _all_to_all(group: Group, arrays: Sequence[Array]) -> list[Array]:
    """One exchange of arrays (devices, ...): row i goes to device i."""
    if not arrays:
        return []
    flat = lax.all_to_all(_packed(arrays), group.axes, 0, 0, tiled=True)
    return _unpacked(flat, arrays)
