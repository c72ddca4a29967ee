"""State of every matrix, which lies with its owner."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType
from jax.typing import DTypeLike

from optax_matrix import _linalg
from optax_matrix._layout import MatrixView
from optax_matrix._placement import exchange
from optax_matrix._placement.groups import Group, Plan, axes_of
from optax_matrix._placement.placement import Leaf
from optax_matrix._placement.stacks import by_shape, first_numbers, stack_names

# Makes the state of one matrix from its inputs, outputs and the dtype of arithmetic.
Make = Callable[[int, int, DTypeLike], Any]


class MatrixStack(NamedTuple):
    """The states of the matrices of one shape, one row per matrix.

    On a mesh the rows are sharded over all devices: each has those of its matrices.
    """

    numbers: Array  # int32, which matrix of the shape a row is for; -1 is padding
    state: Any  # arrays (rows, ...)


class StackRows(NamedTuple):
    """One stack of states on a mesh: its name, matrices, and rows per device."""

    name: str
    group: Group
    per_slot: int  # more than one if owners cut fused matrices into blocks
    m: int
    n: int

    @property
    def rows(self) -> int:
        """Number of rows that one device has."""
        return self.per_slot * self.group.slots


def stack_rows(plan: Plan) -> Iterator[StackRows]:
    """Yields the stacks of states of a plan."""
    found = [(group, *stack) for group in plan.groups for stack in group.stacks]
    names = stack_names((m, n) for *_, m, n in found)
    for name, stack in zip(names, found, strict=True):
        yield StackRows(name, *stack)


def stacks_by_group(plan: Plan) -> Iterator[tuple[Group, list[StackRows]]]:
    """Yields each group with its stacks of states."""
    by_group = itertools.groupby(stack_rows(plan), key=lambda stack: stack.group)
    for group, stacks in by_group:
        yield group, list(stacks)


def stack_specs(plan: Plan) -> dict[str, jax.P]:
    """Returns the partition of each stack: its rows over all devices, owners last."""
    specs = {}
    for stack in stack_rows(plan):
        axes = stack.group.axes
        others = [a for a, k in plan.mesh.shape.items() if k > 1 and a not in axes]
        specs[stack.name] = jax.P((*others, *axes))
    return specs


def init_states(
    make: Make, leaves: Sequence[Leaf], plan: Plan | None
) -> dict[str, MatrixStack]:
    """Makes the state of every matrix of leaves.

    Args:
      make: Makes the state of one matrix.
      leaves: The leaves, without empty ones.
      plan: Their owners; None without a mesh.

    Returns:
      The stacks by name.
    """
    if plan is None:
        return _on_one_device(make, leaves)
    numbers = first_numbers(leaves)

    def local() -> dict[str, MatrixStack]:
        ids = [
            _batch_ids(leaf, here)
            for leaf, here in zip(leaves, plan.views, strict=True)
        ]
        stacks = {}
        for stack in stack_rows(plan):
            found = []
            for member in stack.group.members:
                # A leaf that is cut before the exchange has several per batch entry.
                each = member.count // len(ids[member.leaf]) * stack.per_slot
                first = numbers[member.leaf, (stack.m, stack.n)]
                start = first + ids[member.leaf] * each
                step = jnp.arange(0, each, stack.per_slot, dtype=jnp.int32)
                found.append(jnp.ravel(start[:, None] + step[None]))
            mine = _own(stack.group, jnp.concatenate(found))
            blocks = jnp.arange(stack.per_slot, dtype=jnp.int32)
            own = jnp.where(mine[:, None] < 0, -1, mine[:, None] + blocks[None])
            dtype = _linalg.at_least_float32(stack.group.dtype)
            one = make(stack.m, stack.n, dtype)
            stacks[stack.name] = MatrixStack(jnp.ravel(own), _repeated(one, stack.rows))
        return stacks

    init = jax.shard_map(
        local, mesh=plan.mesh, in_specs=(), out_specs=stack_specs(plan), check_vma=False
    )
    # Compiled, the types on explicit axes have an entry for every axis. Otherwise the
    # second update would see another type than the first one, and compile again.
    return jax.jit(init)() if AxisType.Explicit in plan.mesh.axis_types else init()


def _on_one_device(make: Make, leaves: Sequence[Leaf]) -> dict[str, MatrixStack]:
    numbers, stacks = first_numbers(leaves), {}
    for name, members in by_shape(leaves, transposable=False):
        ids = []
        for i, j, _ in members:
            count, m, n = leaves[i].view.matrices[j]
            ids.append(numbers[i, (m, n)] + jnp.arange(count, dtype=jnp.int32))
        (i, j, _), rows = members[0], sum(len(x) for x in ids)
        _, m, n = leaves[i].view.matrices[j]
        dtype = _linalg.at_least_float32(leaves[i].value.dtype)
        one = make(m, n, dtype)
        stacks[name] = MatrixStack(jnp.concatenate(ids), _repeated(one, rows))
    return stacks


def _repeated(one: Any, rows: int) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape)), one)


def _batch_ids(leaf: Leaf, here: MatrixView) -> Array:
    """Returns the global index of each entry of the batch that this device holds."""
    over, ids = axes_of(leaf), jnp.zeros((1,), jnp.int32)
    for axis in leaf.view.batch:
        size, held = leaf.view.shape[axis], here.shape[axis]
        first = lax.axis_index(over[axis]) * held if over[axis] else 0
        own = first + jnp.arange(held, dtype=jnp.int32)
        ids = jnp.ravel(ids[:, None] * size + own[None])
    return ids


def _own(group: Group, numbers: Array) -> Array:
    """Returns the numbers of the matrices that this device owns; -1 is padding."""
    dealt = exchange.deal(group, numbers + 1) - 1
    index = lax.axis_index(group.axes) if group.axes else 0
    return lax.dynamic_index_in_dim(dealt, index, axis=1, keepdims=False)


def check_states(expected: dict[str, int], states: dict[str, MatrixStack]) -> None:
    """Raises unless the states have the expected names and numbers of rows.

    Raises:
      ValueError: If they belong to other matrices, or were made on another mesh.
    """
    found = {name: len(stack.numbers) for name, stack in states.items()}
    if found != expected:
        raise ValueError(
            f"The state has stacks with {found} rows, the updates need {expected}. "
            "Updates must have the shapes and shardings that the parameters had at "
            "`init`, and on a mesh with auto axes `placement` must be passed. For "
            "state that was saved on another mesh, see `relay_state`."
        )
