"""Brings matrices together on their devices and takes them back, inside `shard_map`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from optax_matrix import _linalg
from optax_matrix._layout import MatrixView
from optax_matrix._placement.plan import Batch, Group, Kind, Plan, Source
from optax_matrix._placement.stacks import over_matrices

Polar = Callable[..., Array]


def run(plan: Plan, polar: Polar, leaves: Sequence[Array]) -> tuple[Array, ...]:
    """`polar` on every matrix of the leaves, each on its device, and back."""
    if plan.mesh is None:
        return _on_device(plan, polar, *leaves)
    return jax.shard_map(
        lambda *local: _on_device(plan, polar, *local),
        mesh=plan.mesh,
        in_specs=plan.specs,
        out_specs=plan.specs,
        # It cannot see that what all devices send to all is the same everywhere.
        check_vma=False,
    )(*leaves)


def _on_device(plan: Plan, polar: Polar, *leaves: Array) -> tuple[Array, ...]:
    stacks = [
        view.to_stacks(leaf) for view, leaf in zip(plan.views, leaves, strict=True)
    ]
    found: dict[tuple[int, int], list[tuple[int, Array]]] = {}
    for group in plan.groups:
        for source, result in _on_group(group, polar, stacks):
            found.setdefault((source.leaf, source.stack), []).append(
                (source.start, result)
            )

    def stack(i: int, j: int) -> Array:
        ranges = [result for _, result in sorted(found[i, j], key=lambda r: r[0])]
        whole = ranges[0] if len(ranges) == 1 else jnp.concatenate(ranges)
        return jnp.reshape(whole, stacks[i][j].shape)

    return tuple(
        view.from_stacks([stack(i, j) for j in range(len(view.matrices))])
        for i, view in enumerate(plan.views)
    )


def _on_group(
    group: Group, polar: Polar, stacks: Sequence[Sequence[Array]]
) -> list[tuple[Source, Array]]:
    """The results for each range of matrices of a group."""

    def taken(source: Source, kind: Kind) -> Array:
        stack = stacks[source.leaf][source.stack]
        part = stack[source.start : source.stop]
        return jnp.reshape(part, (source.stop - source.start, *kind.sizes))

    pairs = [(batch, source) for batch in group.batches for source in batch.sources]
    if group.devices == 1:
        # A loop takes tall matrices as they are; a stack is of one shape.
        turn = group.turned and group.stack_size > 1
        whole = [
            _turned(_flat(taken(source, batch.kind), batch.kind), batch.kind, turn)
            for batch, source in pairs
        ]
        fn = _on_matrices(group.batches[0].kind, polar)
        done = over_matrices(fn, whole, group.stack_size)
        return [
            (source, jnp.reshape(_turned(x, batch.kind, turn), (-1, *batch.kind.sizes)))
            for (batch, source), x in zip(pairs, done, strict=True)
        ]

    cut = []
    for batch in group.batches:
        units = jnp.concatenate([taken(s, batch.kind) for s in batch.sources])
        cut.append(_in_parts(units, batch))
    placed = _bring(group, cut)
    for parts, batches in group.by_parts().items():
        where = [i for i, batch in enumerate(group.batches) if batch in batches]
        work = _worker(group, parts, batches, polar)
        for i, result in zip(where, work([placed[i] for i in where]), strict=True):
            placed[i] = result
    results = []
    for batch, units in zip(group.batches, _return(group, placed), strict=True):
        whole, start = _whole(units, batch), 0
        for source in batch.sources:
            stop = start + source.stop - source.start
            results.append((source, whole[start:stop]))
            start = stop
    return results


# ------------------------------------------------------------------ on one device


def _flat(units: Array, kind: Kind) -> Array:
    """Units (count, *axes) that are whole as matrices (count, m, n)."""
    return jnp.reshape(units, (units.shape[0], *kind.shape))


def _turned(x: Array, kind: Kind, turn: bool = True) -> Array:
    """Wide matrices from tall ones, and tall ones back from those."""
    m, n = kind.shape
    return jnp.swapaxes(x, -2, -1) if turn and m > n else x


def _on_matrices(kind: Kind, polar: Polar) -> Polar:
    """`polar` on each block of matrices (m, n) or (count, m, n)."""
    if kind.blocks == 1:
        return polar

    def by_block(x: Array) -> Array:
        stack = x[None] if x.ndim == 2 else x
        view = MatrixView(
            shape=stack.shape,
            batch=(0,),
            inputs=(1,),
            outputs=(2,),
            input_widths=kind.input_widths,
            output_widths=kind.output_widths,
        )
        return jnp.reshape(view.apply(polar, stack), x.shape)

    return by_block


def _worker(
    group: Group, parts: int, batches: Sequence[Batch], polar: Polar
) -> Callable[[Sequence[Array]], list[Array]]:
    """What maps the slots of a device to results: pooled, empty ones left out."""
    table = group.table(batches)
    kinds = [batch.kind for batch in batches]
    if parts > 1:
        polar = _partwise(group, parts, polar)
        kinds = [kind.in_parts(parts)[0] for kind in kinds]

    def work(slots: Sequence[Array]) -> list[Array]:
        flat = [
            _turned(_flat(x, kind), batch.kind, group.turned)
            for x, kind, batch in zip(slots, kinds, batches, strict=True)
        ]
        ends = np.cumsum([x.shape[0] for x in flat])
        pool = jnp.concatenate(flat)
        fn = _on_matrices(kinds[0], polar)
        if table is None:
            (done,) = over_matrices(fn, [pool], group.stack_size)
        else:
            mine = jnp.asarray(table)[lax.axis_index(group.axes)]
            real = jnp.take(pool, mine, axis=0)
            (done,) = over_matrices(fn, [real], group.stack_size)
            done = jnp.zeros_like(pool).at[mine].set(done)
        return [
            jnp.reshape(_turned(x, batch.kind, group.turned), (-1, *_whole_sizes(kind)))
            for x, kind, batch in zip(
                jnp.split(done, ends[:-1]), kinds, batches, strict=True
            )
        ]

    return work


def _partwise(group: Group, parts: int, polar: Polar) -> Polar:
    """`polar` on one part a device, neighbours having the other parts of a matrix."""
    among = [list(range(i, i + parts)) for i in range(0, group.devices, parts)]
    reduction: dict[str, Any] = {"axis_index_groups": among}

    def fn(x: Array) -> Array:
        return polar(
            x,
            parts=_linalg.Parts(
                parts,
                lambda r: lax.psum(r, group.axes, **reduction),
                lambda r: lax.pmax(r, group.axes, **reduction),
            ),
        )

    return fn


# ------------------------------------------------------------------------- parts


def _in_parts(units: Array, batch: Batch) -> Array:
    """Every matrix's parts after one another, cut across what this device holds."""
    if batch.parts == 1:
        return units
    part, axis = batch.kind.in_parts(batch.parts)
    size, axis = part.sizes[axis], axis + 1
    missing = size * batch.parts - units.shape[axis]
    padding = [(0, missing if i == axis else 0) for i in range(units.ndim)]
    units = jnp.pad(units, padding)
    shape = units.shape
    grid = jnp.reshape(units, (*shape[:axis], batch.parts, size, *shape[axis + 1 :]))
    grid = jnp.moveaxis(grid, axis, 1)
    return jnp.reshape(grid, (-1, *part.sizes))


