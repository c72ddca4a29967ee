"""Rules that keep state for every matrix: it lives and is refreshed on its device."""

import dataclasses
import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType
from jax.typing import DTypeLike

from optax_matrix import _linalg
from optax_matrix._placement import work
from optax_matrix._placement.plan import Group, Kind, Plan
from optax_matrix._placement.stacks import over_units

Scalars = Mapping[str, Array]


class MatrixRule(Protocol):
    """What happens to one matrix, (m, n), and the state it has; hashable.

    An update is `before`, then `refresh` of those whose turn it is, then `after`.
    Numbers that may be traced come in `scalars`, among them ``count``, how many updates
    came before.
    """

    def init(self, m: int, n: int, dtype: DTypeLike) -> Any:
        """Returns the state of an m×n matrix."""
        ...

    def before(self, x: Array, state: Any, scalars: Scalars) -> tuple[Array, Any]:
        """Returns what `after` takes, and the new state."""
        ...

    def refresh(self, state: Any, scalars: Scalars) -> Any:
        """Returns the state with what is dear to compute brought up to date."""
        ...

    def after(self, x: Array, state: Any, scalars: Scalars) -> Array:
        """Returns the update, in any dtype."""
        ...

    def first(self, state: Any, scalars: Scalars) -> Any:
        """Returns the state at the first refresh."""
        ...

    def refresh_cost(self, m: int, n: int) -> float:
        """Returns how dear a refresh is beside those of other shapes."""
        ...


@dataclasses.dataclass(frozen=True)
class Cadence:
    """When state is refreshed.

    Attributes:
      start: The update, from 0, at which all of it is for the first time.
      every: And again after so many.
      staggered: Whether each matrix then has its own step of the `every`.
    """

    start: int
    every: int
    staggered: bool


def init_states(rule: MatrixRule, plan: Plan) -> dict[str, Any]:
    """The state for every stack of matrices, by name, each device having its share."""

    def local() -> dict[str, Any]:
        states = {}
        for name, _, kind, (count, m, n) in _stacks(plan):
            one = rule.init(m, n, _linalg.at_least_float32(kind.dtype))
            states[name] = jax.tree.map(
                lambda x, count=count: jnp.broadcast_to(x, (count, *x.shape)), one
            )
        return states

    if plan.mesh is None:
        return local()
    short = specs = _specs(plan)
    if AxisType.Explicit in plan.mesh.axis_types:
        # Types on explicit axes have full specs: in short ones the second update would
        # see another type than the first, and recompile.
        specs = {
            name: jax.tree.map(
                lambda x, name=name: jax.P(*short[name], *[None] * (x.ndim - 1)), state
            )
            for name, state in jax.eval_shape(local).items()
        }
    return jax.shard_map(
        local, mesh=plan.mesh, in_specs=(), out_specs=specs, check_vma=False
    )()


def check_states(plan: Plan, states: Mapping[str, Any]) -> None:
    """Raises unless the states are those of the plan.

    Raises:
      ValueError: If they are of other matrices, or laid out for another mesh.
    """
    devices = math.prod(plan.mesh.shape.values()) if plan.mesh is not None else 1
    expected = {name: shape[0] * devices for name, _, _, shape in _stacks(plan)}
    found = {name: len(jax.tree.leaves(state)[0]) for name, state in states.items()}
    if found != expected:
        raise ValueError(
            f"The state has stacks of {found} matrices, the updates need {expected}. "
            "Updates must have the shapes and shardings that the parameters had at "
            "`init`, and as many devices; on a mesh with auto axes pass `placement`."
        )


@partial(jax.jit, static_argnums=(0, 1, 2))
def update_states(
    plan: Plan,
    rule: MatrixRule,
    cadence: Cadence,
    leaves: tuple[Array, ...],
    states: dict[str, Any],
    scalars: Scalars,
) -> tuple[tuple[Array, ...], dict[str, Any]]:
    """The leaves with every matrix worked on by the rule, and the new states."""
    turns = _turns(rule, plan, cadence)

    def local(leaves, states, scalars):
        kept: dict[str, Any] = {}

        def on_group(
            group: Group, kind: Kind, arrays: Sequence[Array], parts: int
        ) -> list[Array]:
            del parts  # always 1: a rule takes whole matrices
            x = jnp.concatenate(arrays)
            view = work.in_blocks(kind, x.shape[0])
            names = [name for name, of, _, _ in _stacks(plan) if of is group]
            done = []
            for name, stack in zip(names, view.to_stacks(x), strict=True):
                y, kept[name] = _step(
                    rule,
                    cadence,
                    turns[name],
                    group.stack_size,
                    stack,
                    states[name],
                    scalars,
                )
                done.append(y)
            ends = np.cumsum([len(x) for x in arrays])
            return jnp.split(view.from_stacks(done), ends[:-1])

        return work.on_device(plan, on_group, leaves), kept

    if plan.mesh is None:
        return local(leaves, states, scalars)
    specs = _specs(plan)
    return jax.shard_map(
        local,
        mesh=plan.mesh,
        in_specs=(plan.specs, specs, jax.P()),
        out_specs=(plan.specs, specs),
        check_vma=False,
    )(leaves, states, scalars)


