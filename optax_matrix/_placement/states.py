"""State of every matrix, which lies with its owner."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType
from jax.typing import DTypeLike

from optax_matrix import _linalg
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
    stacks = stack_rows(plan)
    for group in plan.groups:
        yield group, [next(stacks) for _ in group.stacks]


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
        ids = [_batch_ids(leaf) for leaf in leaves]
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

    specs: Any = stack_specs(plan)
    if AxisType.Explicit in plan.mesh.axis_types:
        specs = _full_specs(make, plan, specs)
    return jax.shard_map(
        local, mesh=plan.mesh, in_specs=(), out_specs=specs, check_vma=False
    )()


def _full_specs(make: Make, plan: Plan, short: dict[str, jax.P]) -> Any:
    """Returns specs with an entry for every axis, as types on explicit axes have them.

    With short ones the second update would see another type than the first one, and
    compile again.
    """
    specs = {}
    for stack in stack_rows(plan):
        dtype = _linalg.at_least_float32(stack.group.dtype)
        one = jax.eval_shape(lambda s=stack, d=dtype: make(s.m, s.n, d))
        spec = short[stack.name]
        state = jax.tree.map(lambda x, p=spec: jax.P(*p, *[None] * x.ndim), one)
        specs[stack.name] = MatrixStack(numbers=spec, state=state)  # pyright: ignore
    return specs


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


def _batch_ids(leaf: Leaf) -> Array:
    """Returns the global index of each entry of the batch that this device holds."""
    assert leaf.sharding is not None
    sizes, over = leaf.sharding.mesh.shape, axes_of(leaf)
    ids = jnp.zeros((1,), jnp.int32)
    for axis in leaf.view.batch:
        size = here = leaf.view.shape[axis]
        index = jnp.zeros((), jnp.int32)
        for name in over[axis]:
            here //= sizes[name]
            index = index * sizes[name] + lax.axis_index(name)
        own = index * here + jnp.arange(here, dtype=jnp.int32)
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
