"""What a plan costs every device: FLOPs, exchanges and bytes, by formula."""

import dataclasses
import math

import jax.numpy as jnp

from optax_matrix import _linalg, _table
from optax_matrix._placement.plan import Group, Plan, slot_bytes


@dataclasses.dataclass(frozen=True)
class GroupCost:
    """What orthogonalizing the matrices of one group costs each device.

    Attributes:
      shape: (inputs, outputs) of a matrix, the smaller side first where tall and wide
        ones are worked on together.
      matrices: How many there are, over all of the mesh.
      devices: How many devices share them; with experts or layers sharded over other
        axes, each of those slices has as many of its own.
      per_device: How many whole matrices the busiest device works on.
      parts: In how many parts those left over are cut; 1 if none are.
      parts_per_device: How many of these the busiest device works on.
      flops: Of the busiest device.
      even_flops: Of all matrices as whole ones, over all devices. Parts can have less:
        Halley's solve for columns where whole matrices multiply.
      exchanges: How many there are: in and out, out alone, or none.
      exchanged_bytes: What a device receives in them.
      least_bytes: What it must receive for each matrix to be in one place once, and
        each device to have the result for what it holds.
      sums: How many Gram matrices parts sum over devices, one after another.
      gathers: How many small matrices parts put together from their rows, likewise.
      part_bytes: What a device receives in both, sums running around a ring.
    """

    shape: tuple[int, int]
    matrices: int
    devices: int
    per_device: int
    parts: int
    parts_per_device: int
    flops: float
    even_flops: float
    exchanges: int
    exchanged_bytes: int
    least_bytes: float
    sums: int
    gathers: int
    part_bytes: int


def group_cost(plan: Plan, group: Group, method: _linalg.PartwiseMethod) -> GroupCost:
    """The formulas; docs/sharding.md derives them."""
    w = group.devices
    copies = math.prod(plan.mesh.shape.values()) // w if plan.mesh is not None else 1
    here = sum(
        batch.count // batch.parts * batch.kind.blocks for batch in group.batches
    )
    one = group.batches[0].kind
    blocks = [
        (min(m, n), max(m, n)) if group.turned else (m, n)
        for m in one.input_widths
        for n in one.output_widths
    ]
    flops, per_device, parts_per_device, sums, gathers, moved = 0, 0, 0, 0, 0, 0
    for where in group.pools():
        lots = [group.lots[i] for i in where]
        slots, parts = group.busiest(lots), lots[0].parts
        if parts == 1:
            flops += slots * sum(method.flops(m, n) for m, n in blocks)
            per_device = slots * len(blocks)
            continue
        splits = [lot.batches[0].kind.split(parts) for lot in lots]
        m, n = max(splits, key=lambda split: split[1])
        traffic = method.traffic(m, n, parts, one.dtype)
        rounds = -(-slots // group.stack_size)
        flops += slots * method.flops(m, n, parts)
        parts_per_device += slots
        sums += rounds * traffic.sums
        gathers += rounds * traffic.gathers
        moved += slots * traffic.bytes
    even = here // len(blocks) * sum(method.flops(m, n) for m, n in blocks) / w
    exchanged, least = _bytes(group)
    return GroupCost(
        shape=blocks[0] if len(blocks) == 1 else one.shape,
        matrices=here * copies,
        devices=w,
        per_device=per_device,
        parts=max(lot.parts for lot in group.lots),
        parts_per_device=parts_per_device,
        flops=flops,
        even_flops=even,
        exchanges=(2 if group.exchanged else 1) if w > 1 else 0,
        exchanged_bytes=exchanged,
        least_bytes=least,
        sums=sums,
        gathers=gathers,
        part_bytes=moved,
    )


def _bytes(group: Group) -> tuple[int, float]:
    """What a device receives, and the least that it could."""
    w = group.devices
    if w == 1:
        return 0, 0.0
    received, least = 0, 0.0
    for lot in group.lots:
        itemsize = jnp.dtype(lot.batches[0].kind.dtype).itemsize
        # Every slot is sent, also those that are empty at the end of a lot.
        received += lot.slots(w) * slot_bytes(lot.batches[0].unit, w)
        # What a device holds of all matrices. In: what its own have elsewhere. Out: its
        # piece of all but its own. Parts are padded, matrices are not.
        held = sum(
            batch.count // batch.parts * math.prod(batch.kind.sizes)
            for batch in lot.batches
        )
        inward, outward = held / w * (lot.pieces - 1), held * (w - 1) / w
        least += (inward + outward) * itemsize
    return received, least


@dataclasses.dataclass(frozen=True)
class PlacementDescription:
    """What orthogonalization costs each device, a row per group; `str` is a table."""

    groups: tuple[GroupCost, ...]

    @property
    def totals(self) -> dict[str, float]:
        """Sums over groups, and how the busiest device compares with an even split."""
        names = ("flops", "even_flops", "exchanges", "exchanged_bytes", "least_bytes")
        names += ("sums", "gathers", "part_bytes")
        totals = {n: sum(getattr(group, n) for group in self.groups) for n in names}
        even = totals["even_flops"]
        return totals | {"flops_over_even": totals["flops"] / even if even else 1.0}

    def __str__(self) -> str:
        """Returns the table, totals last."""
        header = (
            *("matrices", "shape", "devices", "a device", "GFLOP", "/ even"),
            *("exchanges", "MiB", "least", "sums", "gathers", "MiB of parts"),
        )
        rows = [_cells(group) for group in self.groups]
        total = self.totals
        last = (
            *("total", "", "", "", f"{total['flops'] / 1e9:.3g}"),
            f"{total['flops_over_even']:.2f}",
            f"{total['exchanges']:.0f}",
            f"{total['exchanged_bytes'] / 2**20:.3g}",
            f"{total['least_bytes'] / 2**20:.3g}",
            f"{total['sums']:.0f}",
            f"{total['gathers']:.0f}",
            f"{total['part_bytes'] / 2**20:.3g}",
        )
        return _table.aligned(header, rows, [last], right=range(len(header)))


def _cells(group: GroupCost) -> tuple[str, ...]:
    m, n = group.shape
    return (
        f"{group.matrices:,}",
        f"{m} \N{MULTIPLICATION SIGN} {n}",
        f"{group.devices}",
        _share(group),
        f"{group.flops / 1e9:.3g}",
        f"{group.flops / group.even_flops:.2f}",
        f"{group.exchanges}",
        f"{group.exchanged_bytes / 2**20:.3g}",
        f"{group.least_bytes / 2**20:.3g}",
        f"{group.sums}",
        f"{group.gathers}",
        f"{group.part_bytes / 2**20:.3g}",
    )


def _share(group: GroupCost) -> str:
    part = f"{group.parts_per_device}/{group.parts}" if group.parts > 1 else ""
    whole = str(group.per_device) if group.per_device or not part else ""
    return " + ".join(filter(None, (whole, part)))
