"""Which axes of a leaf are inputs, outputs and batch; the only place that reshapes.

A `MatrixLayout` names the axes. A `MatrixView` is a layout fitted to one shape, and
`tree_map` applies a function of views to the leaves of a tree.
"""

from optax_matrix._layout.layout import (
    LayoutSpec,
    MatrixLayout,
    MuonDimensionNumbers,
    as_layout,
)
from optax_matrix._layout.tree import (
    FittedLayout,
    Layout,
    check_all_floating,
    check_array,
    check_floating,
    tree_map,
    tree_views,
)
from optax_matrix._layout.view import MatrixView, blocked, view

__all__ = [
    "FittedLayout",
    "Layout",
    "LayoutSpec",
    "MatrixLayout",
    "MatrixView",
    "MuonDimensionNumbers",
    "as_layout",
    "blocked",
    "check_all_floating",
    "check_array",
    "check_floating",
    "tree_map",
    "tree_views",
    "view",
]
