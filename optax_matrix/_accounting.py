"""What training costs before it runs: work, exchanges, and the memory of the state."""

import dataclasses
import math
from typing import Any

import jax
import optax

from optax_matrix import _layout, _linalg, _paths, _placement, _routing, _table
from optax_matrix._placement import PlacementDescription


def describe_placement(
    params: Any,
    orthogonalize: str | _linalg.PartwiseMethod = "newton_schulz",
    *,
    routing: _routing.Routing = None,
    placement: _placement.Placement | None = None,
) -> PlacementDescription:
    """Shows what orthogonalizing a model's matrices costs each device, by formula.

    Nothing is compiled, and no devices are needed: leaves may be `jax.ShapeDtypeStruct`
    with shardings on a `jax.sharding.AbstractMesh` of any size. The tests hold the
    numbers against compiled programs.

    Args:
      params: The whole tree of parameters, or of their descriptions.
      orthogonalize: The method, as the optimizers take it; ``"exact"`` has no formula.
      routing: Which leaves are matrices, see `route`.
      placement: Where they lie, see `Placement`. None: what leaves say themselves.

    Returns:
      A description with one row per group of matrices and totals; print it for a table.

    Raises:
      TypeError: If `orthogonalize` has no formula for its FLOPs.
      ValueError: As `route`; and if a sharding does not divide its leaf.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((256,), ("fsdp",))
      >>> rows = jax.NamedSharding(mesh, jax.P("fsdp", None))
      >>> leaf = jax.ShapeDtypeStruct((4096, 11008), "float32", sharding=rows)
      >>> params = {f"up_{i}": {"kernel": leaf} for i in range(512)}
      >>> cost = describe_placement(params).groups[0]
      >>> cost.per_device, cost.exchanges
      (2, 2)
    """
    method = _linalg.as_method(orthogonalize)
    if not isinstance(method, _linalg.PartwiseMethod):
        raise TypeError(
            f"`orthogonalize` must have a formula for its FLOPs, got {method!r}. Pass "
            "'newton_schulz', 'halley' or one of the objects behind them."
        )
    place = placement or _placement.Placement()
    layouts = jax.tree.map(
        lambda label: optax.MaskedNode() if isinstance(label, str) else label,
        _routing.route(params, routing),
    )
    matrices = jax.tree.map(
        lambda layout, leaf: optax.MaskedNode() if _masked(layout) else leaf,
        layouts,
        params,
        is_leaf=_masked,
    )
    pairs = _layout.tree_views(layouts, matrices)
    return _placement.describe(
        method,
        [view for view, _ in pairs],
        [leaf for _, leaf in pairs],
        place.of(matrices),
        place.strategy,
    )


def _masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


