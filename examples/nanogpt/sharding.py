"""Shards parameters and batches over a mesh.

    data     shards the sequences of a batch
    fsdp     shards the sequences of a batch and the first axis of every matrix
    tensor   shards heads, hidden channels and vocabulary, as in Megatron

Matrices are gathered over `fsdp` before use; gains are replicated.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")

# Matrices whose outputs are added to the residual stream. `tensor` shards their inputs;
# it shards the outputs of all other matrices.
WRITERS = {"embed", "o", "proj"}


def parse(text: str, devices: int) -> dict[str, int]:
    """Parses axes and sizes such as `data=2,fsdp=4`; "" puts all devices on data."""
    sizes: dict[str, int] = {}
    for part in text.split(",") if text else [f"data={devices}"]:
        name, _, size = part.strip().partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or size == "0":
            raise ValueError(
                f"`mesh` must give sizes of {', '.join(AXES)}, each at most once, such "
                f"as data=2,fsdp=4; got {part.strip()!r} in {text!r}"
            )
        sizes[name] = int(size)
    product = math.prod(sizes.values())
    if product != devices:
        raise ValueError(
            f"`mesh` {text!r} needs {product} devices, but there are {devices}: "
            f"choose sizes whose product is {devices}"
        )
    return sizes


def make_mesh(text: str, axes: str, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the mesh of `--mesh` and `--mesh-axes`; by default over all devices."""
    sizes = parse(text, len(devices or jax.devices()))
    kinds = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
    if axes not in kinds:
        raise ValueError(f"`mesh_axes` must be auto or explicit, got {axes!r}")
    shape, names = tuple(sizes.values()), tuple(sizes)
    return jax.make_mesh(shape, names, (kinds[axes],) * len(names), devices=devices)


def is_explicit(mesh: Mesh) -> bool:
    return mesh.axis_types[0] is AxisType.Explicit


def name_of(path: Any) -> str:
    """Returns the name of a parameter, such as `blocks/0/attn/q/kernel`."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value")


def specs(params: Any, mesh: Mesh, *, gathered: bool = False) -> Any:
    """Returns the spec of each parameter as stored, or as `gathered` over fsdp."""
    present = [axis for axis in mesh.axis_names if not (gathered and axis == "fsdp")]

    def spec(path: Any, leaf: Any) -> P:
        if leaf.ndim < 2:
            return P()
        wanted = (("fsdp",), ("tensor",))
        if WRITERS & set(name_of(path).split("/")):
            wanted = (("tensor", "fsdp"), ())
        entries = [tuple(a for a in axes if a in present) for axes in wanted]
        for size, axes in zip(leaf.shape, entries, strict=True):
            if size % math.prod(mesh.shape[axis] for axis in axes):
                given = " times ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
                raise ValueError(
                    f"`mesh`: {given} does not divide {size}, an axis of "
                    f"{name_of(path)} of shape {leaf.shape}: choose other mesh or "
                    "model sizes"
                )
        return P(*(axes or None for axes in entries))

    return jax.tree_util.tree_map_with_path(spec, params)


def shardings(params: Any, mesh: Mesh) -> Any:
    """Returns the sharding of each stored parameter, given arrays or their shapes."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(params, mesh))


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """Returns the axes that shard the sequences of a batch."""
    return tuple(axis for axis in mesh.axis_names if axis != "tensor")


def batch_devices(mesh: Mesh) -> int:
    """Returns the number of shards of a batch."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def place_batch(rows: Any, mesh: Mesh) -> jax.Array:
    """Shards windows (..., B, T + 1) over B, given all of them in every process."""
    spec = P(*[None] * (rows.ndim - 2), batch_axes(mesh))
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(rows.shape, sharding, lambda at: rows[at])


def place_rest(tree: Any, mesh: Mesh) -> Any:
    """Replicates the leaves that are not on the mesh yet, such as counters."""
    everywhere = NamedSharding(mesh, P())

    def place(leaf: jax.Array) -> jax.Array:
        known = isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        return leaf if known else jax.device_put(leaf, everywhere)

    return jax.tree.map(place, tree)


def fetch(tree: Any, mesh: Mesh) -> Any:
    """Gathers every leaf into the memory of every process."""
    everywhere = NamedSharding(mesh, P())
    return jax.tree.map(lambda x: np.asarray(jax.device_put(x, everywhere)), tree)


def spread(loss_fn: Callable, mesh: Mesh | None) -> Callable:
    """Returns `loss_fn(params, graph, windows)` for sharded parameters and windows.

    The compiler chooses the shardings of all intermediate results, on explicit axes
    too: otherwise each product of the model would have to state an output sharding.
    """
    if mesh is None:
        return loss_fn

    def on_mesh(params: Any, graph: Any, windows: jax.Array) -> Any:
        def run(params: Any, windows: jax.Array) -> Any:
            constrain = jax.lax.with_sharding_constraint
            # Both constraints also apply to the gradient, in reverse order: gathered
            # like the parameters in use, and then sharded like the stored parameters.
            params = constrain(params, specs(params, mesh))
            params = constrain(params, specs(params, mesh, gathered=True))
            return loss_fn(params, graph, windows)

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            if is_explicit(mesh):
                axes = mesh.axis_names
                on_auto = jax.sharding.auto_axes(run, axes=axes, out_sharding=P())
                return on_auto(params, windows)  # type: ignore
            return run(params, windows)

    return on_mesh
