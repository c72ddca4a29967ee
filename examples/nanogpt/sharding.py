"""Where parameters and batches lie: all that the example knows about meshes.

    data     sequences of a batch
    fsdp     sequences of a batch, and the first axis of every matrix
    tensor   heads, hidden channels and vocabulary, as in Megatron

A matrix is gathered over `fsdp` before it is used; gains lie whole on every device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")

# Matrices that write into the residual stream. Their inputs are spread over `tensor`;
# of all others, which read from it, the outputs are.
WRITERS = {"embed", "o", "proj"}


def parse(text: str, devices: int) -> dict[str, int]:
    """`data=2,fsdp=4` as axes and their sizes; all devices on `data` if it is empty."""
    sizes: dict[str, int] = {}
    for part in text.split(",") if text else [f"data={devices}"]:
        name, _, size = part.strip().partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or size == "0":
            raise ValueError(
                f"`mesh` must be sizes of {', '.join(AXES)}, each at most once, such "
                f"as data=2,fsdp=4; got {part.strip()!r} in {text!r}"
            )
        sizes[name] = int(size)
    product = math.prod(sizes.values())
    if product != devices:
        raise ValueError(
            f"`mesh` {text!r} is for {product} devices, but there are {devices}: "
            f"choose sizes whose product is {devices}"
        )
    return sizes


def make_mesh(text: str, axes: str, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `--mesh` with axes `auto` or `explicit`, over all devices."""
    sizes = parse(text, len(devices or jax.devices()))
    kinds = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
    if axes not in kinds:
        raise ValueError(f"`mesh_axes` must be auto or explicit, got {axes!r}")
    shape, names = tuple(sizes.values()), tuple(sizes)
    return jax.make_mesh(shape, names, (kinds[axes],) * len(names), devices=devices)


def is_explicit(mesh: Mesh) -> bool:
    return mesh.axis_types[0] is AxisType.Explicit


def specs(params: Any, mesh: Mesh, *, gathered: bool = False) -> Any:
    """How each parameter lies: stored, or gathered over `fsdp` for its use."""
    present = [axis for axis in mesh.axis_names if not (gathered and axis == "fsdp")]

    def spec(path: Any, leaf: Any) -> P:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        name = name.removesuffix("/value")
        if leaf.ndim < 2:
            return P()
        wanted = (("fsdp",), ("tensor",))
        if WRITERS & set(name.split("/")):
            wanted = (("tensor", "fsdp"), ())
        entries = [tuple(a for a in axes if a in present) for axes in wanted]
        for size, axes in zip(leaf.shape, entries, strict=True):
            if size % math.prod(mesh.shape[axis] for axis in axes):
                given = " times ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
                raise ValueError(
                    f"`mesh`: {given} does not divide {size}, of {name} of shape "
                    f"{leaf.shape}: choose sizes that do, or another model"
                )
        return P(*(axes or None for axes in entries))

    return jax.tree_util.tree_map_with_path(spec, params)


def shardings(params: Any, mesh: Mesh) -> Any:
    """The stored sharding of each parameter, or of each description of one."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(params, mesh))


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes that sequences are spread over."""
    return tuple(axis for axis in mesh.axis_names if axis != "tensor")


def batch_devices(mesh: Mesh) -> int:
    """In how many parts a batch is spread."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def place_batch(rows: Any, mesh: Mesh) -> jax.Array:
    """Windows (..., B, T + 1), which every process has whole, spread over B."""
    spec = P(*[None] * (rows.ndim - 2), batch_axes(mesh))
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(rows.shape, sharding, lambda at: rows[at])


def place_rest(tree: Any, mesh: Mesh) -> Any:
    """Leaves that are not on the mesh yet, counters for example, whole on all of it."""
    everywhere = NamedSharding(mesh, P())

    def place(leaf: jax.Array) -> jax.Array:
        known = isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        return leaf if known else jax.device_put(leaf, everywhere)

    return jax.tree.map(place, tree)


def fetch(tree: Any, mesh: Mesh) -> Any:
    """Every leaf whole, in the memory of every process."""
    everywhere = NamedSharding(mesh, P())
    return jax.tree.map(lambda x: np.asarray(jax.device_put(x, everywhere)), tree)


def spread(loss_fn: Callable, mesh: Mesh | None) -> Callable:
    """`loss_fn(params, graph, windows)` on the mesh.

    The compiler places what is between parameters and loss, on explicit axes too:
    there every product of the model would have to say how its result lies.
    """
    if mesh is None:
        return loss_fn

    def on_mesh(params: Any, graph: Any, windows: jax.Array) -> jax.Array:
        def run(params: Any, windows: jax.Array) -> jax.Array:
            constrain = jax.lax.with_sharding_constraint
            # Two constraints, because each also holds for the gradient: it comes
            # gathered, and leaves as its parameter is stored.
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
