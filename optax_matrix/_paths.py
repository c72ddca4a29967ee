"""Names of leaves, and matching of a tree of labels to a tree by name."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import jax
from jax.tree_util import GetAttrKey, keystr

_BOX = GetAttrKey("value")


def _is_box(path: tuple[Any, ...]) -> bool:
    return bool(path) and path[-1] == _BOX


def _segments(key_path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(keystr((key,), simple=True) for key in key_path)


def path_name(key_path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf, as in ``blocks/0/attn/query/kernel``.

    Flax boxes (NNX `Variable`, Linen `Partitioned`) are pytree nodes whose only child
    is the attribute `value`. NNX passes boxed parameters to `tx.init` and bare ones to
    `tx.update`; without that last key both have the same names.
    """
    return "/".join(_segments(key_path[:-1] if _is_box(key_path) else key_path))


def _flatten(
    tree: Any, is_leaf: Callable[[Any], bool]
) -> list[tuple[tuple[str, ...], Any]]:
    """Returns leaves by name, without boxes; `value` with siblings is not a box."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    uses = collections.Counter(path[:-1] for path, _ in flat)
    uses.update(path[:d] for path, _ in flat for d in range(len(path) - 1))
    return [
        (_segments(path[:-1] if _is_box(path) and uses[path[:-1]] == 1 else path), leaf)
        for path, leaf in flat
    ]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Absent:
    """An empty node in place of a leaf, whose name and shape are still evidence."""

    shape: tuple[int, ...]


def _is_absent(node: Any) -> bool:
    return isinstance(node, Absent)


def _is_empty(node: Any) -> bool:
    """Returns whether `node` has neither leaves nor `Absent` nodes below it."""
    if _is_absent(node):
        return True
    if jax.tree.structure(node).num_leaves:
        return False
    return not jax.tree.leaves(node, is_leaf=_is_absent)


class Place(NamedTuple):
    """A leaf, or an empty node: None, `optax.MaskedNode`, `Absent`, ``{}``."""

    segments: tuple[str, ...]
    leaf: Any
    empty: bool

    @property
    def name(self) -> str:
        """The segments joined by slashes."""
        return "/".join(self.segments)


def places(tree: Any) -> list[Place]:
    """Returns the leaves and the empty nodes of `tree`, in order."""
    return [
        Place(names, leaf, _is_empty(leaf)) for names, leaf in _flatten(tree, _is_empty)
    ]


def _boxed(node: Any) -> list[Any]:
    """Returns the content of a box in a list; an empty list for other nodes."""
    children, _ = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda child: child is not node
    )
    keys = [path for path, _ in children]
    return [children[0][1]] if keys == [(_BOX,)] else []


def is_box(node: Any) -> bool:
    """Returns whether a node is a box."""
    return bool(_boxed(node))


def unboxed(tree: Any) -> Any:
    """Returns the tree with each box replaced by its content.

    A box has the sharding of its parameter, which does not fit state of another shape.
    """

    def inside(node: Any) -> Any:
        return (_boxed(node) or [node])[0]

    return jax.tree.map(inside, tree, is_leaf=is_box)


def at_leaves(tree: Any, other: Any) -> list[Any]:
    """Returns what `other` has at the leaves of `tree`, whichever of them has boxes."""
    bare = jax.tree.structure(unboxed(tree))
    return bare.flatten_up_to(unboxed(other))


def is_function(spec: Any) -> TypeGuard[Callable[..., Any]]:
    """Returns whether `spec` is a function, and not a callable pytree."""
    return callable(spec) and jax.tree_util.all_leaves([spec])


class Match(NamedTuple):
    """The entry of a tree of labels for one leaf."""

    place: Place
    entry: Any
    prefix: bool  # the entry is for a subtree that contains the leaf


def match(
    entries: Any, tree: Any, argument: str, is_entry: Callable[[Any], bool]
) -> list[Match]:
    """Matches a tree of entries, or a prefix of one, to the leaves of `tree` by name.

    The entry of a leaf is the one at the leaf or above it. Names are compared instead
    of tree structures, so that one tree of entries fits boxed and bare parameters.

    Args:
      entries: The tree of entries.
      tree: The tree whose leaves need an entry each.
      argument: The name of `entries` in error messages.
      is_entry: Returns whether a node of `entries` is an entry although it is a
        container.

    Returns:
      One match per leaf, in order.

    Raises:
      ValueError: If a leaf has no entry, or an entry has no leaf.
    """

    def stops(node: Any) -> bool:
        return node is None or is_entry(node)

    table = dict(_flatten(entries, stops))
    unused = {path for path, entry in table.items() if entry is not None}
    matches, missing = [], []
    for place in places(tree):
        keys = place.segments
        # Entries are leaves of their tree, so at most one is on the path.
        above = next((d for d in range(len(keys) + 1) if keys[:d] in table), None)
        if above is not None:
            unused.discard(keys[:above])
        if place.empty:
            # Entries of a full tree below a masked node are masked with it.
            unused = {path for path in unused if path[: len(keys)] != keys}
        elif above is not None:
            entry = table[keys[:above]]
            matches.append(Match(place, entry, prefix=above < len(keys)))
        else:
            missing.append(f"'{place.name}'")
    problems = []
    if missing:
        problems.append(f"no entry for {some(missing)}")
    if unused:
        names = sorted(f"'{'/'.join(path)}'" for path in unused)
        problems.append(f"an entry where the tree has no leaf, at {some(names)}")
    if problems:
        raise ValueError(
            f"`{argument}` has {' and '.join(problems)}. It must have the structure of "
            "the tree it describes, or of a prefix of it."
        )
    return matches


def some(names: list[str], limit: int = 10) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
