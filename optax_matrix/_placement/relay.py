"""Saved state of preconditioners on another mesh than the one it was saved on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_matrix import _paths
from optax_matrix._placement.states import MatrixStack


def relay_state(saved: Any, like: Any) -> Any:
    """Lays out saved optimizer state for the mesh and the devices of another state.

    The states of preconditioners lie with the owners of their matrices, so the order
    and the number of their rows depend on the mesh. This puts every row where ``like``
    has it; all other leaves must have the shapes that they have in ``like``. Call it
    outside of `jax.jit`.

    Args:
      saved: The state as it was saved, in its own structure or as nested dicts (what
        Orbax restores without a target), with arrays that this process can read whole.
      like: The state of the same optimizer on the new mesh, ``optimizer.init(params)``.

    Returns:
      The values of ``saved`` with the structure, shapes and shardings of ``like``.

    Raises:
      ValueError: If ``saved`` lacks a leaf of ``like``, has another number of matrices
        of a shape, or a leaf of another shape, with its path.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_matrix as om
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> tx = om.soap_precondition()
      >>> state = relay_state(tx.init(params), tx.init(params))
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(saved)
    table = {_name(path): leaf for path, leaf in flat}

    def is_stack(node: Any) -> bool:
        return isinstance(node, MatrixStack)

    wanted: dict[str, set[int]] = {}
    for path, node in jax.tree_util.tree_leaves_with_path(like, is_leaf=is_stack):
        if is_stack(node):
            numbers = wanted.setdefault(_shape(_name(path)), set())
            numbers.update(_whole(node.numbers).tolist())

    def laid(path: tuple[Any, ...], node: Any) -> Any:
        name = _name(path)
        if is_stack(node):
            return _relaid(table, name, node, wanted[_shape(name)])
        return _put(_found(table, name), node, name)

    return jax.tree_util.tree_map_with_path(laid, like, is_leaf=is_stack)


def _relaid(
    table: dict[str, Any], name: str, like: MatrixStack, wanted: set[int]
) -> MatrixStack:
    """Returns a stack with the rows of all saved stacks of its shape in its order."""
    numbers = "/numbers"
    found = [key.removesuffix(numbers) for key in table if key.endswith(numbers)]
    stacks = [stack for stack in found if _shape(stack) == _shape(name)]
    held = [n for stack in stacks for n in np.asarray(table[stack + numbers]).tolist()]
    rows = {number: row for row, number in enumerate(held) if number >= 0}
    if rows.keys() != wanted - {-1}:
        raise ValueError(
            f"`saved` has the states of {len(rows)} matrices of the shape of '{name}', "
            f"and `like` needs {len(wanted - {-1})}. It must be the state of the same "
            "optimizer and parameters."
        )
    # Padding may have any state.
    take = [rows.get(number, 0) for number in _whole(like.numbers).tolist()]

    def moved(path: tuple[Any, ...], leaf: Any) -> Any:
        tail = f"/state/{_name(path)}"
        parts = [np.asarray(_found(table, stack + tail)) for stack in stacks]
        return _put(np.concatenate(parts)[take], leaf, name + tail)

    state = jax.tree_util.tree_map_with_path(moved, like.state)
    return MatrixStack(like.numbers, state)


def _shape(name: str) -> str:
    """Returns the name of a stack without its number among those of its shape."""
    parent, slash, stack = name.rpartition("/")
    return parent + slash + stack.partition(".")[0]


def _name(path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf; Orbax restores boxes of NNX as ``{"value": ...}``."""
    return _paths.path_name(path).removesuffix("/value")


def _whole(x: jax.Array) -> np.ndarray:
    """Returns the entries of an array that may be spread over several processes."""
    if not x.is_fully_addressable:
        assert isinstance(x.sharding, jax.NamedSharding)
        x = jax.device_put(x, jax.NamedSharding(x.sharding.mesh, jax.P()))
    return np.asarray(x)


def _found(table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise ValueError(f"`saved` has no leaf '{name}', which `like` has.")
    return table[name]


def _put(value: Any, like: Any, name: str) -> Any:
    if np.shape(value) != np.shape(like):
        raise ValueError(
            f"`saved` has shape {np.shape(value)} at '{name}', but `like` has "
            f"{np.shape(like)}. It must be the state of the same optimizer and "
            "parameters, without Flax's `State` around its parts; moments in 8 bits "
            "must have their blocks along the same axis."
        )
    if not isinstance(like, jax.Array):
        return value
    if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        value = np.asarray(value).astype(like.dtype)
    # Uncommitted scalars stay so: committed to one device, they could not be combined
    # with arrays on a mesh.
    return jax.device_put(value, like.sharding if like.committed else None)
