"""How matrices are spread over a mesh and brought back; the only resharder."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax import Array

from optax_matrix import _check, _linalg, _mesh, _paths
from optax_matrix._layout import MatrixView
from optax_matrix._placement import work
from optax_matrix._placement.cost import PlacementDescription, group_cost
from optax_matrix._placement.plan import Leaf, Plan, Shared, make_plan
from optax_matrix._placement.rules import Strategy
from optax_matrix._placement.stateful import (
    Cadence,
    MatrixRule,
    Scalars,
    check_states,
    init_states,
    update_states,
)

__all__ = [
    "Cadence",
    "MatrixRule",
    "Placement",
    "PlacementDescription",
    "Scalars",
    "Strategy",
    "check",
    "describe",
    "init",
    "polar",
    "update",
]


def _sharding(leaf: Any) -> Any:
    """The sharding of an array or of its description; a sharding, or None, as it is."""
    return getattr(leaf, "sharding", leaf)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the matrices of a tree lie, and how they are worked on.

    On a mesh with explicit axes (the default of `jax.make_mesh` since JAX 0.9) types
    say where leaves lie, and no `Placement` is needed. On a mesh with auto axes it is
    invisible while a function is traced: pass the parameters or their shardings here.
    Without, leaves are taken for replicated if a mesh is set (`jax.set_mesh`), so that
    sharded ones are gathered first, and else every product is left to the compiler.

    Args:
      sharding: The sharded parameters, or a tree (prefix) of what they have in
        `sharding`: `jax.sharding.NamedSharding`s on one mesh. Updates must lie alike.
      stack_size: The most matrices of one shape that a device multiplies at once, or
        brings together in one exchange. 1 is a loop, which is fastest on CPU; larger
        stacks take more memory. None for the rule: 1 on CPU, and elsewhere stacks of
        2²⁶ entries, exchanged 1 GiB a device at a time.
      flops_per_byte: What receiving a byte is worth, in FLOPs of one device: its speed
        over that of its links, for an H100 with 400 TFLOP/s about 900 within a host
        (450 GB/s) and 8,000 between hosts (50 GB/s). Where matrices do not go round the
        devices, those left over are cut in parts, which tell one another what they
        found, if that is worth it. 0, the default, is for FLOPs alone: then no device
        has more than 1.1 times an even split of the products, wherever that can be.

    Raises:
      TypeError: At construction, if `sharding` has leaves without a named sharding, or
        `stack_size` is not an int or `flops_per_byte` not a number.
      ValueError: At construction, if `stack_size` is below 1, or `flops_per_byte`
        negative or not finite.

    Example:
      >>> import jax
      >>> mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
      >>> everywhere = jax.NamedSharding(mesh, jax.P())
      >>> placement = Placement(everywhere)  # one for all leaves
    """

    sharding: Any = None
    stack_size: int | None = None
    flops_per_byte: float = 0.0

    def __post_init__(self) -> None:
        """Keeps the shardings of parameters, not the parameters."""
        if self.stack_size is not None:
            _check.static_int("stack_size", self.stack_size, 1)
        _check.static_number("flops_per_byte", self.flops_per_byte)
        _check.in_range("flops_per_byte", self.flops_per_byte, 0.0)
        tree = jax.tree.map(_sharding, _paths.unboxed(self.sharding))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not isinstance(leaf, jax.sharding.Sharding):
                raise TypeError(
                    "`sharding` must hold sharded arrays or shardings, got "
                    f"{type(leaf).__name__} at '{_paths.path_name(path)}'. Pass the "
                    "parameters, or jax.tree.map(lambda p: p.sharding, params)."
                )
        object.__setattr__(self, "sharding", tree)

    @property
    def strategy(self) -> Strategy:
        """What it sets by hand."""
        return Strategy(self.stack_size, float(self.flops_per_byte))

    def of(self, tree: Any, as_typed: bool = False) -> list[jax.NamedSharding | None]:
        """The sharding of every leaf of `tree`; None where there is one device.

        Inside of a user's `jax.shard_map` every device has its own leaves.

        Args:
          tree: Arrays or their descriptions.
          as_typed: Whether to go by types alone, as state must that is laid out by
            `init` outside of `jax.jit` and taken up by `update` inside.
        """
        if self.sharding is None or _mesh.inside_shard_map():
            found = _mesh.typed if as_typed else _mesh.seen
            return [found(leaf) for leaf in jax.tree.leaves(tree)]
        matched = _paths.match(self.sharding, tree, "sharding", lambda _: False)
        return [
            entry if isinstance(entry, jax.NamedSharding) else None
            for _, entry, _ in matched
        ]


