"""What work on matrices costs each device, by formula."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from optax_matrix import _table
from optax_matrix._placement.groups import Group, make_plans
from optax_matrix._placement.placement import Leaf
from optax_matrix._placement.stacks import by_shape

# FLOPs, or bytes of state, of one matrix from its inputs, outputs and dtype.
Formula = Callable[[int, int, DTypeLike], float]


@dataclasses.dataclass(frozen=True)
class GroupCost:
    """What the matrices of one group cost each device.

    Attributes:
      shape: (inputs, outputs) of a matrix, as it is worked on.
      matrices: Number of matrices over the whole mesh.
      owners: Number of devices that share them. If layers or experts are sharded over
        other mesh axes, each slice has this many owners.
      per_owner: Number of matrices of the busiest owner.
      flops: FLOPs of the busiest owner.
      even_flops: FLOPs of all matrices divided by the number of owners.
      exchanges: Number of exchanges of all rounds.
      exchanged_bytes: Bytes that one device receives in them.
      least_bytes: Bytes it must receive so that every matrix is whole on one device
        once, and every device has the results for what it holds.
      round_bytes: Bytes of the whole matrices that a device holds at once.
      state_bytes: Bytes of state on the busiest owner.
    """

    shape: tuple[int, int]
    matrices: int
    owners: int
    per_owner: int
    flops: float
    even_flops: float
    exchanges: int
    exchanged_bytes: int
    least_bytes: float
    round_bytes: int
    state_bytes: float


@dataclasses.dataclass(frozen=True)
class PlacementDescription:
    """What work on matrices costs each device, a row per group; `str` is a table.

    Attributes:
      groups: The costs of each group.
      flops: The FLOPs of the busiest device. It is less than the sum over groups if
        their busiest owners are different devices. It is an upper bound if the owners
        of some groups span other mesh axes than those of others.
      period: Every how many updates all this is done, see `Placement`.
      piece_flops: The FLOPs of a device in each of the other updates, which have no
        exchange.
    """

    groups: tuple[GroupCost, ...]
    flops: float
    period: int = 1
    piece_flops: float = 0.0

    @property
    def totals(self) -> dict[str, float]:
        """The busiest device, sums over groups, and the largest round."""
        summed = ("even_flops", "exchanges", "exchanged_bytes", "least_bytes")
        summed += ("state_bytes",)
        totals = {
            name: float(sum(getattr(group, name) for group in self.groups))
            for name in summed
        }
        even = totals["even_flops"]
        return totals | {
            "flops": self.flops,
            "flops_over_even": self.flops / even if even else 1.0,
            "round_bytes": max((g.round_bytes for g in self.groups), default=0),
        }

    def __str__(self) -> str:
        """Returns the table, totals last."""
        header = (
            *("matrices", "shape", "owners", "per owner", "GFLOP", "/ even"),
            *("exchanges", "MiB received", "least MiB", "round MiB", "state MiB"),
        )
        rows = [
            (
                f"{group.matrices:,}",
                f"{group.shape[0]} \N{MULTIPLICATION SIGN} {group.shape[1]}",
                f"{group.owners}",
                f"{group.per_owner}",
                *_cells(dataclasses.asdict(group)),
            )
            for group in self.groups
        ]
        totals = [("total", "", "", "", *_cells(self.totals))]
        if self.period > 1:
            pieces = dict.fromkeys(self.totals, 0.0)
            pieces |= {"flops": self.piece_flops, "even_flops": self.piece_flops}
            pieces["state_bytes"] = self.totals["state_bytes"]
            totals.append(("of pieces", "", "", "", *_cells(pieces)))
            whole = f"whole in 1 of {self.period}"
            totals[0] = (whole, *totals[0][1:])
        return _table.aligned(header, rows, totals, right=range(len(header)))


def _cells(cost: dict[str, float]) -> tuple[str, ...]:
    even = cost["even_flops"]
    return (
        f"{cost['flops'] / 1e9:.3g}",
        f"{cost['flops'] / even if even else 1:.2f}",
        f"{cost['exchanges']:.0f}",
        *(
            f"{cost[name] / 2**20:.3g}"
            for name in ("exchanged_bytes", "least_bytes", "round_bytes", "state_bytes")
        ),
    )


def describe_groups(
    leaves: Sequence[Leaf],
    flops: Formula,
    state_bytes: Formula,
    *,
    transposable: bool,
    stack_size: int | None,
    period: int = 1,
) -> PlacementDescription:
    """Counts what `map_matrices` costs each device, by the formulas of
    docs/sharding.md.

    Args:
      leaves: The leaves, which may hold descriptions of arrays.
      flops: The FLOPs of one matrix.
      state_bytes: The bytes of the state of one matrix.
      transposable: As for `map_matrices`.
      stack_size: As for `map_matrices`.
      period: See `Placement`.
    """
    costs, busiest, of_pieces = [], 0.0, 0.0
    for where, plan in make_plans(leaves, transposable, stack_size):
        if plan is None:
            some = [leaves[i] for i in where]
            found = _without_mesh(some, flops, state_bytes, transposable)
            busiest += sum(cost.flops for cost in found)
            of_pieces += sum(cost.flops for cost in found)
        else:
            found = [
                _cost(group, plan.mesh.size // group.owners, flops, state_bytes)
                for group in plan.groups
            ]
            busiest += _busiest(plan.groups, found)
            here = [
                Leaf(leaves[i].value, view, None)
                for i, view in zip(where, plan.views, strict=True)
            ]
            local = _without_mesh(here, flops, state_bytes, transposable)
            of_pieces += sum(cost.flops for cost in local)
        costs += found
    return PlacementDescription(
        tuple(costs), busiest, period, of_pieces if period > 1 else 0.0
    )


def _busiest(groups: Sequence[Group], costs: Sequence[GroupCost]) -> float:
    """Returns the FLOPs of the device that has the most over all groups.

    For groups whose owners span different mesh axes it adds the maxima, which is an
    upper bound.
    """
    loads: dict[tuple[str, ...], np.ndarray] = {}
    for group, cost in zip(groups, costs, strict=True):
        place = (np.arange(group.owners) - group.first) % group.owners
        owned = group.full_slots + (place < group.count % group.owners)
        load = loads.setdefault(group.axes, np.zeros(group.owners))
        load += owned * (cost.flops / group.slots)
    return float(sum(load.max() for load in loads.values()))


def _cost(group: Group, slices: int, flops: Formula, state_bytes: Formula) -> GroupCost:
    stacks = group.stacks

    def of_each(formula: Formula) -> float:
        return sum(k * formula(m, n, group.dtype) for k, m, n in stacks)

    each, blocks = of_each(flops), sum(k for k, *_ in stacks)
    itemsize = jnp.dtype(group.dtype).itemsize
    piece = math.prod(group.piece) * itemsize
    w, s = group.owners, group.pieces
    return GroupCost(
        shape=stacks[0][1:] if len(stacks) == 1 else group.shape,
        matrices=group.count * blocks * slices,
        owners=w,
        per_owner=group.slots * blocks,
        flops=group.slots * each,
        even_flops=group.count * each / w,
        exchanges=((s > 1) + (w > 1)) * len(list(group.rounds())),
        exchanged_bytes=group.slots * (s - 1 + w - 1) * piece,
        least_bytes=group.count / w * (s - 1 + w - 1) * piece,
        round_bytes=min(group.slots, group.per_round)
        * math.prod(group.shape)
        * itemsize,
        state_bytes=group.slots * of_each(state_bytes),
    )


def _without_mesh(
    leaves: Sequence[Leaf], flops: Formula, state_bytes: Formula, transposable: bool
) -> list[GroupCost]:
    costs = []
    for _, members in by_shape(leaves, transposable):
        i, j, turn = members[0]
        _, m, n = leaves[i].view.matrices[j]
        m, n = (n, m) if turn else (m, n)
        dtype = leaves[i].value.dtype.name
        count = sum(leaves[i].view.matrices[j][0] for i, j, _ in members)
        work = count * flops(m, n, dtype)
        costs.append(
            GroupCost(
                shape=(m, n),
                matrices=count,
                owners=1,
                per_owner=count,
                flops=work,
                even_flops=work,
                exchanges=0,
                exchanged_bytes=0,
                least_bytes=0,
                round_bytes=0,
                state_bytes=count * state_bytes(m, n, dtype),
            )
        )
    return costs
