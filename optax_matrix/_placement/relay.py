"""Saved state of preconditioners on another mesh than the one it was saved on."""

from typing import Any

import jax
import numpy as np

from optax_matrix import _paths
from optax_matrix._placement.states import MatrixStack


def relay_state(saved: Any, like: Any) -> Any:
    """Lays out saved optimizer state for the mesh and the devices of another state.

    The states of preconditioners lie with the owners of their matrices, so the order
    and the number of their rows depend on the mesh. This puts every row where `like`
    has it; all other leaves must have the shapes that they have in `like`. Call it
    outside of `jax.jit`.

    Args:
      saved: The state as it was saved, in its own structure or as nested dicts (what
        Orbax restores without a target), with arrays that this process can read whole.
      like: The state of the same optimizer on the new mesh, ``optimizer.init(params)``.

    Returns:
      The values of `saved` with the structure, shapes and shardings of `like`.

    Raises:
      ValueError: If `saved` lacks a leaf or a matrix of `like`, or a leaf has another
        shape, with its path.

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

    def laid(path: tuple[Any, ...], node: Any) -> Any:
        name = _name(path)
        if is_stack(node):
            return _relaid(table, name, node)
        return _put(_found(table, name), node, name)

    return jax.tree_util.tree_map_with_path(laid, like, is_leaf=is_stack)


def _relaid(table: dict[str, Any], name: str, like: MatrixStack) -> MatrixStack:
    """Returns a stack with the rows of all saved stacks of its shape in its order."""
    numbers = "/numbers"
    found = [key.removesuffix(numbers) for key in table if key.endswith(numbers)]
    stacks = [stack for stack in found if _shape(stack) == _shape(name)]
    held = [n for stack in stacks for n in np.asarray(table[stack + numbers]).tolist()]
    rows = {number: row for row, number in enumerate(held) if number >= 0}
    wanted = _whole(like.numbers).tolist()
    missing = sorted({number for number in wanted if number >= 0} - rows.keys())
    if missing:
        raise ValueError(
            f"`saved` has no state for matrices {missing[:10]} at '{name}'. It must be "
            "the state of the same optimizer and parameters."
        )
    take = [rows.get(number, 0) for number in wanted]  # padding may have any state

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
            "parameters."
        )
    array = np.asarray(value).astype(like.dtype)
    # Committed to the device of a counter, it could not meet arrays on a mesh.
    return jax.device_put(array, like.sharding if like.committed else None)