def polar(
    method: _linalg.PolarMethod,
    views: Sequence[MatrixView],
    leaves: Sequence[Array],
    shardings: Sequence[jax.NamedSharding | None],
    strategy: Strategy,
) -> list[Array]:
    """Replaces every matrix of the leaves by its polar factor, spread over the mesh.

    Args:
      method: How.
      views: The matrices of each leaf.
      leaves: The leaves.
      shardings: Where each lies; None is on one device, or not known.
      strategy: What is set by hand.

    Returns:
      Leaves like `leaves`, sharded alike.
    """
    results: list[Array] = list(leaves)
    for plan, indices in _plans(*_shared(method), views, leaves, shardings, strategy):
        given = [leaves[i] for i in indices]
        if plan.mesh is None:
            given = [_mesh.gathered(leaf) for leaf in given]
        for i, done in zip(indices, _run(plan, method, *given), strict=True):
            results[i] = _mesh.like(done, leaves[i]) if plan.mesh is None else done
    return results


def check(
    method: _linalg.PolarMethod,
    views: Sequence[MatrixView],
    leaves: Sequence[Any],
    shardings: Sequence[jax.NamedSharding | None],
    strategy: Strategy,
) -> None:
    """Raises what `polar` would raise about shardings; leaves may be descriptions."""
    _plans(*_shared(method), views, leaves, shardings, strategy)


def init(
    rule: MatrixRule,
    views: Sequence[MatrixView],
    leaves: Sequence[Any],
    shardings: Sequence[jax.NamedSharding | None],
    strategy: Strategy,
) -> dict[str, Any]:
    """The state of a rule for every matrix of the leaves, by shape.

    Matrices of one shape are one stack, whose first axis is spread over all devices.
    """
    plans = _plans(rule, False, views, leaves, shardings, strategy)
    if len(plans) > 1:
        raise ValueError(
            "The leaves lie on different meshes, or some on none: "
            f"{[plan.mesh for plan, _ in plans]}. Put them on one mesh, or give each "
            "its own optimizer with `optax.partition`."
        )
    return {k: v for plan, _ in plans for k, v in init_states(rule, plan).items()}


def update(
    rule: MatrixRule,
    cadence: Cadence,
    views: Sequence[MatrixView],
    leaves: Sequence[Array],
    shardings: Sequence[jax.NamedSharding | None],
    states: dict[str, Any],
    scalars: Scalars,
    strategy: Strategy,
) -> tuple[list[Array], dict[str, Any]]:
    """Applies a rule to every matrix of the leaves, spread over the mesh.

    Args:
      rule: What happens to each matrix.
      cadence: When its state is refreshed.
      views: The matrices of each leaf.
      leaves: The leaves.
      shardings: Where each lies; None is on one device, or not known.
      states: What `init` returned, or the last update.
      scalars: Numbers that the rule takes, with ``count``.
      strategy: What is set by hand.

    Returns:
      Leaves like `leaves`, sharded alike, and the new states.
    """
    results: list[Array] = list(leaves)
    for plan, indices in _plans(rule, False, views, leaves, shardings, strategy):
        check_states(plan, states)
        given = [leaves[i] for i in indices]
        if plan.mesh is None:
            given = [_mesh.gathered(leaf) for leaf in given]
        done, states = update_states(plan, rule, cadence, tuple(given), states, scalars)
        for i, x in zip(indices, done, strict=True):
            results[i] = _mesh.like(x, leaves[i]) if plan.mesh is None else x
    return results, states


def describe(
    method: _linalg.PartwiseMethod,
    views: Sequence[MatrixView],
    leaves: Sequence[Any],
    shardings: Sequence[jax.NamedSharding | None],
    strategy: Strategy,
) -> PlacementDescription:
    """What `polar` costs each device; leaves may be descriptions of arrays."""
    plans = _plans(method, True, views, leaves, shardings, strategy)
    costs = [
        group_cost(plan, group, method) for plan, _ in plans for group in plan.groups
    ]
    return PlacementDescription(tuple(costs))


def _shared(method: _linalg.PolarMethod) -> tuple[Shared | None, bool]:
    """How parts can share a method, and whether it may be done transposed."""
    if isinstance(method, _linalg.PartwiseMethod):
        return method, True
    # Others take matrices only as they are.
    return None, False


def _plans(
    method: Shared | None,
    turns: bool,
    views: Sequence[MatrixView],
    leaves: Sequence[Any],
    shardings: Sequence[jax.NamedSharding | None],
    strategy: Strategy,
) -> list[tuple[Plan, list[int]]]:
    """A plan for the leaves of each mesh, and which they are; none for empty leaves."""
    by_mesh: dict[Any, list[int]] = {}
    for i, sharding in enumerate(shardings):
        if not leaves[i].size:
            continue
        by_mesh.setdefault(sharding.mesh if sharding else None, []).append(i)
    plans = []
    for indices in by_mesh.values():
        parts = [Leaf(views[i], shardings[i], leaves[i].dtype.name) for i in indices]
        plans.append((make_plan(parts, method, turns, strategy), indices))
    return plans


@partial(jax.jit, static_argnums=(0, 1))
def _run(plan: Plan, method: _linalg.PolarMethod, *leaves: Array) -> tuple[Array, ...]:
    return work.run(plan, work.polar_work(method.polar), leaves)
