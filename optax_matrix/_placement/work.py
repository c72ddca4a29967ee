"""Carries out a plan: what each device does with its matrices, and with parts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from optax_matrix import _linalg
from optax_matrix._layout import MatrixView
from optax_matrix._placement import exchange
from optax_matrix._placement.plan import Batch, Group, Kind, Lot, Plan, Source
from optax_matrix._placement.stacks import over_matrices

Polar = Callable[..., Array]


class Work(Protocol):
    """What a device does with the matrices of a group that are its own."""

    def __call__(
        self, group: Group, kind: Kind, arrays: Sequence[Array], parts: int
    ) -> list[Array]:
        """Returns results like `arrays`, (count, m, n), of matrices or their parts."""
        ...


def polar_work(polar: Polar) -> Work:
    """The polar factor of each block of each matrix."""

    def work(
        group: Group, kind: Kind, arrays: Sequence[Array], parts: int
    ) -> list[Array]:
        fn = partial(polar, parts=sharing(group, parts)) if parts > 1 else polar
        return over_matrices(_on_matrices(kind, fn), arrays, group.stack_size)

    return work


def run(plan: Plan, work: Work, leaves: Sequence[Array]) -> tuple[Array, ...]:
    """`work` on every matrix of the leaves, each on its device, and back."""
    if plan.mesh is None:
        return on_device(plan, work, leaves)
    return jax.shard_map(
        lambda *local: on_device(plan, work, local),
        mesh=plan.mesh,
        in_specs=plan.specs,
        out_specs=plan.specs,
        # It cannot see that what all devices send to all is the same everywhere.
        check_vma=False,
    )(*leaves)


def on_device(
    plan: Plan, work: Work, leaves: Sequence[Array], joined: bool = False
) -> tuple[Array, ...]:
    """What each device does, given what it holds of the leaves.

    Args:
      plan: What is where.
      work: What is done to matrices.
      leaves: What it holds.
      joined: Whether the work takes whole matrices, to share them among their parts.
    """
    stacks = [
        view.to_stacks(leaf) for view, leaf in zip(plan.views, leaves, strict=True)
    ]
    found: dict[tuple[int, int], list[tuple[int, Array]]] = {}
    for group in plan.groups:
        for source, result in _on_group(group, work, stacks, joined):
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
    group: Group, work: Work, stacks: Sequence[Sequence[Array]], joined: bool
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
        whole = []
        for batch, source in pairs:
            flat = jnp.reshape(taken(source, batch.kind), (-1, *batch.kind.shape))
            whole.append(exchange.turned(flat, batch.kind, turn))
        done = work(group, group.batches[0].kind, whole, 1)
        results = []
        for (batch, source), x in zip(pairs, done, strict=True):
            back = exchange.turned(x, batch.kind, turn)
            results.append((source, jnp.reshape(back, (-1, *batch.kind.sizes))))
        return results

    def held(batch: Batch) -> Array:
        units = [taken(source, batch.kind) for source in batch.sources]
        return _in_parts(jnp.concatenate(units), batch)

    units = [[held(batch) for batch in lot.batches] for lot in group.lots]
    with jax.named_scope("exchange"):
        placed = exchange.bring(group, units)
    for where in group.pools():
        lots, slots = [group.lots[i] for i in where], [placed[i] for i in where]
        unit, cut = lots[0].batches[0].unit, lots[0].parts > 1
        if cut and joined:
            unit = lots[0].batches[0].kind
            slots = [
                _joined(group, lot.batches[0], x)
                for lot, x in zip(lots, slots, strict=True)
            ]
        elif cut:
            slots = _widened(slots)
        done = _pooled(group, lots, unit, slots, work)
        for i, lot, result in zip(where, lots, done, strict=True):
            if cut and joined:
                placed[i] = _cut_again(group, lot.batches[0], result)
            else:
                placed[i] = result[..., : placed[i].shape[-1]]
    with jax.named_scope("exchange"):
        taken_back = exchange.take_back(group, placed)
    results = []
    for lot, found in zip(group.lots, taken_back, strict=True):
        for batch, back in zip(lot.batches, found, strict=True):
            whole, start = _whole(back, batch), 0
            for source in batch.sources:
                stop = start + source.stop - source.start
                results.append((source, whole[start:stop]))
                start = stop
    return results


def _pooled(
    group: Group, lots: Sequence[Lot], unit: Kind, slots: Sequence[Array], work: Work
) -> list[Array]:
    """`work` on a device's matrices of all lots together, empty slots left out."""
    pool, parts = jnp.concatenate(slots), lots[0].parts
    table = group.table(lots)
    if table is None:
        (done,) = work(group, unit, [pool], parts)
    else:
        mine = jnp.asarray(table)[lax.axis_index(group.axes)]
        real = jnp.take(pool, mine, axis=0)
        (done,) = work(group, unit, [real], parts)
        done = jnp.zeros_like(pool).at[mine].set(done)
    ends = np.cumsum([x.shape[0] for x in slots])
    return jnp.split(done, ends[:-1])


