"""Routes every leaf to the matrix or the auxiliary optimizer, and prints the result."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_matrix import _check, _layout, _paths, _rules, _table
from optax_matrix._layout import MatrixLayout, MuonDimensionNumbers

# What a predicate returns for a leaf, and what a tree of labels holds for it.
Label: TypeAlias = MatrixLayout | MuonDimensionNumbers | bool | str | None
# None (the default rules), a predicate on (path, leaf), or a pytree (prefix) of labels.
Routing: TypeAlias = Callable[[str, Any], Label] | Label | Any

_LISTED = 10


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(jnp.shape(leaf)) if hasattr(leaf, "dtype") else ()


def _is_entry(node: Any) -> bool:
    return isinstance(node, MuonDimensionNumbers | optax.MaskedNode)


def _from_label(label: Any, reason: str, path: str) -> _rules.Decision:
    """Converts a label to a decision; None is auxiliary, as in `optax.contrib.muon`."""
    if isinstance(label, MatrixLayout | MuonDimensionNumbers):
        return _rules.Decision("matrix", reason, _layout.as_layout(label))
    if isinstance(label, np.bool_):  # what a comparison of NumPy values returns
        label = bool(label)
    if label is True or (isinstance(label, str) and label == "matrix"):
        return _rules.Decision("matrix", reason, MatrixLayout())
    if label is None or label is False:
        return _rules.Decision("auxiliary", reason)
    if isinstance(label, str) and label == "auxiliary":
        return _rules.Decision("auxiliary", reason)
    raise ValueError(
        "`routing` must say 'matrix', 'auxiliary', True, False, None, a `MatrixLayout` "
        f"or a `MuonDimensionNumbers` of each leaf, got {label!r} at '{path}'."
    )


def _by_predicate(
    predicate: Callable[[str, Any], Label], places: list[_paths.Place], params: Any
) -> list[_rules.Decision]:
    defaults = by_rules(params)
    decisions = []
    for place, default in zip(places, defaults, strict=True):
        label = predicate(place.name, place.leaf)
        if label is None:
            decisions.append(default)
            continue
        decision = _from_label(label, "routing function", place.name)
        if decision.optimizer == "matrix" and len(_shape(place.leaf)) < 2:
            decision = _rules.Decision("auxiliary", "fewer than 2 axes")
        decisions.append(decision)
    return decisions


def _by_tree(routing: Any, params: Any) -> list[_rules.Decision]:
    decisions = []
    for place, label, prefix in _paths.match(routing, params, "routing", _is_entry):
        if isinstance(label, optax.MaskedNode):
            label = None  # as in the tree of layouts that `partition` makes
        decision = _from_label(label, "routing tree", place.name)
        # A label for a whole module applies to the module's matrices only.
        is_vector = prefix and len(_shape(place.leaf)) < 2
        if decision.optimizer == "matrix" and is_vector:
            decision = _rules.Decision("auxiliary", "fewer than 2 axes")
        decisions.append(decision)
    return decisions


# Leaves of the whole tree by name, for optimizers that see a part of it. Their states
# would have to know the shapes of masked leaves otherwise.
_EVIDENCE: contextvars.ContextVar[Mapping[str, _rules.Leaf]] = contextvars.ContextVar(
    "evidence", default=MappingProxyType({})
)


@contextlib.contextmanager
def evidence(tree: Any) -> Iterator[None]:
    """Routes parts of `tree` as in the whole one, while optimizers are traced."""
    leaves = {p.name: _known(p) for p in _paths.places(tree) if not p.empty}
    token = _EVIDENCE.set({**_EVIDENCE.get(), **leaves})
    try:
        yield
    finally:
        _EVIDENCE.reset(token)


def _known(place: _paths.Place) -> _rules.Leaf:
    # Haiku's keys and some of Linen's contain slashes themselves.
    shape = place.leaf.shape if place.empty else _shape(place.leaf)
    return _rules.Leaf(tuple(place.name.split("/")), shape)


def by_rules(params: Any) -> list[_rules.Decision]:
    """Applies the default rules, with absent leaves and `evidence` for the others."""
    places = [
        place
        for place in _paths.places(params)
        if not place.empty or isinstance(place.leaf, _paths.Absent)
    ]
    leaves = [_known(place) for place in places]
    names = {place.name for place in places}
    others = [leaf for name, leaf in _EVIDENCE.get().items() if name not in names]
    decisions = zip(places, _rules.decide([*leaves, *others]), strict=False)
    return [decision for place, decision in decisions if not place.empty]


def _decide(
    params: Any, routing: Routing
) -> list[tuple[_paths.Place, _rules.Decision, _layout.MatrixView | None]]:
    """Returns each leaf's place, decision and matrix view, None if auxiliary.

    Raises if a decision is ambiguous.
    """
    places = [place for place in _paths.places(params) if not place.empty]
    if routing is None:
        decisions = by_rules(params)
    elif _paths.is_function(routing):
        decisions = _by_predicate(routing, places, params)
    else:
        decisions = _by_tree(routing, params)
    rows = list(zip(places, decisions, strict=True))
    unsure = [row for row in rows if row[1].optimizer == "ambiguous"]
    if unsure:
        raise ValueError(_ambiguity(unsure))
    return [
        (place, decision, _layout.view(_shape(place.leaf), decision.layout, place.name))
        if decision.optimizer == "matrix"
        else (place, decision, None)
        for place, decision in rows
    ]


def _ambiguity(unsure: list[tuple[_paths.Place, _rules.Decision]]) -> str:
    lines = [
        f"  '{place.name}' {_shape(place.leaf)}: {decision.reason}"
        for place, decision in unsure[:_LISTED]
    ]
    if len(unsure) > _LISTED:
        lines.append(f"  and {len(unsure) - _LISTED} more")
    first, ndim = unsure[0][0].name, len(_shape(unsure[0][0].leaf))
    label = "'matrix'"
    if ndim > 2:
        inputs = tuple(range(ndim - 1))
        label = f"om.MatrixLayout(inputs={inputs}, outputs={ndim - 1})"
    return "\n".join(
        [
            "The default rules cannot tell which optimizer these leaves take, or which "
            "of their axes are inputs and outputs:",
            *lines,
            "Pass `routing`: a function of the path and the leaf, returning None to "
            "apply the default rules, for example",
            f"  routing=lambda path, leaf: {label} if path == {first!r} else None",
            "or a tree (or a prefix of one) with one label per leaf, for example",
            "  routing=jax.tree.map("
            "lambda leaf: 'matrix' if leaf.ndim == 2 else 'auxiliary', params)",
            "'matrix' reads the last two axes as (in, out). Equinox's and PyTorch's "
            "weights are (out, in):",
            "  routing=lambda path, leaf: om.MatrixLayout(inputs=-1, outputs=-2)",
        ]
    )


def route(params: Any, routing: Routing = None) -> Any:
    """Decides for every leaf whether it takes the matrix or the auxiliary optimizer.

    By default, Flax's names and shapes decide. Embeddings, output heads, biases, norms,
    routers and all leaves with fewer than two axes are auxiliary; a ``kernel`` is a
    matrix. A kernel with three or more axes needs evidence of how to read them: the
    name of its module (attention, convolution, dense, experts), the shape of the bias
    beside it, or norms around it that show the axes of a stack of layers. Other names
    say nothing about inputs and outputs. Ambiguous leaves raise an error.

    Args:
      params: The whole tree of parameters, or of their shapes, because leaves are
        evidence for one another.
      routing: None applies the default rules. A function of (path, leaf) returns
        "matrix" or True (the last two axes), "auxiliary" or False, a `MatrixLayout`, an
        `optax.contrib.MuonDimensionNumbers`, or None (apply the default rules to this
        leaf); leaves with fewer than two axes are auxiliary regardless of what it
        returns. A tree of such labels, or a prefix of one, labels leaves or whole
        subtrees, and None means auxiliary, as in
        `optax.contrib.muon(muon_weight_dimension_numbers=...)`; in a labelled subtree,
        leaves with fewer than two axes stay auxiliary.

    Returns:
      A tree like ``params`` with a `MatrixLayout` or the string "auxiliary" per leaf.

    Raises:
      ValueError: If leaves are ambiguous (the error lists them), a label is invalid,
        ``routing`` does not match ``params``, or a layout does not fit its leaf.

    Example:
      >>> params = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
      >>> route(params)["Dense_0"]["bias"]
      'auxiliary'
    """
    return _labels(params, _decide(params, routing), "auxiliary")


def fitted_layout(params: Any, routing: Routing = None) -> _layout.FittedLayout:
    """Returns the views of all leaves that take the matrix optimizer."""
    return _fitted(_decide(params, routing))


def _fitted(rows: list[Any]) -> _layout.FittedLayout:
    return _layout.FittedLayout(
        {place.name: view for place, _, view in rows if view is not None}
    )


def _labels(params: Any, rows: list[Any], auxiliary: Any) -> Any:
    layouts = [
        auxiliary if decision.layout is None else decision.layout
        for _, decision, _ in rows
    ]
    return jax.tree.unflatten(jax.tree.structure(params), layouts)


def partition(
    matrix: Callable[[Any], optax.GradientTransformation],
    auxiliary: optax.GradientTransformation,
    routing: Routing = None,
) -> optax.GradientTransformationExtraArgs:
    """Applies one optimizer to the matrices and another to all other leaves.

    The whole tree is routed whenever ``init`` or ``update`` is traced, using only paths
    and shapes. So the boxed parameters that `flax.nnx.Optimizer` passes to ``init`` and
    the bare ones that it passes to ``update`` get the same labels. Inside
    `optax.masked` or another `optax.partition`, masked leaves provide no evidence: pass
    ``routing`` there.

    Args:
      matrix: Takes the layout of the matrices, to be passed on as ``layout``, and
        returns their optimizer. It is called at every trace.
      auxiliary: The optimizer for all other leaves.
      routing: See `route`.

    Returns:
      A transformation with the state of `optax.partition`, whose keys are "matrix" and
      "auxiliary".

    Raises:
      ValueError: At ``init``, under the conditions of `route`, or if no leaf is a
        matrix and the tree is neither empty nor partly masked; in ``update``, for a
        state without these two parts.
    """

    _check.function("matrix", matrix, "a layout that returns an optimizer")
    _check.transformation("auxiliary", auxiliary)

    def delegate(tree: Any) -> optax.GradientTransformationExtraArgs:
        rows = _decide(tree, routing)
        treedef = jax.tree.structure(tree)
        labels = treedef.unflatten([decision.optimizer for _, decision, _ in rows])
        # A function, because labels in a module that has a `__call__`, as Equinox's
        # have, would be called.
        return optax.partition(
            {"matrix": matrix(_fitted(rows)), "auxiliary": auxiliary}, lambda _: labels
        )

    def init(params: Any) -> optax.OptState:
        _check_some_matrix(params, routing)
        return delegate(params).init(params)

    def update(
        updates: Any, state: optax.OptState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.OptState]:
        if getattr(state, "inner_states", {}).keys() != {"matrix", "auxiliary"}:
            raise ValueError(
                "`state` must be what `init` of this optimizer returns, with the parts "
                f"'matrix' and 'auxiliary', got a {type(state).__name__}. Restore a "
                "checkpoint with a new state as its target."
            )
        return delegate(updates).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode | _paths.Absent)


def _check_some_matrix(params: Any, routing: Routing) -> None:
    nodes = jax.tree.leaves(params, is_leaf=_is_masked)
    if any(_is_masked(node) for node in nodes):
        return
    rows = _decide(params, routing)
    if rows and all(decision.optimizer == "auxiliary" for _, decision, _ in rows):
        place, decision, _ = rows[0]
        raise ValueError(
            f"No leaf takes the matrix optimizer: all {len(rows)} are auxiliary, for "
            f"example '{place.name}' ({decision.reason}). Pass `routing`, or use the "
            "auxiliary optimizer alone."
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """The routing of one leaf.

    Attributes:
      path: The leaf's name, as in ``blocks/0/attn/query/kernel``.
      shape: The leaf's shape.
      view: The leaf's matrices, as in "12 x (768 -> 64)"; empty for an auxiliary leaf.
      optimizer: "matrix" or "auxiliary".
      reason: The rule or the label that decided.
      parameters: The number of entries.
    """

    path: str
    shape: tuple[int, ...]
    view: str
    optimizer: str
    reason: str
    parameters: int


@dataclasses.dataclass(frozen=True)
class Description:
    """The routing of a tree, one row per leaf; `str` formats it as a table."""

    rows: tuple[Row, ...]

    @property
    def totals(self) -> dict[str, int]:
        """The numbers of parameters by "matrix", "auxiliary" and "total"."""
        totals = {"matrix": 0, "auxiliary": 0}
        for row in self.rows:
            totals[row.optimizer] += row.parameters
        return totals | {"total": sum(totals.values())}

    def __str__(self) -> str:
        """Returns the table, with the totals at the end."""
        header = ("path", "shape", "matrices", "optimizer", "parameters", "reason")
        rows = [
            (
                row.path,
                str(row.shape),
                row.view or "-",
                row.optimizer,
                f"{row.parameters:,}",
                row.reason,
            )
            for row in self.rows
        ]
        totals = []
        for name, parameters in self.totals.items():
            leaves = sum(name in (row.optimizer, "total") for row in self.rows)
            first = "total" if name == "total" else ""
            optimizer = "" if name == "total" else name
            size = f"{parameters:,}"
            totals.append((first, f"{leaves} leaves", "", optimizer, size, ""))
        return _table.aligned(header, rows, totals, right={4})


def _view_text(view: _layout.MatrixView | None) -> str:
    if view is None:
        return ""
    return " + ".join(
        f"{count} \N{MULTIPLICATION SIGN} ({m} \N{RIGHTWARDS ARROW} {n})"
        for count, m, n in view.matrices
    )


def describe(params: Any, routing: Routing = None) -> Description:
    """Shows which optimizer each leaf takes, how it is read as matrices, and why.

    Args:
      params: The whole tree of parameters, or of their shapes.
      routing: See `route`.

    Returns:
      A description with one row per leaf and totals. Print it to get a table.

    Raises:
      ValueError: Under the conditions of `route`.

    Example:
      >>> params = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
      >>> describe(params).totals
      {'matrix': 6, 'auxiliary': 2, 'total': 8}
    """
    return Description(
        tuple(
            Row(
                path=place.name,
                shape=_shape(place.leaf),
                view=_view_text(view),
                optimizer=decision.optimizer,
                reason=decision.reason,
                parameters=math.prod(_shape(place.leaf)),
            )
            for place, decision, view in _decide(params, routing)
        )
    )
