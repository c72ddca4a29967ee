"""Shardings of arrays as their types show them, and gathering of one leaf."""

from typing import Any

import jax
import jax.core
from jax.sharding import AxisType


def visible_sharding(x: Any) -> jax.NamedSharding | None:
    """Returns the sharding of `x` if it is known, or None.

    On an explicit mesh it is part of the type; outside `jax.jit` the array has it. On
    the auto axes of a context mesh the compiler decides later: `x` is assumed to be
    replicated, which gives correct results whatever it is.
    """
    if not isinstance(x, jax.core.Tracer):
        sharding = getattr(x, "sharding", None)
        return sharding if isinstance(sharding, jax.NamedSharding) else None
    sharding = jax.typeof(x).sharding
    if _only(sharding.mesh, AxisType.Explicit):
        return sharding
    mesh = jax.sharding.get_abstract_mesh()
    return jax.NamedSharding(mesh, jax.P()) if _only(mesh, AxisType.Auto) else None


def sharding_of_type(x: Any) -> jax.NamedSharding | None:
    """Returns the sharding of `x` by its type; None on auto axes or one device.

    Unlike `visible_sharding`, it is the same inside and outside `jax.jit`.
    """
    traced = isinstance(x, jax.core.Tracer)
    sharding = jax.typeof(x).sharding if traced else getattr(x, "sharding", None)
    if not isinstance(sharding, jax.NamedSharding):
        # Traced in this context, it will be replicated over its mesh.
        sharding = jax.NamedSharding(jax.sharding.get_abstract_mesh(), jax.P())
    return sharding if _only(sharding.mesh, AxisType.Explicit) else None


def inside_shard_map() -> bool:
    """Returns whether this is traced inside `shard_map`, on a mesh with manual axes."""
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def _only(mesh: jax.sharding.AbstractMesh | jax.sharding.Mesh, kind: AxisType) -> bool:
    return not mesh.empty and all(axis is kind for axis in mesh.axis_types)


def gathered(x: jax.Array, axis: int | None = None) -> jax.Array:
    """Returns `x`, gathered along `axis` (None: all axes) if its type is sharded there.

    Explicit mode does not choose the sharding of a reshape or a product of sharded
    axes.
    """
    sharding = jax.typeof(x).sharding
    spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    whole = [None if axis in (None, i) else entry for i, entry in enumerate(spec)]
    if sharding.mesh.empty or whole == spec:
        return x
    return jax.sharding.reshard(x, jax.NamedSharding(sharding.mesh, jax.P(*whole)))


def like(x: jax.Array, original: jax.Array) -> jax.Array:
    """Returns `x` with the sharding in the type of `original`."""
    if jax.typeof(x).sharding == jax.typeof(original).sharding:
        return x
    return jax.sharding.reshard(x, jax.typeof(original).sharding)


def axes_by_dimension(
    sharding: jax.NamedSharding, ndim: int
) -> tuple[tuple[str, ...], ...]:
    """Returns the mesh axes that shard each dimension, without axes of size 1."""
    names = []
    for entry in (*sharding.spec, *[None] * (ndim - len(sharding.spec))):
        entry = entry if isinstance(entry, tuple) else (entry,)
        known = [axis for axis in entry if axis is not None]
        names.append(tuple(a for a in known if sharding.mesh.shape[a] > 1))
    return tuple(names)
