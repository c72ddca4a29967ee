"""Which device works on which matrix: decided from shapes and shardings alone."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from optax_matrix import _linalg, _mesh
from optax_matrix._layout import MatrixView
from optax_matrix._placement import rules

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


@dataclasses.dataclass(frozen=True)
class Kind:
    """Matrices that lie alike: same shape, same sharding, same type.

    Attributes:
      sizes: What one device holds of each input axis, then of each output axis.
      over: The mesh axes that each is sharded over.
      shards: How many pieces each is in.
      inputs: How many of the axes are inputs.
      input_widths: The blocks to cut the whole input side into, one if it is one.
      output_widths: The same for the output side.
      cut: The axis that parts are cut across.
      dtype: Name of the type.
    """

    sizes: tuple[int, ...]
    over: tuple[tuple[str, ...], ...]
    shards: tuple[int, ...]
    inputs: int
    input_widths: tuple[int, ...]
    output_widths: tuple[int, ...]
    cut: int
    dtype: str

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs and outputs of the whole matrix."""
        whole = self.whole
        return math.prod(whole[: self.inputs]), math.prod(whole[self.inputs :])

    @property
    def whole(self) -> tuple[int, ...]:
        """The whole size of each axis."""
        return tuple(s * k for s, k in zip(self.sizes, self.shards, strict=True))

    @property
    def blocks(self) -> int:
        """How many matrices the owner cuts it into."""
        return len(self.input_widths) * len(self.output_widths)

    @property
    def pieces(self) -> int:
        """How many devices one copy of a matrix lies on."""
        return math.prod(self.shards)

    @property
    def tall(self) -> bool:
        """Whether it is turned to be wide, and cut across its inputs."""
        m, n = self.shape
        return m > n

    def in_parts(self, parts: int) -> tuple["Kind", int]:
        """One part of a matrix, and the axis that is cut.

        The cut is across what each device holds, so that every device has a share of
        every part; the axis is padded to a multiple of `parts`.
        """
        axis = self.cut
        size = -(-self.sizes[axis] // parts)
        sizes = (*self.sizes[:axis], size, *self.sizes[axis + 1 :])
        part = dataclasses.replace(self, sizes=sizes)
        m, n = part.shape
        return dataclasses.replace(part, input_widths=(m,), output_widths=(n,)), axis

    def split(self, parts: int) -> tuple[int, int]:
        """The shorter side, and the longer one as it is padded for so many parts."""
        (m, n), part = self.shape, self.in_parts(parts)[0].shape
        return (n, parts * part[0]) if self.tall else (m, parts * part[1])


class Source(NamedTuple):
    """A range of the matrices that one device holds of a leaf."""

    leaf: int
    stack: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Batch:
    """Matrices of one kind that are handed out one after the other.

    Attributes:
      kind: How they lie.
      sources: Where they come from.
      parts: In how many parts each is handed out.
      start: How many were handed out before the first, see `Lot`.
    """

    kind: Kind
    sources: tuple[Source, ...]
    parts: int
    start: int

    @functools.cached_property
    def count(self) -> int:
        """Number of parts."""
        return self.parts * sum(s.stop - s.start for s in self.sources)

    @property
    def stop(self) -> int:
        """Where the next batch starts."""
        return self.start + self.count

    @functools.cached_property
    def unit(self) -> Kind:
        """What is handed out: whole matrices, or parts of them."""
        return self.kind.in_parts(self.parts)[0] if self.parts > 1 else self.kind


@dataclasses.dataclass(frozen=True)
class Lot:
    """Batches handed out in one go, one to each device in turn.

    Number i goes to device i mod W as its number i // W. The pieces of all batches of a
    lot are equally large, so what a device is sent does not depend on the kind.
    """

    batches: tuple[Batch, ...]

    @property
    def parts(self) -> int:
        """In how many parts each matrix is handed out."""
        return self.batches[0].parts

    @property
    def pieces(self) -> int:
        """In how many pieces each is."""
        return self.batches[0].kind.pieces

    @property
    def piece(self) -> int:
        """Entries of a piece."""
        return math.prod(self.batches[0].unit.sizes)

    @property
    def start(self) -> int:
        """The device that gets the first."""
        return self.batches[0].start

    @property
    def stop(self) -> int:
        """One more than the number of the last."""
        return self.batches[-1].stop

    def slots(self, devices: int) -> int:
        """How many a device gets at most."""
        return -(-self.stop // devices)


@dataclasses.dataclass(frozen=True)
class Group:
    """Matrices of one shape that are exchanged together.

    Attributes:
      axes: The mesh axes over whose devices they are spread.
      sizes: The sizes of these axes.
      lots: What is handed out, parts after wholes.
      turned: Whether tall matrices are worked on transposed.
      stack_size: How many a device multiplies at once.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    lots: tuple[Lot, ...]
    turned: bool
    stack_size: int

    @property
    def devices(self) -> int:
        """How many devices share the work."""
        return math.prod(self.sizes)

    @property
    def batches(self) -> list[Batch]:
        """Of all lots."""
        return [batch for lot in self.lots for batch in lot.batches]

    @property
    def exchanged(self) -> bool:
        """Whether any matrix has to be brought together from pieces."""
        return any(lot.pieces > 1 for lot in self.lots)

    def pools(self) -> list[list[int]]:
        """Positions of the lots that are worked on together: with as many parts."""
        found: dict[int, list[int]] = {}
        for i, lot in enumerate(self.lots):
            found.setdefault(lot.parts, []).append(i)
        return list(found.values())

    def table(self, lots: Sequence[Lot]) -> np.ndarray | None:
        """For every device, which of its slots over `lots` hold a matrix.

        None if that is all of them, to rounding up: then nothing is gained by a choice.
        """
        w = self.devices
        real = np.concatenate(
            [
                (lot.start <= numbers) & (numbers < lot.stop)
                for lot in lots
                for numbers in [np.arange(lot.slots(w) * w).reshape(-1, w)]
            ]
        ).T
        most = int(real.sum(axis=1).max())
        if most == real.shape[1]:
            return None
        # The empty ones fill up the rows of devices that have fewer.
        return np.argsort(~real, axis=1, kind="stable")[:, :most]

    def busiest(self, lots: Sequence[Lot]) -> int:
        """How many of its slots over `lots` the busiest device works on."""
        if self.devices == 1:
            return sum(lot.stop - lot.start for lot in lots)
        table = self.table(lots)
        every = sum(lot.slots(self.devices) for lot in lots)
        return every if table is None else table.shape[1]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where every matrix of a tree is worked on.

    Attributes:
      mesh: The mesh; None for one device.
      specs: The partition of every leaf.
      views: How a device cuts what it holds of a leaf into matrices.
      groups: The work, a group after the other.
    """

    mesh: Mesh | None
    specs: tuple[jax.P, ...]
    views: tuple[MatrixView, ...]
    groups: tuple[Group, ...]


class Leaf(NamedTuple):
    """What a plan is made from: a leaf's matrices, where they lie, and its type."""

    view: MatrixView
    sharding: jax.NamedSharding | None
    dtype: str


class Shared(Protocol):
    """What is done to a matrix, in so far as its parts can share it."""

    def flops(self, m: int, n: int, parts: int = 1) -> int:
        """Returns the FLOPs of one m×n matrix, or of one of its parts."""
        ...

    def traffic(self, m: int, n: int, parts: int, dtype: DTypeLike) -> _linalg.Traffic:
        """Returns what the parts of one matrix of a dtype tell one another."""
        ...


def make_plan(
    leaves: Sequence[Leaf],
    method: Shared | None,
    turns: bool,
    strategy: rules.Strategy,
) -> Plan:
    """Spreads the matrices of leaves over the one mesh that they lie on.

    Args:
      leaves: The leaves, all with shardings on one mesh or all without.
      method: What is done to each matrix; None if its parts cannot share it.
      turns: Whether it may be done to the transposed matrix.
      strategy: What is set by hand.

    Raises:
      ValueError: If a sharding does not divide its leaf.
    """
    mesh = leaves[0].sharding.mesh if leaves[0].sharding else None
    locals_, kinds, specs = [], [], []
    for leaf in leaves:
        view, found = _local(leaf, turns)
        locals_.append(view)
        kinds.append(found)
        specs.append(leaf.sharding.spec if leaf.sharding else jax.P())
    shape = dict(mesh.shape) if mesh is not None else {}
    groups = [
        group
        for key, sources in _alike(leaves, locals_, kinds, turns, shape).items()
        for group in _rounds(key, sources, shape, method, strategy)
    ]
    return Plan(mesh, tuple(specs), tuple(locals_), tuple(groups))


def _local(leaf: Leaf, turns: bool) -> tuple[MatrixView, tuple[Kind, ...]]:
    """How one device sees a leaf, and the kinds of the stacks it cuts it into.

    A side that is both split and sharded is not cut: its blocks end between shards.
    """
    view, sharding, dtype = leaf
    ndim = len(view.shape)
    over = _mesh.axes_by_dimension(sharding, ndim) if sharding else ((),) * ndim
    sizes = sharding.mesh.shape if sharding else {}
    shards = [math.prod(sizes[axis] for axis in axes) for axes in over]
    for size, count, axis in zip(view.shape, shards, range(ndim), strict=True):
        if size % count:
            raise ValueError(
                f"The sharding {sharding} cuts axis {axis} into {count} at "
                f"'{view.path}', shape {view.shape}, which does not divide. Shard "
                "another axis, or leave that one whole."
            )
    shape = tuple(s // k for s, k in zip(view.shape, shards, strict=True))

    sides = []  # for inputs and outputs: widths on one device, widths for the owner
    for axes, widths in (
        (view.inputs, view.input_widths),
        (view.outputs, view.output_widths),
    ):
        cut_here = len(widths) > 1 and all(shards[axis] == 1 for axis in axes)
        whole = (math.prod(shape[axis] for axis in axes),)
        sides.append((widths, None) if cut_here else (whole, widths))
    (local_in, own_in), (local_out, own_out) = sides
    local = dataclasses.replace(
        view, shape=shape, input_widths=local_in, output_widths=local_out
    )
    kinds = []
    for _, m, n in local.matrices:
        # A side that was cut has one axis.
        ins = [shape[a] for a in view.inputs] if own_in else [m]
        outs = [shape[a] for a in view.outputs] if own_out else [n]
        axes = (*view.inputs, *view.outputs)
        kind = Kind(
            sizes=(*ins, *outs),
            over=tuple(over[a] for a in axes),
            shards=tuple(shards[a] for a in axes),
            inputs=len(ins),
            input_widths=own_in or (m,),
            output_widths=own_out or (n,),
            cut=0,
            dtype=dtype,
        )
        # A turned matrix has its parts side by side; of others they are put together
        # again, so that it may be cut wherever a device holds most.
        side = range(len(kind.sizes))
        if turns:
            side = side[: kind.inputs] if kind.tall else side[kind.inputs :]
        cut = max(side, key=kind.sizes.__getitem__)
        kinds.append(dataclasses.replace(kind, cut=cut))
    return local, tuple(kinds)


class _Key(NamedTuple):
    """What matrices that are exchanged together have in common."""

    shape: tuple[int, int]
    widths: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: str
    axes: tuple[str, ...]
    turned: bool


def _alike(
    leaves: Sequence[Leaf],
    views: Sequence[MatrixView],
    kinds: Sequence[tuple[Kind, ...]],
    turns: bool,
    shape: dict[str, int],
) -> dict[_Key, list[tuple[Kind, Source]]]:
    """All stacks by what decides whether they can go together, those of a kind next."""
    found: dict[_Key, list[tuple[Kind, Source]]] = {}
    for i, (leaf, view) in enumerate(zip(leaves, views, strict=True)):
        taken = set()
        if leaf.sharding:
            over = _mesh.axes_by_dimension(leaf.sharding, len(view.shape))
            taken = {axis for a in view.batch for axis in over[a]}
        axes = tuple(a for a, size in shape.items() if size > 1 and a not in taken)
        for j, ((count, *_), kind) in enumerate(
            zip(view.matrices, kinds[i], strict=True)
        ):
            m, n = kind.shape
            turned = turns and kind.blocks == 1
            key = _Key(
                (min(m, n), max(m, n)) if turned else (m, n),
                ((), ()) if turned else (kind.input_widths, kind.output_widths),
                kind.dtype,
                axes,
                turned,
            )
            found.setdefault(key, []).append((kind, Source(i, j, 0, count)))
    # What can go in one lot next to each other, and of that what is of one kind.
    for stacks in found.values():
        order = {kind: i for i, kind in enumerate(dict.fromkeys(k for k, _ in stacks))}
        stacks.sort(key=lambda stack: (*_lot(stack[0], 1), order[stack[0]]))
    return found


def _rounds(
    key: _Key,
    sources: list[tuple[Kind, Source]],
    shape: dict[str, int],
    method: Shared | None,
    strategy: rules.Strategy,
) -> Iterable[Group]:
    """The groups of one key: several if a device would hold too many at once."""
    sizes = tuple(shape[axis] for axis in key.axes)
    w = math.prod(sizes)
    count = sum(source.stop - source.start for _, source in sources)
    itemsize = jnp.dtype(key.dtype).itemsize
    at_once = strategy.stack_size or rules.stack_size(*key.shape)
    if w == 1:
        lots = _lots(sources, 1, w, key.turned)
        yield Group(key.axes, sizes, lots, key.turned, at_once)
        return
    held = strategy.stack_size or rules.exchange_size(*key.shape, itemsize)
    whole = count // w * w
    split = 1
    kinds = tuple(dict.fromkeys(kind for kind, _ in sources))
    if method is not None and kinds[0].blocks == 1:
        cost = functools.partial(_part_cost, method, kinds, key.turned, w)
        # What is put together again takes the memory of whole matrices.
        most = None if key.turned else held
        split = rules.parts(count, w, cost, strategy.flops_per_byte, most)
    if split == 1:
        whole = count
    edges = sorted({*range(held * w, whole, held * w), whole, count} - {0})
    rounds = _cut(sources, edges)
    rest = rounds.pop() if split > 1 else []
    # Parts go with the last round of wholes, in the same exchange.
    last = rounds.pop() if rounds else []
    for cut in rounds:
        lots = _lots(cut, 1, w, key.turned)
        yield Group(key.axes, sizes, lots, key.turned, at_once)
    lots = (*_lots(last, 1, w, key.turned), *_lots(rest, split, w, key.turned))
    yield Group(key.axes, sizes, lots, key.turned, at_once)


def _part_cost(
    method: Shared, kinds: Sequence[Kind], turned: bool, devices: int, parts: int
) -> tuple[int, int]:
    """The most FLOPs of a part of any kind, and the most bytes its device receives."""
    flops, moved = [], []
    for kind in kinds:
        # Parts that are put together again have no padding.
        m, n = kind.split(parts) if turned else kind.shape
        flops.append(method.flops(m, n, parts))
        unit = kind.in_parts(parts)[0] if parts > 1 else kind
        told = method.traffic(m, n, parts, kind.dtype).bytes if parts > 1 else 0
        moved.append(told + slot_bytes(unit, devices))
    return max(flops), max(moved)


def slot_bytes(unit: Kind, devices: int) -> int:
    """What a device receives in the exchanges for one of its matrices, or parts."""
    piece, itemsize = math.prod(unit.sizes), jnp.dtype(unit.dtype).itemsize
    # In, a share from each of the others, unless it is there; out, a piece of theirs.
    share = -(-piece // (devices // unit.pieces)) if unit.pieces > 1 else 0
    return (devices - 1) * (share + piece) * itemsize


def _cut(
    sources: list[tuple[Kind, Source]], edges: list[int]
) -> list[list[tuple[Kind, Source]]]:
    """The matrices up to the first edge, from there to the second, and so on."""
    cuts, done, queue = [], 0, list(sources)
    for edge in edges:
        cut = []
        while done < edge:
            kind, source = queue.pop(0)
            take = min(source.stop - source.start, edge - done)
            middle = source.start + take
            cut.append((kind, source._replace(stop=middle)))
            if middle < source.stop:
                queue.insert(0, (kind, source._replace(start=middle)))
            done += take
        cuts.append(cut)
    return cuts


def _lot(kind: Kind, parts: int) -> tuple[int, int]:
    """What batches of one lot have in common: pieces, and the entries of one."""
    unit = kind.in_parts(parts)[0] if parts > 1 else kind
    return kind.pieces, math.prod(unit.sizes)


def _lots(
    sources: list[tuple[Kind, Source]], parts: int, devices: int, turned: bool
) -> tuple[Lot, ...]:
    """Lots by kinds, each starting at the device after the last one's last."""
    lots, start = [], 0
    # Parts that are put together again must be of one kind.
    alone = parts > 1 and not turned

    def together(source: tuple[Kind, Source]) -> Any:
        return source[0] if alone else _lot(source[0], parts)

    for _, similar in itertools.groupby(sources, key=together):
        batches = []
        for kind, same in itertools.groupby(similar, key=lambda s: s[0]):
            batch = Batch(kind, tuple(source for _, source in same), parts, start)
            batches.append(batch)
            start = batch.stop
        lots.append(Lot(tuple(batches)))
        start %= devices
    return tuple(lots)
