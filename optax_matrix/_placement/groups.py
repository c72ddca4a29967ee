"""Groups of matrices and their owners, from shapes and shardings alone."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_matrix import _mesh
from optax_matrix._layout import MatrixView
from optax_matrix._placement.placement import Leaf

# The matrices that one device holds whole in one round.
ROUND_BYTES = 2**30


class Member(NamedTuple):
    """The matrices of one leaf in a group, as one device holds them."""

    leaf: int  # position among the leaves
    stack: int  # position among the stacks of the leaf's local view
    count: int
    transposed: bool  # whether the group has them transposed


class Side(NamedTuple):
    """The inputs or the outputs of a matrix, as one device holds them."""

    sizes: tuple[int, ...]  # of each axis
    over: tuple[tuple[str, ...], ...]  # the mesh axes that each axis is sharded over
    widths: tuple[int, ...]  # the blocks into which the owner cuts the whole side


@dataclasses.dataclass(frozen=True)
class Group:
    """All matrices of one shape (up to transposition), sharding and dtype.

    Attributes:
      members: Where the matrices come from, in order.
      inputs: Their inputs.
      outputs: Their outputs.
      dtype: The name of their dtype.
      axes: The mesh axes whose devices own them: those that do not shard the batch.
      axis_sizes: The sizes of these axes.
      first: The owner of matrix 0, as an index over `axes`.
      per_round: How many matrices a device owns at once, at most.
    """

    members: tuple[Member, ...]
    inputs: Side
    outputs: Side
    dtype: str
    axes: tuple[str, ...]
    axis_sizes: tuple[int, ...]
    first: int
    per_round: int

    @property
    def count(self) -> int:
        """Number of matrices that the owners share."""
        return sum(member.count for member in self.members)

    @property
    def owners(self) -> int:
        """Number of devices that share them."""
        return math.prod(self.axis_sizes)

    @property
    def slots(self) -> int:
        """Number of matrices of the busiest owner."""
        return -(-self.count // self.owners)

    @property
    def full_slots(self) -> int:
        """Number of matrices that every owner has; the rest have one more."""
        return self.count // self.owners

    @property
    def piece(self) -> tuple[int, ...]:
        """What one device holds of a matrix: the size of each axis."""
        return self.inputs.sizes + self.outputs.sizes

    @property
    def over(self) -> tuple[tuple[str, ...], ...]:
        """The mesh axes that each axis of `piece` is sharded over."""
        return self.inputs.over + self.outputs.over

    @property
    def sharded_axes(self) -> tuple[str, ...]:
        """The mesh axes that matrices are sharded over, in the order of `axes`."""
        used = {axis for axes in self.over for axis in axes}
        return tuple(axis for axis in self.axes if axis in used)

    @property
    def shards(self) -> tuple[int, ...]:
        """Into how many pieces each of `axes` shards a matrix; 1 if it does not."""
        return tuple(
            size if axis in self.sharded_axes else 1
            for axis, size in zip(self.axes, self.axis_sizes, strict=True)
        )

    @property
    def pieces(self) -> int:
        """Number of pieces that a matrix is sharded into."""
        return math.prod(self.shards)

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs and outputs of a whole matrix."""
        return sum(self.inputs.widths), sum(self.outputs.widths)

    def blocks(self, count: int) -> MatrixView:
        """Returns how an owner cuts `count` fused matrices into their blocks."""
        return MatrixView(
            shape=(count, *self.shape),
            batch=(0,),
            inputs=(1,),
            outputs=(2,),
            input_widths=self.inputs.widths,
            output_widths=self.outputs.widths,
        )

    @property
    def stacks(self) -> tuple[tuple[int, int, int], ...]:
        """(count, inputs, outputs) of the blocks of one fused matrix, by shape."""
        return self.blocks(1).matrices

    def rounds(self) -> Iterator[tuple[int, int]]:
        """Yields the first and last slot of each round, the last not included."""
        for start in range(0, self.slots, self.per_round):
            yield start, min(start + self.per_round, self.slots)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The groups of a tree on a mesh.

    Attributes:
      mesh: The mesh.
      specs: The partition of every leaf.
      views: How one device cuts its shard of every leaf into matrices.
      groups: The groups.
    """

    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
    specs: tuple[jax.P, ...]
    views: tuple[MatrixView, ...]
    groups: tuple[Group, ...]


def make_plans(
    leaves: Sequence[Leaf], transposable: bool, stack_size: int | None
) -> list[tuple[list[int], Plan | None]]:
    """Makes a plan for each mesh that leaves lie on.

    Returns:
      The positions of the leaves, without empty ones, and their plan, which is None
      without a mesh.
    """
    by_mesh: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if math.prod(leaf.view.shape):
            mesh = None if leaf.sharding is None else leaf.sharding.mesh
            by_mesh.setdefault(mesh, []).append(i)
    return [
        (
            where,
            mesh and make_plan([leaves[i] for i in where], transposable, stack_size),
        )
        for mesh, where in by_mesh.items()
    ]


def make_plan(
    leaves: Sequence[Leaf], transposable: bool, stack_size: int | None
) -> Plan:
    """Groups the matrices of leaves that lie on one mesh, and assigns owners.

    Args:
      leaves: The leaves, all with shardings on one mesh.
      transposable: Whether matrices may be worked on transposed.
      stack_size: The number of matrices in a round; None is 1 GiB of them.

    Raises:
      ValueError: If a sharding does not divide its leaf.
    """
    mesh = shardings_of(leaves)[0].mesh
    views, members = [], {}
    for i, leaf in enumerate(leaves):
        view, sides = _local(leaf)
        views.append(view)
        used = {a for axis in view.batch for a in axes_of(leaf)[axis]}
        axes = tuple(a for a, k in mesh.shape.items() if k > 1 and a not in used)
        for j, (count, *_) in enumerate(view.matrices):
            inputs, outputs = sides[j]
            turn = transposable and _turned(inputs, outputs)
            inputs, outputs = (outputs, inputs) if turn else (inputs, outputs)
            key = (inputs, outputs, leaf.value.dtype.name, axes)
            members.setdefault(key, []).append(Member(i, j, count, turn))
    groups, next_owner = [], {}
    for (inputs, outputs, dtype, axes), found in members.items():
        itemsize = jnp.dtype(dtype).itemsize
        size = sum(inputs.widths) * sum(outputs.widths) * itemsize
        group = Group(
            tuple(found),
            inputs,
            outputs,
            dtype,
            axes,
            tuple(mesh.shape[axis] for axis in axes),
            next_owner.get(axes, 0),
            stack_size or max(1, ROUND_BYTES // size),
        )
        next_owner[axes] = (group.first + group.count) % group.owners
        groups.append(group)
    specs = tuple(sharding.spec for sharding in shardings_of(leaves))
    return Plan(mesh, specs, tuple(views), tuple(groups))


def shardings_of(leaves: Sequence[Leaf]) -> list[jax.NamedSharding]:
    """Returns the shardings of leaves that all have one."""
    return [leaf.sharding for leaf in leaves if leaf.sharding is not None]


def axes_of(leaf: Leaf) -> tuple[tuple[str, ...], ...]:
    """Returns the mesh axes that shard each dimension of a leaf."""
    (sharding,) = shardings_of([leaf])
    return _mesh.axes_by_dimension(sharding, len(leaf.view.shape))


def _turned(inputs: Side, outputs: Side) -> bool:
    """Returns whether to transpose: to wide, and squares to one order of mesh axes."""
    if len(inputs.widths) > 1 or len(outputs.widths) > 1:
        return False
    m, n = sum(inputs.widths), sum(outputs.widths)
    return m > n or (m == n and inputs > outputs)


def _local(leaf: Leaf) -> tuple[MatrixView, list[tuple[Side, Side]]]:
    """Returns the view of one device's shard, and the sides of each of its stacks.

    If a side is both split and sharded, the owner cuts the matrix into its blocks,
    which may end inside a shard. Any other split is cut before the exchange.
    """
    view, (sharding,) = leaf.view, shardings_of([leaf])
    over, sizes = axes_of(leaf), sharding.mesh.shape
    shards = [math.prod(sizes[axis] for axis in axes) for axes in over]
    for axis, (size, count) in enumerate(zip(view.shape, shards, strict=True)):
        if size % count:
            raise ValueError(
                f"The sharding {sharding} cuts axis {axis} into {count} at "
                f"'{view.path}', shape {view.shape}, which does not divide. Shard "
                "another axis, or leave that one whole."
            )
    shape = tuple(s // k for s, k in zip(view.shape, shards, strict=True))

    sides = [
        _merged([shape[a] for a in axes], [over[a] for a in axes], widths)
        for axes, widths in (
            (view.inputs, view.input_widths),
            (view.outputs, view.output_widths),
        )
    ]
    split = [len(side.widths) > 1 for side in sides]
    if any(s and any(side.over) for s, side in zip(split, sides, strict=True)):
        split = [False, False]
    widths = [
        side.widths if cut else (math.prod(side.sizes),)
        for cut, side in zip(split, sides, strict=True)
    ]
    local = dataclasses.replace(
        view, shape=shape, input_widths=widths[0], output_widths=widths[1]
    )
    return local, [
        (_block(m) if split[0] else sides[0], _block(n) if split[1] else sides[1])
        for _, m, n in local.matrices
    ]


def _block(size: int) -> Side:
    """Returns the side of a block, which every device holds whole."""
    return Side((size,), ((),), (size,))


def _merged(
    sizes: Sequence[int], over: Sequence[tuple[str, ...]], widths: tuple[int, ...]
) -> Side:
    """Returns a side, with every axis that is not sharded merged into the one before.

    Heads that are sharded and their width that is not are one axis, like the columns of
    a plain matrix.
    """
    merged_sizes, merged_over = [sizes[0]], [over[0]]
    for size, axes in zip(sizes[1:], over[1:], strict=True):
        if axes:
            merged_sizes.append(size)
            merged_over.append(axes)
        else:
            merged_sizes[-1] *= size
    return Side(tuple(merged_sizes), tuple(merged_over), widths)
