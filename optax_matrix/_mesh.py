"""What the types of arrays say about meshes, and bringing one leaf together."""

import jax
from jax.sharding import AxisType


def explicit(x: jax.Array) -> jax.NamedSharding | None:
    """The sharding in the type of `x`, if that says on which devices all of it lies.

    None without a mesh, inside a `shard_map`, and on meshes with auto axes, where the
    compiler decides later and nothing can be seen here.
    """
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    if mesh.empty or any(kind is not AxisType.Explicit for kind in mesh.axis_types):
        return None
    return sharding


def gathered(x: jax.Array) -> jax.Array:
    """`x`, whole on every device if its type says that it is sharded.

    Explicit mode refuses to guess what a reshape or a product of sharded axes becomes.
    """
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty or all(axis is None for axis in sharding.spec):
        return x
    whole = jax.NamedSharding(sharding.mesh, jax.P(*[None] * x.ndim))
    return jax.sharding.reshard(x, whole)


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
