"""What the types of arrays say about meshes, and bringing one leaf together."""

from typing import Any

import jax
import jax.core
from jax.sharding import AxisType


def seen(x: Any) -> jax.NamedSharding | None:
    """Where all of `x` lies, as far as can be seen; None is on one device, or unknown.

    On a mesh with explicit axes the type says it, and outside of `jax.jit` the array.
    On the auto axes of a context mesh the compiler decides later: there leaves are
    taken for replicated, which is right whatever they are.
    """
    if not isinstance(x, jax.core.Tracer):
        sharding = getattr(x, "sharding", None)
        return sharding if isinstance(sharding, jax.NamedSharding) else None
    sharding = jax.typeof(x).sharding
    if _only(sharding.mesh, AxisType.Explicit):
        return sharding
    mesh = jax.sharding.get_abstract_mesh()
    return jax.NamedSharding(mesh, jax.P()) if _only(mesh, AxisType.Auto) else None


def typed(x: Any) -> jax.NamedSharding | None:
    """Where `x` lies by its type; None on a mesh with auto axes, or on one device.

    The same inside and outside of `jax.jit`, which `seen` is not.
    """
    traced = isinstance(x, jax.core.Tracer)
    sharding = jax.typeof(x).sharding if traced else getattr(x, "sharding", None)
    if not isinstance(sharding, jax.NamedSharding):
        # Once traced in this context it will be on all devices of its mesh.
        sharding = jax.NamedSharding(jax.sharding.get_abstract_mesh(), jax.P())
    return sharding if _only(sharding.mesh, AxisType.Explicit) else None


def inside_shard_map() -> bool:
    """Whether each device is given its own arrays, of a mesh with manual axes."""
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def _only(mesh: jax.sharding.AbstractMesh | jax.sharding.Mesh, kind: AxisType) -> bool:
    return not mesh.empty and all(axis is kind for axis in mesh.axis_types)


def gathered(x: jax.Array) -> jax.Array:
    """`x`, whole on every device if its type says that it is sharded.

    Explicit mode refuses to guess what a reshape or a product of sharded axes becomes.
    """
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty or all(axis is None for axis in sharding.spec):
        return x
    whole = jax.NamedSharding(sharding.mesh, jax.P(*[None] * x.ndim))
    return jax.sharding.reshard(x, whole)


def like(x: jax.Array, original: jax.Array) -> jax.Array:
    """`x` with the sharding that the type of `original` says."""
    if jax.typeof(x).sharding == jax.typeof(original).sharding:
        return x
    return jax.sharding.reshard(x, jax.typeof(original).sharding)


def axes_by_dimension(
    sharding: jax.NamedSharding, ndim: int
) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that each dimension is sharded over, those of size 1 left out."""
    names = []
    for entry in (*sharding.spec, *[None] * (ndim - len(sharding.spec))):
        entry = entry if isinstance(entry, tuple) else (entry,)
        known = [axis for axis in entry if axis is not None]
        names.append(tuple(a for a in known if sharding.mesh.shape[a] > 1))
    return tuple(names)
