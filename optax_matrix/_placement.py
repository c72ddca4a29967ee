"""Where the matrices of a leaf lie while they are worked on; the only resharder."""

from collections.abc import Callable

import jax


def gathered(x: jax.Array) -> jax.Array:
    """`x`, whole on every device if it is sharded on an explicit mesh.

    Products of a matrix with itself contract a sharded axis with a sharded axis, which
    explicit mode refuses to guess about. On auto meshes the compiler decides, and there
    a leaf's sharding is not visible here.
    """
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty or all(axis is None for axis in sharding.spec):
        return x
    whole = jax.NamedSharding(sharding.mesh, jax.P(*[None] * x.ndim))
    return jax.sharding.reshard(x, whole)


def on_whole_matrices(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`fn(x)`, with a leaf sharded on an explicit mesh gathered before and put back."""
    whole = gathered(x)
    return (
        fn(x) if whole is x else jax.sharding.reshard(fn(whole), jax.typeof(x).sharding)
    )
