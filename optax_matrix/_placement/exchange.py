"""Brings matrices together on their devices and takes them back, inside `shard_map`."""

import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from optax_matrix._placement.plan import Batch, Group, Kind, Lot


def bring(group: Group, units: Sequence[Sequence[Array]]) -> list[Array]:
    """Hands every device its matrices.

    Args:
      group: Whose matrices.
      units: For each lot and batch what this device holds of all of them, (count,
        *sizes).

    Returns:
      For each lot the matrices that are this device's, (slots, m, n).
    """
    w = group.devices
    packed = []
    for lot, held in zip(group.lots, units, strict=True):
        if lot.pieces > 1:
            shares = [
                _share(group, batch.unit, x)
                for batch, x in zip(lot.batches, held, strict=True)
            ]
            by_slot = _by_slot(jnp.concatenate(shares), lot.start, lot.slots(w), w)
            packed.append(jnp.swapaxes(by_slot, 0, 1))
    received = iter(_all_to_all(group, packed))
    placed = []
    for lot, held in zip(group.lots, units, strict=True):
        sent = next(received) if lot.pieces > 1 else None
        found = []
        for batch, x in zip(lot.batches, held, strict=True):
            first, last = _slots(batch, w)
            if sent is None:
                # Every device has all of it: no exchange.
                slots = _by_slot(x, batch.start - first * w, last - first, w)
                me = lax.axis_index(group.axes)
                own = lax.dynamic_index_in_dim(slots, me, axis=1, keepdims=False)
            else:
                own = _assembled(group, batch.unit, sent[:, first:last])
            flat = jnp.reshape(own, (-1, *batch.unit.shape))
            found.append(turned(flat, batch.kind, group.turned))
        placed.append(_merged(group, lot, found))
    return placed


def take_back(group: Group, matrices: Sequence[Array]) -> list[list[Array]]:
    """The inverse of `bring`: to every device all that it holds a piece of."""
    w = group.devices
    packed = []
    for lot, x in zip(group.lots, matrices, strict=True):
        found = []
        for batch in lot.batches:
            own = turned(x[slice(*_slots(batch, w))], batch.kind, group.turned)
            whole = jnp.reshape(own, (-1, *batch.unit.whole))
            if group.exchanged:
                # (slots, devices, entries), to be chosen among like all slots
                found.append(jnp.swapaxes(_for_all(group, batch.unit, whole), 0, 1))
            else:
                # What leaves every device is the same for all.
                found.append(jnp.reshape(whole, (whole.shape[0], 1, -1)))
        packed.append(jnp.swapaxes(_merged(group, lot, found), 0, 1))
    if group.exchanged:
        received = _all_to_all(group, packed)
    else:
        everything = lax.all_gather(_packed(packed), group.axes, tiled=True)
        received = _unpacked(everything, packed)
    results = []
    for lot, x in zip(group.lots, received, strict=True):
        in_order = jnp.reshape(jnp.swapaxes(x, 0, 1), (-1, lot.piece))
        results.append(
            [
                jnp.reshape(in_order[batch.start : batch.stop], (-1, *batch.unit.sizes))
                for batch in lot.batches
            ]
        )
    return results


def _slots(batch: Batch, devices: int) -> tuple[int, int]:
    """The slots that devices get a batch in, the last not included."""
    return batch.start // devices, -(-batch.stop // devices)


def _by_slot(x: Array, before: int, slots: int, devices: int) -> Array:
    """(count, ...) as (slots, devices, ...), with nothing in the places `before`."""
    after = slots * devices - before - x.shape[0]
    x = jnp.pad(x, [(before, after)] + [(0, 0)] * (x.ndim - 1))
    return jnp.reshape(x, (slots, devices, *x.shape[1:]))


def _merged(group: Group, lot: Lot, found: Sequence[Array]) -> Array:
    """One array over the slots of a lot from those of its batches, (slots, ...).

    Where one batch ends and the next begins, some devices have a matrix of the one and
    some of the other.
    """
    w = group.devices
    ranges = [_slots(batch, w) for batch in lot.batches]
    edges = sorted({0, lot.slots(w), *(edge for pair in ranges for edge in pair)})
    pieces = []
    for low, high in itertools.pairwise(edges):
        here = [
            (batch, x[low - first : high - first])
            for batch, x, (first, last) in zip(lot.batches, found, ranges, strict=True)
            if first <= low and high <= last
        ]
        (_, merged), *others = here
        for batch, x in others:
            # More than one only in a single slot: the next batch follows.
            theirs = low * w + lax.axis_index(group.axes) >= batch.start
            merged = jnp.where(theirs, x, merged)
        pieces.append(merged)
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)


def turned(x: Array, kind: Kind, turn: bool) -> Array:
    """Wide matrices from tall ones, and tall ones back from those, if `turn`."""
    return jnp.swapaxes(x, -2, -1) if turn and kind.tall else x


def _copied(group: Group, kind: Kind) -> tuple[str, ...]:
    """The mesh axes over which a kind is replicated."""
    sharded = {axis for axes in kind.over for axis in axes}
    return tuple(axis for axis in group.axes if axis not in sharded)


def _device_order(group: Group, kind: Kind) -> list[int]:
    """Positions of the mesh axes: those of copies, then those of each matrix axis."""
    order = [*_copied(group, kind), *(axis for axes in kind.over for axis in axes)]
    return [group.axes.index(axis) for axis in order]


def _share(group: Group, kind: Kind, x: Array) -> Array:
    """What this device sends of pieces that others hold too: (count, share).

    Devices that hold the same piece send equal shares of it.
    """
    count, size = x.shape[0], math.prod(kind.sizes)
    copies = group.devices // kind.pieces
    share = -(-size // copies)
    flat = jnp.reshape(x, (count, size))
    flat = jnp.pad(flat, [(0, 0), (0, share * copies - size)])
    if copies == 1:
        return flat
    mine = lax.axis_index(_copied(group, kind))
    grid = jnp.reshape(flat, (count, copies, share))
    return lax.dynamic_index_in_dim(grid, mine, axis=1, keepdims=False)


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