def _whole(units: Array, batch: Batch) -> Array:
    """The inverse of `_in_parts`."""
    if batch.parts == 1:
        return units
    part, axis = batch.kind.in_parts(batch.parts)
    grid = jnp.reshape(units, (-1, batch.parts, *part.sizes))
    grid = jnp.moveaxis(grid, 1, axis + 1)
    shape = grid.shape
    merged = (*shape[: axis + 1], -1, *shape[axis + 3 :])
    whole = jnp.reshape(grid, merged)
    return lax.slice_in_dim(whole, 0, batch.kind.sizes[axis], axis=axis + 1)


# --------------------------------------------------------------------- exchanges


def _unit(batch: Batch) -> Kind:
    """What is handed out: matrices of a batch, or parts of them."""
    return batch.kind.in_parts(batch.parts)[0] if batch.parts > 1 else batch.kind


def _whole_sizes(kind: Kind) -> tuple[int, ...]:
    return tuple(s * k for s, k in zip(kind.sizes, kind.shards, strict=True))


def _bring(group: Group, units: Sequence[Array]) -> list[Array]:
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
            packed.append(jnp.swapaxes(_share(group, _unit(batch), x), 0, 1))
    received = iter(_all_to_all(group, packed))
    return [
        here[i] if i in here else _assembled(group, _unit(batch), next(received))
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
    return jnp.reshape(jnp.transpose(grid, (0, *between)), (slots, *_whole_sizes(kind)))


def _in_pieces(kind: Kind, x: Array) -> Array:
    """Whole units (slots, *axes) as (slots, *shards, entries of a piece)."""
    slots, r = x.shape[0], len(kind.sizes)
    pairs = [i for pair in zip(kind.shards, kind.sizes, strict=True) for i in pair]
    grid = jnp.reshape(x, (slots, *pairs))
    order = (0, *range(1, 2 * r, 2), *range(2, 2 * r + 1, 2))
    grid = jnp.transpose(grid, order)
    return jnp.reshape(grid, (slots, *kind.shards, math.prod(kind.sizes)))


def _return(group: Group, whole: Sequence[Array]) -> list[Array]:
    """The inverse of `_bring`: to every device all that it holds a piece of."""
    if group.exchanged:
        packed = [
            _for_all(group, _unit(batch), x)
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
        units = jnp.reshape(by_slot, (-1, *_unit(batch).sizes))
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