@dataclasses.dataclass(frozen=True)
class StateRow:
    """A parameter and the state that it causes.

    Attributes:
      path: Its name, as in ``blocks/0/attn/query/kernel``.
      shape: Its shape.
      dtype: The name of its dtype.
      parameter_bytes: Its size.
      state_bytes: By how much the state is larger than without it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    parameter_bytes: int
    state_bytes: int

    @property
    def ratio(self) -> float:
        """Bytes of state for a byte of the parameter; 0 for a parameter of no bytes."""
        return _ratio(self.state_bytes, self.parameter_bytes)


@dataclasses.dataclass(frozen=True)
class StateDescription:
    """The memory of an optimizer's state, a row per leaf; `str` is a table.

    Attributes:
      rows: The leaves.
      shared_bytes: What the rows leave of the whole state: counters, for example.
      joint_bytes: How much of it is there neither without leaves nor because of one of
        them, but because of several together: 0 for an optimizer that keeps a state
        for each leaf by itself, and negative for one that keeps less for several than
        for each alone.
    """

    rows: tuple[StateRow, ...]
    shared_bytes: int
    joint_bytes: int = 0

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(row.parameter_bytes for row in self.rows)

    @property
    def state_bytes(self) -> int:
        """Bytes of the whole state."""
        return sum(row.state_bytes for row in self.rows) + self.shared_bytes

    @property
    def ratio(self) -> float:
        """Bytes of state for a byte of parameters."""
        return _ratio(self.state_bytes, self.parameter_bytes)

    def __str__(self) -> str:
        """Returns the table, totals last."""
        header = ("path", "shape", "dtype", "bytes", "state bytes", "ratio")
        rows = [
            (row.path, str(row.shape), row.dtype, *_sizes(row)) for row in self.rows
        ]
        totals = [
            ("shared", "", "", "", f"{self.shared_bytes:,}", ""),
            ("total", f"{len(rows)} leaves", "", *_sizes(self)),
        ]
        if self.joint_bytes:
            joint = ("of it joint", "", "", "", f"{self.joint_bytes:,}", "")
            totals.insert(1, joint)
        return _table.aligned(header, rows, totals, right={3, 4, 5})


def _sizes(of: StateRow | StateDescription) -> tuple[str, str, str]:
    return f"{of.parameter_bytes:,}", f"{of.state_bytes:,}", f"{of.ratio:.2f}"


def _ratio(state_bytes: int, parameter_bytes: int) -> float:
    return state_bytes / parameter_bytes if parameter_bytes else 0.0


def describe_state(
    optimizer: optax.GradientTransformation, params: Any
) -> StateDescription:
    """Shows how much memory an optimizer's state takes, by leaf of the parameters.

    For any optimizer, of this library or not: the state that a leaf causes is that of
    the tree in which every other leaf is an empty node, as None is, less the state of
    the tree in which all are. `init` is traced once a leaf; nothing is allocated.

    Args:
      optimizer: The optimizer.
      params: The whole tree of parameters, or of their `jax.ShapeDtypeStruct`s.

    Returns:
      A description with one row per leaf and totals; print it for a table. Bytes are
      of the whole tree over all devices, copies of the same part not counted.

    Raises:
      TypeError: If `optimizer` is no `optax.GradientTransformation`.
      ValueError: If `params` has no leaves.
      Exception: What `optimizer.init` raises, with a note of which leaves it was given:
        a few cannot do without any, such as `optax.flatten` and `optax.lbfgs`.

    Example:
      >>> up = jax.ShapeDtypeStruct((64, 256), "bfloat16")
      >>> bias = jax.ShapeDtypeStruct((256,), "bfloat16")
      >>> adam = optax.adam(1e-3, mu_dtype="float32")
      >>> print(describe_state(adam, {"up": {"kernel": up, "bias": bias}}))
      path       shape      dtype      bytes  state bytes  ratio
      ----------------------------------------------------------
      up/bias    (256,)     bfloat16     512        1,536   3.00
      up/kernel  (64, 256)  bfloat16  32,768       98,304   3.00
      ----------------------------------------------------------
      shared                                            4
      total      2 leaves             33,280       99,844   3.00
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            "`optimizer` must be an optax.GradientTransformation, such as "
            f"`optax.adam(1e-3)`, got {type(optimizer).__name__}. Of an "
            "`nnx.Optimizer` pass `tx`, of an `optax.MultiSteps` "
            "`gradient_transformation()`."
        )
    leaves, treedef = jax.tree.flatten(params)
    if not leaves:
        raise ValueError(
            f"`params` must have at least one leaf, got {treedef}. Pass the parameters "
            "or their `jax.ShapeDtypeStruct`s."
        )
    described = jax.eval_shape(lambda nodes: nodes, leaves)
    absent = [_paths.Absent(leaf.shape) for leaf in described]

    def state(nodes: list[Any], which: str) -> int:
        try:
            tree = jax.eval_shape(optimizer.init, treedef.unflatten(nodes))
        except Exception as error:
            error.add_note(f"`describe_state` called `init` with {which}.")
            raise
        return sum(map(_bytes, jax.tree.leaves(tree)))

    whole = state(described, "all leaves")
    none = state(absent, "every leaf left out")
    places = [place for place in _paths.places(params) if not place.empty]
    rows = tuple(
        StateRow(
            path=place.name,
            shape=leaf.shape,
            dtype=str(leaf.dtype),
            parameter_bytes=_bytes(leaf),
            state_bytes=state(
                [*absent[:i], leaf, *absent[i + 1 :]],
                f"every leaf but '{place.name}' left out",
            )
            - none,
        )
        for i, (place, leaf) in enumerate(zip(places, described, strict=True))
    )
    shared = whole - sum(row.state_bytes for row in rows)
    return StateDescription(rows, shared, joint_bytes=shared - none)


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
