"""Fits layouts to the leaves of a tree, and maps functions over its matrices."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optax_matrix import _check, _paths
from optax_matrix._layout.layout import LayoutSpec, MuonDimensionNumbers
from optax_matrix._layout.view import MatrixView, view

# A spec, a pytree (prefix) of specs, or a function from the tree to one.
Layout: TypeAlias = LayoutSpec | Any | Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class FittedLayout:
    """The views of the matrices of a tree by the names of their leaves.

    `partition` makes one when it routes a tree, so that the stages of a chain need not
    fit layouts to leaves again.
    """

    views: Mapping[str, MatrixView]


def _is_entry(node: Any) -> bool:
    return isinstance(node, MuonDimensionNumbers | optax.MaskedNode)


def check_array(leaf: Any, path: str) -> None:
    """Raises unless a leaf has a shape and a dtype, or is a number.

    Raises:
      TypeError: With the leaf's path and type.
    """
    if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
        raise TypeError(
            f"Leaves must be arrays, got {type(leaf).__name__} at '{path}'. Remove the "
            "leaf, or route it to another optimizer."
        )


def check_floating(leaf: Any, path: str) -> None:
    """Raises unless a leaf is real and floating.

    Raises:
      TypeError: With the leaf's path and dtype.
    """
    check_array(leaf, path)
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"Leaves must be real floating arrays, got dtype {dtype} at '{path}'. "
            "Route the leaf to another optimizer, or cast it."
        )


def check_all_floating(tree: Any) -> None:
    """Raises unless all leaves of `tree` are real and floating.

    Raises:
      TypeError: With the path and the dtype of the first other leaf.
    """
    for place in _paths.places(tree):
        if not place.empty:
            check_floating(place.leaf, place.name)


def tree_views(layout: Layout, tree: Any) -> list[tuple[MatrixView, Any]]:
    """Fits `layout` to every leaf of `tree`, in the order of `jax.tree.leaves`.

    Args:
      layout: A layout for all leaves, a tree (prefix) of layouts matched to `tree` by
        name, a function from `tree` to one of these, or a `FittedLayout`.
      tree: The tree. Only shapes and dtypes are read: leaves may be arrays, tracers or
        `jax.ShapeDtypeStruct`.

    Returns:
      The view of each leaf, and the leaf.

    Raises:
      TypeError: If an entry of `layout` is not a layout, or a leaf is not real
        floating.
      ValueError: If `layout` does not match `tree`, or a layout does not fit its leaf.
    """
    if isinstance(layout, FittedLayout):
        check_all_floating(tree)
        return [
            (layout.views[place.name], place.leaf)
            for place in _paths.places(tree)
            if not place.empty
        ]
    if _paths.is_function(layout):
        layout = layout(tree)
    views = []
    for place, entry, _ in _paths.match(layout, tree, "layout", _is_entry):
        if isinstance(entry, optax.MaskedNode):
            raise ValueError(
                f"`layout` is masked at '{place.name}', where the tree has a leaf of "
                f"shape {tuple(jnp.shape(place.leaf))}. Give that leaf a layout, or "
                "mask it in the tree."
            )
        check_floating(place.leaf, place.name)
        try:
            fitted = view(jnp.shape(place.leaf), entry, place.name)
        except TypeError as error:
            raise TypeError(f"{error} It is `layout` at '{place.name}'.") from None
        views.append((fitted, place.leaf))
    return views


def tree_map(
    fn: Callable[..., Any],
    layout: Layout,
    tree: Any,
    *rest: Any,
    keep_boxes: bool = True,
) -> Any:
    """Maps ``fn(view, leaf, *rest_leaves)`` over the leaves of ``tree``.

    Empty nodes of ``tree`` (None, `optax.MaskedNode`) stay as they are, whatever
    ``layout`` has for them.

    Args:
      fn: Takes the `MatrixView` of a leaf, the leaf, and what ``rest`` has at the leaf.
      layout: Which axes of a leaf are the matrix: a `MatrixLayout` for all leaves, None
        for the last two axes, or what `partition` passes to its optimizer.
      tree: The tree to map over.
      *rest: Trees with the structure of ``tree``, boxed or not, or with subtrees at its
        leaves.
      keep_boxes: Whether results go into the boxes that the leaves of ``tree`` are in
        (Flax's ``Variable`` and ``Partitioned``). A box has the sharding of its
        parameter: state of another shape is kept without it.

    Returns:
      A tree with the structure of ``tree``.

    Raises:
      TypeError: If an entry of ``layout`` is not a layout, a leaf is not real floating,
        or ``fn`` not a function.
      ValueError: If ``layout`` does not match ``tree``, or a layout does not fit its
        leaf.

    Example:
      >>> def sums(view, leaf):
      ...     return view.sum(leaf, outputs=False)  # over the inputs of each matrix
      >>> print(tree_map(sums, None, {"kernel": jnp.ones((3, 2))})["kernel"])
      [[3. 3.]]
    """
    _check.function("fn", fn, "a view and leaves")
    _check.boolean("keep_boxes", keep_boxes)
    others = [_paths.at_leaves(tree, other) for other in rest]
    results = [
        fn(fitted, leaf, *(other[i] for other in others))
        for i, (fitted, leaf) in enumerate(tree_views(layout, tree))
    ]
    return jax.tree.unflatten(
        jax.tree.structure(tree if keep_boxes else _paths.unboxed(tree)), results
    )