def _on_matrices(kind: Kind, polar: Polar) -> Polar:
    """`polar` on each block of matrices (m, n) or (count, m, n)."""
    if kind.blocks == 1:
        return polar

    def by_block(x: Array) -> Array:
        stack = x[None] if x.ndim == 2 else x
        return jnp.reshape(in_blocks(kind, len(stack)).apply(polar, stack), x.shape)

    return by_block


def in_blocks(kind: Kind, count: int) -> MatrixView:
    """How a stack of `count` matrices of that kind is cut into the blocks of each."""
    return MatrixView(
        shape=(count, *kind.shape),
        batch=(0,),
        inputs=(1,),
        outputs=(2,),
        input_widths=kind.input_widths,
        output_widths=kind.output_widths,
    )


def sharing(group: Group, parts: int) -> _linalg.Parts:
    """How a device shares a matrix with its neighbours, who have the other parts."""
    if parts == 1:
        return _linalg.WHOLE
    among = _neighbours(group, parts)
    over = partial(lax.psum, axis_name=group.axes, axis_index_groups=among)
    most = partial(lax.pmax, axis_name=group.axes, axis_index_groups=among)

    def own(x: Array) -> Array:
        rows = -(-x.shape[-2] // parts)
        missing = rows * parts - x.shape[-2]
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)])
        first = lax.axis_index(group.axes) % parts * rows
        return lax.dynamic_slice_in_dim(x, first, rows, axis=-2)

    def gather(x: Array, rows: int) -> Array:
        whole = lax.all_gather(
            x,
            group.axes,
            axis_index_groups=among,
            axis=x.ndim - 2,
            tiled=True,
        )
        return lax.slice_in_dim(whole, 0, rows, axis=-2)

    return _linalg.Parts(parts, over, most, own, gather)


def _neighbours(group: Group, parts: int) -> list[list[int]]:
    return [list(range(i, i + parts)) for i in range(0, group.devices, parts)]


def _widened(slots: Sequence[Array]) -> list[Array]:
    """With zero columns where the parts of one kind are padded less than another's."""
    most = max(x.shape[-1] for x in slots)
    return [jnp.pad(x, [(0, 0), (0, 0), (0, most - x.shape[-1])]) for x in slots]


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


def _joined(group: Group, batch: Batch, x: Array) -> Array:
    """Whole matrices, (slots, m, n), of those that this device has parts of."""
    kind, parts = batch.kind, batch.parts
    part, axis = kind.in_parts(parts)
    found = lax.all_gather(x, group.axes, axis_index_groups=_neighbours(group, parts))
    before, after = part.whole[:axis], part.whole[axis + 1 :]
    shards, size = kind.shards[axis], part.sizes[axis]
    # Every shard was cut: (parts, slots, ..., shards, size, ...) to the order of old.
    grid = jnp.reshape(found, (parts, -1, *before, shards, size, *after))
    grid = jnp.moveaxis(grid, 0, axis + 2)
    slots = grid.shape[0]
    merged = jnp.reshape(grid, (slots, *before, shards, parts * size, *after))
    merged = lax.slice_in_dim(merged, 0, kind.sizes[axis], axis=axis + 2)
    return jnp.reshape(merged, (slots, *kind.shape))


def _cut_again(group: Group, batch: Batch, x: Array) -> Array:
    """The inverse of `_joined`: this device's part of what all have who share it."""
    kind, parts = batch.kind, batch.parts
    part, axis = kind.in_parts(parts)
    before, after = part.whole[:axis], part.whole[axis + 1 :]
    shards, size, slots = kind.shards[axis], part.sizes[axis], x.shape[0]
    grid = jnp.reshape(x, (slots, *before, shards, kind.sizes[axis], *after))
    missing = parts * size - kind.sizes[axis]
    padding = [(0, missing if i == axis + 2 else 0) for i in range(grid.ndim)]
    grid = jnp.pad(grid, padding)
    mine = lax.axis_index(group.axes) % parts * size
    grid = lax.dynamic_slice_in_dim(grid, mine, size, axis=axis + 2)
    return jnp.reshape(grid, (slots, *part.shape))
