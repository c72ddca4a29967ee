"""Applies work to all matrices, each on its owner."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import jax
from jax import Array

from optax_matrix import _mesh
from optax_matrix._layout import MatrixView
from optax_matrix._placement import exchange, states
from optax_matrix._placement.groups import Group, Plan, make_plans
from optax_matrix._placement.placement import Leaf
from optax_matrix._placement.stacks import by_shape, concatenated, split_like

States = dict[str, states.MatrixStack]


class Work(Protocol):
    """What is done to the matrices of one shape on one device; hashable."""

    def __call__(
        self, arrays: Sequence[Array], state: Any, scalars: Any
    ) -> tuple[list[Array], Any]:
        """Returns results like `arrays`, (count, m, n) each, and the new state.

        Args:
          arrays: The matrices.
          state: A `MatrixStack` with their states in the same order, or None.
          scalars: Numbers that may be traced.
        """
        ...


def map_matrices(
    work: Work,
    leaves: Sequence[Leaf],
    state: States | None = None,
    scalars: Any = None,
    *,
    transposable: bool = False,
    stack_size: int | None = None,
) -> tuple[list[Array], States | None]:
    """Applies `work` to every matrix of the leaves, each on its owner.

    Args:
      work: What to do.
      leaves: The leaves.
      state: The states of the matrices, from `init`; None for work without state.
      scalars: Numbers for `work` that may be traced.
      transposable: Whether `work` may be given matrices transposed.
      stack_size: The number of matrices in a round; None is 1 GiB of them.

    Returns:
      Arrays like the leaves, with their shardings, and the new states.
    """
    results = [leaf.value for leaf in leaves]
    for where, plan in make_plans(leaves, transposable, stack_size):
        some = [leaves[i] for i in where]
        arrays = tuple(leaf.value for leaf in some)
        if plan is None:
            arrays = tuple(map(_mesh.gathered, arrays))
            views = tuple(leaf.view for leaf in some)
            done, state = on_one_device(
                work, views, transposable, arrays, state, scalars
            )
            done = map(_mesh.like, done, (leaf.value for leaf in some))
        else:
            done, state = _on_mesh(plan, work, arrays, state, scalars)
        for i, x in zip(where, done, strict=True):
            results[i] = x
    return results, state


def init_states(
    make: states.Make, leaves: Sequence[Leaf], stack_size: int | None
) -> States:
    """Makes the state of every matrix of the leaves, each with its owner.

    Args:
      make: Makes the state of one matrix from its inputs, outputs and dtype.
      leaves: The leaves.
      stack_size: As for `map_matrices`.

    Raises:
      ValueError: If the leaves lie on different meshes.
    """
    plans = make_plans(leaves, False, stack_size)
    if len(plans) > 1:
        meshes = [plan and plan.mesh for _, plan in plans]
        raise ValueError(
            f"The leaves lie on different meshes, or some on none: {meshes}. Put them "
            "on one mesh, or give each its own optimizer with `optax.partition`."
        )
    for where, plan in plans:
        return states.init_states(make, [leaves[i] for i in where], plan)
    return {}


@partial(jax.jit, static_argnums=(0, 1, 2))
def on_one_device(
    work: Work,
    views: tuple[MatrixView, ...],
    transposable: bool,
    arrays: tuple[Array, ...],
    state: States | None,
    scalars: Any,
) -> tuple[tuple[Array, ...], States | None]:
    """Works on the matrices of each shape together."""
    leaves = [Leaf(x, view, None) for x, view in zip(arrays, views, strict=True)]
    stacks = by_shape(leaves, transposable)
    found = [list(view.to_stacks(x)) for x, view in zip(arrays, views, strict=True)]
    if state is not None:
        rows = {
            name: sum(len(found[i][j]) for i, j, _ in members)
            for name, members in stacks
        }
        states.check_states(rows, state)
    kept = {}
    for name, members in stacks:
        given = [found[i][j].mT if turn else found[i][j] for i, j, turn in members]
        done, kept[name] = work(given, state and state[name], scalars)
        for (i, j, turn), y in zip(members, done, strict=True):
            found[i][j] = y.mT if turn else y
    results = tuple(view.from_stacks(ys) for view, ys in zip(views, found, strict=True))
    return results, None if state is None else kept


@partial(jax.jit, static_argnums=(0, 1))
def _on_mesh(
    plan: Plan,
    work: Work,
    arrays: tuple[Array, ...],
    state: States | None,
    scalars: Any,
) -> tuple[tuple[Array, ...], States | None]:
    """Works on the matrices of each group, each on its owner."""
    specs = None
    if state is not None:
        specs = states.stack_specs(plan)
        devices = plan.mesh.size
        rows = {s.name: s.rows * devices for s in states.stack_rows(plan)}
        states.check_states(rows, state)
    return jax.shard_map(
        partial(_on_device, plan, work),
        mesh=plan.mesh,
        in_specs=(plan.specs, specs, jax.P()),
        out_specs=(plan.specs, specs),
        # It cannot see that what every device sends to all is replicated.
        check_vma=False,
    )(arrays, state, scalars)


def _on_device(
    plan: Plan,
    work: Work,
    arrays: tuple[Array, ...],
    state: States | None,
    scalars: Any,
) -> tuple[tuple[Array, ...], States | None]:
    """Does what one device does, given its shards of the leaves and of the states."""
    found = [
        list(view.to_stacks(x)) for view, x in zip(plan.views, arrays, strict=True)
    ]
    kept: States = {}
    for group, stacks in states.stacks_by_group(plan):
        held = [found[m.leaf][m.stack] for m in group.members]
        held = [
            x.mT if m.transposed else x
            for m, x in zip(group.members, held, strict=True)
        ]
        pieces = [x.reshape(len(x), *group.piece) for x in held]
        done, new = _on_group(group, stacks, work, pieces, state, scalars)
        kept |= new
        for m, x, y in zip(group.members, held, done, strict=True):
            y = y.reshape(x.shape)
            found[m.leaf][m.stack] = y.mT if m.transposed else y
    results = tuple(
        view.from_stacks(ys) for view, ys in zip(plan.views, found, strict=True)
    )
    return results, None if state is None else kept


def _on_group(
    group: Group,
    stacks: Sequence[states.StackRows],
    work: Work,
    pieces: Sequence[Array],
    state: States | None,
    scalars: Any,
) -> tuple[list[Array], States]:
    """Exchanges the matrices of a group and works on them, one round after another."""
    done, kept = [], []
    for start, stop in group.rounds():
        part = concatenated(
            list(_range(pieces, start * group.owners, stop * group.owners))
        )
        with jax.named_scope("exchange"):
            owned = exchange.to_owners(group, part)
        view, results, new = group.blocks(stop - start), [], {}
        for stack, x in zip(stacks, view.to_stacks(owned), strict=True):
            rows = slice(start * stack.per_slot, stop * stack.per_slot)
            old = jax.tree.map(lambda s, r=rows: s[r], state and state[stack.name])
            owned_by_all = (group.full_slots - start) * stack.per_slot
            y, new[stack.name] = _on_owned(group, work, owned_by_all, x, old, scalars)
            results.append(y)
        with jax.named_scope("exchange"):
            whole = view.from_stacks(results)
            done.append(exchange.from_owners(group, whole, len(part)))
        kept.append(new)
    joined = jax.tree.map(lambda *rounds: concatenated(rounds), *kept)
    return split_like(concatenated(done), pieces), joined


def _on_owned(
    group: Group, work: Work, count: int, x: Array, state: Any, scalars: Any
) -> tuple[Array, Any]:
    """Works on the first `count` matrices, and on the rest if this device owns them.

    Only the last slot of a group may be empty on some devices, which then do nothing.
    """

    def on(part: slice) -> tuple[Array, Any]:
        (y,), new = work([x[part]], jax.tree.map(lambda s: s[part], state), scalars)
        return y, new

    def idle() -> tuple[Array, Any]:
        return x[count:], jax.tree.map(lambda s: s[count:], state)

    if count >= len(x):
        return on(slice(None))
    last = jax.lax.cond(exchange.owns_last(group), lambda: on(slice(count, None)), idle)
    if count == 0:
        return last
    return jax.tree.map(lambda *s: concatenated(s), on(slice(count)), last)


def _range(arrays: Sequence[Array], start: int, stop: int) -> Iterator[Array]:
    """Yields what several arrays have of a range of their concatenation."""
    for x in arrays:
        low, high = max(start, 0), min(stop, len(x))
        if low < high:
            yield x[low:high]
        start, stop = start - len(x), stop - len(x)