def _step(
    rule: MatrixRule,
    cadence: Cadence,
    turns: np.ndarray,
    at_once: int,
    x: Array,
    state: Any,
    scalars: Scalars,
) -> tuple[Array, Any]:
    """One update of a stack (count, m, n); row t of `turns` is who is due at t."""
    count = x.shape[0]
    since = scalars["count"] - cadence.start

    def each(fn, *trees):
        return over_units(lambda *xs: fn(*xs, scalars), trees, at_once)

    def all_of(fn, state):
        # Factorizations take long to compile and gain nothing side by side.
        return over_units(lambda s: fn(s, scalars), [state], at_once, unrolled=1)

    def first(state: Any) -> Any:
        return all_of(rule.first, state)

    def due(state: Any) -> Any:
        if not cadence.staggered:
            return all_of(rule.refresh, state)
        mine = jnp.asarray(turns)[since % cadence.every]
        some = jax.tree.map(lambda s: jnp.take(s, mine, axis=0, mode="clip"), state)
        done = all_of(rule.refresh, some)
        return jax.tree.map(lambda s, d: s.at[mine].set(d, mode="drop"), state, done)

    y, state = each(rule.before, x, state)
    anyone = jnp.asarray((turns < count).any(axis=1))[since % cadence.every]
    case = jnp.where(since == 0, 2, jnp.where((since > 0) & anyone, 1, 0))
    state = lax.switch(case, [lambda state: state, due, first], state)
    return each(rule.after, y, state).astype(x.dtype), state


def _stacks(
    plan: Plan,
) -> Iterator[tuple[str, Group, Kind, tuple[int, int, int]]]:
    """Name, group, kind and (count, m, n) of each stack that a device holds."""
    seen: dict[str, int] = {}
    for group in plan.groups:
        kind = group.batches[0].kind
        for shape in work.in_blocks(kind, group.busiest(group.lots)).matrices:
            name = f"{shape[1]}x{shape[2]}"
            seen[name] = seen.get(name, 0) + 1
            if seen[name] > 1:
                name = f"{name}.{seen[name]}"
            yield name, group, kind, shape


def _specs(plan: Plan) -> dict[str, jax.P]:
    """How the states of a plan are sharded: their first axis, over all devices."""
    assert plan.mesh is not None
    specs = {}
    for name, group, _, _ in _stacks(plan):
        others = [
            axis
            for axis, size in plan.mesh.shape.items()
            if size > 1 and axis not in group.axes
        ]
        specs[name] = jax.P((*others, *group.axes))
    return specs


def _turns(rule: MatrixRule, plan: Plan, cadence: Cadence) -> dict[str, np.ndarray]:
    """For every stack, who is due at each step of a round: (every, most), padded.

    Staggered, the dearest goes first to the step that has the least to do so far.
    """
    every = cadence.every
    lists: dict[str, list[list[int]]] = {}
    units = []
    for name, _, _, (count, m, n) in _stacks(plan):
        lists[name] = [[] for _ in range(every)]
        units += [(-rule.refresh_cost(m, n), name, i) for i in range(count)]
    loads = [(0.0, step) for step in range(every)]
    for cost, name, i in sorted(units) if cadence.staggered else units:
        if cadence.staggered:
            load, step = heapq.heappop(loads)
            heapq.heappush(loads, (load - cost, step))
        else:
            step = 0
        lists[name][step].append(i)
    tables = {}
    for name, _, _, (count, _, _) in _stacks(plan):
        most = max(len(due) for due in lists[name])
        # A number past the last stands for no one.
        rows = [due + [count] * (most - len(due)) for due in lists[name]]
        tables[name] = np.asarray(rows, np.int32)
    return tables
