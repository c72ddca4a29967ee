"""Rules that keep state for every matrix: it lives and is refreshed on its device."""

import dataclasses
import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType
from jax.typing import DTypeLike

from optax_matrix import _linalg
from optax_matrix._placement import work
from optax_matrix._placement.plan import Group, Kind, Plan, Shared
from optax_matrix._placement.stacks import over_units

Scalars = Mapping[str, Array]


class MatrixRule(Shared, Protocol):
    """What happens to one matrix, (m, n), and the state it has; hashable.

    An update is `before`, then for those whose turn it is `prepare`, `factor` and
    `finish`, then `after`. Numbers that may be traced come in `scalars`, among them
    ``count``, how many updates came before.

    Devices that share a matrix all have its gradient, and of every array of its state
    the rows that are theirs, `parts.own`; so `before` and `after` return rows, and what
    is needed whole of the state is gathered. What cannot be shared is in `factor`,
    which one of them does. On one device all is whole.
    """

    def init(self, m: int, n: int, dtype: DTypeLike) -> Any:
        """Returns the state of an m×n matrix."""
        ...

    def before(
        self, x: Array, state: Any, scalars: Scalars, parts: _linalg.Parts
    ) -> tuple[Array, Any]:
        """Returns what `after` takes, and the new state."""
        ...

    def prepare(
        self, state: Any, scalars: Scalars, first: bool, parts: _linalg.Parts
    ) -> Any:
        """Returns what the factorizations of a refresh, the first or a later one, take.

        Arrays, all of each.
        """
        ...

    def factor(self, given: Any, scalars: Scalars, first: bool) -> Any:
        """Returns the factorizations, arrays."""
        ...

    def finish(
        self,
        state: Any,
        given: Any,
        found: Any,
        scalars: Scalars,
        first: bool,
        parts: _linalg.Parts,
    ) -> Any:
        """Returns the refreshed state, from what `prepare` and `factor` returned."""
        ...

    def after(
        self, x: Array, state: Any, scalars: Scalars, parts: _linalg.Parts
    ) -> Array:
        """Returns the update, in any dtype."""
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

    def units() -> Iterator[tuple[_Stack, Any]]:
        """The state of one matrix of each stack, all of it."""
        for stack in _stacks(plan):
            dtype = _linalg.at_least_float32(stack.dtype)
            yield stack, rule.init(stack.m, stack.n, dtype)

    def local() -> dict[str, Any]:
        states = {}
        for stack, one in units():
            rows = partial(_rows, work.sharing(stack.group, stack.parts))
            one = jax.tree.map(rows, one)
            states[stack.name] = jax.tree.map(
                lambda x, count=stack.count: jnp.broadcast_to(x, (count, *x.shape)), one
            )
        return states

    if plan.mesh is None:
        return local()
    short = specs = _specs(plan)
    if AxisType.Explicit in plan.mesh.axis_types:
        # Types on explicit axes have full specs: in short ones the second update would
        # see another type than the first, and recompile.
        wholes = jax.eval_shape(lambda: {stack.name: one for stack, one in units()})
        specs = {
            name: jax.tree.map(
                lambda x, name=name: jax.P(*short[name], *[None] * x.ndim), one
            )
            for name, one in wholes.items()
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
    expected = {stack.name: stack.count * devices for stack in _stacks(plan)}
    found = {name: len(jax.tree.leaves(state)[0]) for name, state in states.items()}
    if found != expected:
        raise ValueError(
            f"The state has stacks of {found} entries, the updates need {expected}. "
            "Updates must have the shapes and shardings that the parameters had at "
            "`init`, as many devices, and the same settings of `placement`, which on a "
            "mesh with auto axes must be passed. (`.inP`: each matrix is in P parts.)"
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
            x = jnp.concatenate(arrays)
            view = work.in_blocks(kind, x.shape[0])
            mine = [s for s in _stacks(plan) if s.group is group and s.parts == parts]
            done = []
            for stack, matrices in zip(mine, view.to_stacks(x), strict=True):
                name = stack.name
                y, kept[name] = _step(
                    rule, cadence, turns[name], stack, matrices, states[name], scalars
                )
                done.append(y)
            ends = np.cumsum([len(x) for x in arrays])
            return jnp.split(view.from_stacks(done), ends[:-1])

        return work.on_device(plan, on_group, leaves, joined=True), kept

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
    stack: "_Stack",
    x: Array,
    state: Any,
    scalars: Scalars,
) -> tuple[Array, Any]:
    """One update of a stack (count, m, n); row t of `turns` is who is due at t."""
    count, at_once = x.shape[0], stack.group.stack_size
    parts = work.sharing(stack.group, stack.parts)
    since = scalars["count"] - cadence.start

    def each(fn, *trees):
        return over_units(lambda *xs: fn(*xs, scalars, parts), trees, at_once)

    refreshed = partial(_refreshed, rule, parts, at_once, scalars)

    def first(state: Any) -> Any:
        return refreshed(True, state)

    def due(state: Any) -> Any:
        if not cadence.staggered:
            return refreshed(False, state)
        mine = jnp.asarray(turns)[since % cadence.every]
        some = jax.tree.map(lambda s: jnp.take(s, mine, axis=0, mode="clip"), state)
        done = refreshed(False, some)
        return jax.tree.map(lambda s, d: s.at[mine].set(d, mode="drop"), state, done)

    y, state = each(rule.before, x, state)
    anyone = jnp.asarray((turns < count).any(axis=1))[since % cadence.every]
    case = jnp.where(since == 0, 2, jnp.where((since > 0) & anyone, 1, 0))
    state = lax.switch(case, [lambda state: state, due, first], state)
    rows = each(rule.after, y, state).astype(x.dtype)
    return parts.gather(rows, stack.m), state


def _refreshed(
    rule: MatrixRule,
    parts: _linalg.Parts,
    at_once: int,
    scalars: Scalars,
    first: bool,
    state: Any,
) -> Any:
    """The state of some matrices, refreshed."""

    def each(fn, *trees):
        # Factorizations take long to compile and gain nothing side by side.
        return over_units(fn, trees, at_once, unrolled=1)

    def prepare(one: Any) -> Any:
        return rule.prepare(one, scalars, first, parts)

    def factor(given: Any) -> Any:
        return rule.factor(given, scalars, first)

    def finish(one: Any, given: Any, found: Any) -> Any:
        return rule.finish(one, given, found, scalars, first, parts)

    def alone(one: Any) -> Any:
        given = prepare(one)
        return finish(one, given, factor(given))

    if parts.count == 1:
        return each(alone, state)
    # Of the matrices that they share each device factorizes some.
    given = each(prepare, state)
    count = len(jax.tree.leaves(given)[0])

    def flat(x: Array) -> Array:
        return jnp.reshape(x, (x.shape[0], -1))

    mine = jax.tree.map(
        lambda x: jnp.reshape(parts.own(flat(x)), (-1, *x.shape[1:])), given
    )
    found = jax.tree.map(
        lambda x: jnp.reshape(parts.gather(flat(x), count), (-1, *x.shape[1:])),
        each(factor, mine),
    )
    return each(finish, state, given, found)


def _rows(parts: _linalg.Parts, x: Array) -> Array:
    """What a part has of an array of a state; numbers are the same for all."""
    if x.ndim < 2:
        return parts.own(x[:, None])[:, 0] if x.ndim else x
    return parts.own(x)


class _Stack(NamedTuple):
    """Matrices of one shape, or blocks of them, that a device works on.

    Attributes:
      name: Of their state.
      group: Where they are from.
      parts: Among how many devices each is shared.
      dtype: Of the leaves.
      count: How many there are.
      m: Their inputs.
      n: Their outputs.
    """

    name: str
    group: Group
    parts: int
    dtype: str
    count: int
    m: int
    n: int


def _stacks(plan: Plan) -> Iterator[_Stack]:
    """The stacks that a device holds."""
    seen: dict[str, int] = {}
    for group in plan.groups:
        for where in group.pools():
            lots = [group.lots[i] for i in where]
            kind, parts = lots[0].batches[0].kind, lots[0].parts
            for shape in work.in_blocks(kind, group.busiest(lots)).matrices:
                name = f"{shape[1]}x{shape[2]}"
                if parts > 1:
                    name += f".in{parts}"
                seen[name] = seen.get(name, 0) + 1
                if seen[name] > 1:
                    name = f"{name}.{seen[name]}"
                yield _Stack(name, group, parts, kind.dtype, *shape)


def _specs(plan: Plan) -> dict[str, jax.P]:
    """How the states of a plan are sharded: their first axis, over all devices."""
    assert plan.mesh is not None
    specs = {}
    for stack in _stacks(plan):
        axes = stack.group.axes
        others = [
            a for a, size in plan.mesh.shape.items() if size > 1 and a not in axes
        ]
        specs[stack.name] = jax.P((*others, *axes))
    return specs


def _turns(rule: MatrixRule, plan: Plan, cadence: Cadence) -> dict[str, np.ndarray]:
    """For every stack, who is due at each step of a round: (every, most), padded.

    Staggered, the dearest goes first to the step that has the least to do so far.
    """
    every = cadence.every
    lists: dict[str, list[list[int]]] = {}
    units = []
    for stack in _stacks(plan):
        lists[stack.name] = [[] for _ in range(every)]
        cost = -rule.refresh_cost(stack.m, stack.n)
        units += [(cost, stack.name, i) for i in range(stack.count)]
    loads = [(0.0, step) for step in range(every)]
    for cost, name, i in sorted(units) if cadence.staggered else units:
        if cadence.staggered:
            load, step = heapq.heappop(loads)
            heapq.heappush(loads, (load - cost, step))
        else:
            step = 0
        lists[name][step].append(i)
    tables = {}
    for stack in _stacks(plan):
        most = max(len(due) for due in lists[stack.name])
        # A number past the last stands for no one.
        rows = [due + [stack.count] * (most - len(due)) for due in lists[stack.name]]
        tables[stack.name] = np.asarray(rows, np.int32)
    return tables
