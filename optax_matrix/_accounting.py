"""Costs by formula: work and exchanges of matrices, and the memory of the state."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
import optax
from jax.typing import DTypeLike

from optax_matrix import (
    _check,
    _layout,
    _linalg,
    _paths,
    _placement,
    _routing,
    _table,
    _transforms,
)
from optax_matrix._placement import PlacementDescription
from optax_matrix._transforms import Preconditioner


def describe_placement(
    params: Any,
    method: str | _linalg.PolarMethod | Preconditioner = "newton_schulz",
    *,
    backend: str,
    routing: _routing.Routing = None,
    placement: _placement.Placement | None = None,
) -> PlacementDescription:
    """Counts what work on the matrices of a model costs each device, by formula.

    Nothing is compiled, and no devices are needed: leaves may be `jax.ShapeDtypeStruct`
    with shardings on a `jax.sharding.AbstractMesh` of any size. The tests compare the
    numbers with compiled programs. Computing roots or bases of a preconditioner is not
    counted, because it does not consist of matmuls.

    Args:
      params: The whole tree of parameters, or of their descriptions.
      method: The work: a polar method as `orthogonalize` takes it, or the settings of a
        preconditioner (`Shampoo`, `SOAP` or `KL`).
      backend: The backend that does the work: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
      routing: Which leaves are matrices, see `route`.
      placement: Where they lie, see `Placement`. None: infer from the leaves. Shardings
        over auto axes count, so the optimizer needs a `Placement` with them.

    Returns:
      A description with one row per group of matrices and totals; print it for a table.

    Raises:
      TypeError: If ``method`` has no formula for its FLOPs.
      ValueError: As `route`; and if a sharding does not divide its leaf.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((256,), ("fsdp",))
      >>> rows = jax.NamedSharding(mesh, jax.P("fsdp", None))
      >>> leaf = jax.ShapeDtypeStruct((4096, 11008), "float32", sharding=rows)
      >>> params = {f"up_{i}": {"kernel": leaf} for i in range(512)}
      >>> cost = describe_placement(params, backend="gpu").groups[0]
      >>> cost.per_owner, cost.exchanges
      (2, 2)
    """
    _check.one_of("backend", backend, ("cpu", "gpu", "tpu"))
    fitted = _routing.fitted_layout(params, routing)
    places = [place for place in _paths.places(params) if not place.empty]
    matrices = jax.tree.structure(params).unflatten(
        [
            place.leaf if place.name in fitted.views else optax.MaskedNode()
            for place in places
        ]
    )
    place = _placement.as_placement(
        placement, periodic=not isinstance(method, Preconditioner)
    )
    leaves = _placement.resolve(matrices, fitted, place)
    if isinstance(method, Preconditioner):
        rule = _transforms.rule_of(method)
        if method.block_size is not None:
            leaves = [
                leaf._replace(view=_layout.blocked(leaf.view, method.block_size))
                for leaf in leaves
            ]
        return _placement.describe_groups(
            leaves,
            lambda m, n, dtype: rule.flops(m, n),
            functools.partial(_rule_bytes, rule),
            transposable=False,
            stack_size=place.stack_size,
        )
    polar = _linalg.as_method(method)
    flops = getattr(polar, "flops", None)
    if flops is None:
        raise TypeError(
            f"`method` must have a formula for its FLOPs, `flops`, got {polar!r}. See "
            "`PolarMethod`."
        )
    return _placement.describe_groups(
        leaves,
        lambda m, n, dtype: flops(m, n, dtype, backend),
        lambda m, n, dtype: 0,
        transposable=bool(getattr(polar, "transposable", False)),
        stack_size=place.stack_size,
        period=place.period,
    )


def _rule_bytes(rule: Any, m: int, n: int, dtype: DTypeLike) -> int:
    wide = _linalg.at_least_float32(dtype)
    state = jax.eval_shape(lambda: rule.init(m, n, wide))
    return sum(map(_bytes, jax.tree.leaves(state)))


@dataclasses.dataclass(frozen=True)
class StateRow:
    """A parameter and the state that is kept for it.

    Attributes:
      path: Its name, as in ``blocks/0/attn/query/kernel``.
      shape: Its shape.
      dtype: The name of its dtype.
      parameter_bytes: Its size.
      state_bytes: How much larger the state is than without it.
      host_bytes: The part of `state_bytes` in the memory of the host, see
        `offload_state`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    parameter_bytes: int
    state_bytes: int
    host_bytes: int = 0

    @property
    def ratio(self) -> float:
        """Bytes of state per byte of the parameter; 0 for an empty parameter."""
        return _ratio(self.state_bytes, self.parameter_bytes)


@dataclasses.dataclass(frozen=True)
class StateDescription:
    """The memory of an optimizer's state, one row per leaf; `str` is a table.

    Attributes:
      rows: The leaves.
      shared_bytes: The rest of the state, such as counters.
      joint_bytes: The part of `shared_bytes` that is there only if there are several
        leaves. 0 for an optimizer that keeps the state of each leaf separately;
        negative for one that needs less for several leaves than for each alone.
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
    def host_bytes(self) -> int:
        """Bytes of the state of the leaves in the memory of the host."""
        return sum(row.host_bytes for row in self.rows)

    @property
    def ratio(self) -> float:
        """Bytes of state per byte of parameters."""
        return _ratio(self.state_bytes, self.parameter_bytes)

    def __str__(self) -> str:
        """Returns the table, totals last."""
        header = ("path", "shape", "dtype", "bytes", "state bytes", "ratio", "on host")
        rows = [
            (row.path, str(row.shape), row.dtype, *_sizes(row)) for row in self.rows
        ]
        totals = [
            ("shared", "", "", "", f"{self.shared_bytes:,}", "", ""),
            ("total", f"{len(rows)} leaves", "", *_sizes(self)),
        ]
        if self.joint_bytes:
            joint = ("of it joint", "", "", "", f"{self.joint_bytes:,}", "", "")
            totals.insert(1, joint)
        shown = len(header) if self.host_bytes else len(header) - 1
        cells = [[row[:shown] for row in part] for part in ([header], rows, totals)]
        return _table.aligned(cells[0][0], *cells[1:], right={3, 4, 5, 6})


def _sizes(of: StateRow | StateDescription) -> tuple[str, ...]:
    counts = of.parameter_bytes, of.state_bytes, of.host_bytes
    parameter, state, host = (f"{count:,}" for count in counts)
    return parameter, state, f"{of.ratio:.2f}", host


def _ratio(state_bytes: int, parameter_bytes: int) -> float:
    return state_bytes / parameter_bytes if parameter_bytes else 0.0


def describe_state(
    optimizer: optax.GradientTransformation, params: Any
) -> StateDescription:
    """Counts the memory of an optimizer's state, by leaf of the parameters.

    It works for any optimizer, of this library or not: the bytes of a leaf are those of
    the state of a tree in which every other leaf is an empty node, less those of a tree
    in which all leaves are. ``init`` is traced once per leaf, and nothing is allocated.

    Args:
      optimizer: The optimizer.
      params: The whole tree of parameters, or of their shapes and dtypes as
        `jax.ShapeDtypeStruct`.

    Returns:
      A description with one row per leaf and totals; print it for a table. Bytes are
      those of the whole state over all devices, without counting copies.

    Raises:
      TypeError: If ``optimizer`` is not an `optax.GradientTransformation`.
      ValueError: If ``params`` has no leaves.
      Exception: Whatever ``optimizer.init`` raises, with a note of the leaves it was
        given. Some optimizers need all leaves, such as `optax.flatten` and
        `optax.lbfgs`.

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
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        _layout.check_array(leaf, _paths.path_name(path))
    described = jax.eval_shape(lambda nodes: nodes, leaves)
    absent = [_paths.Absent(leaf.shape) for leaf in described]

    def state(nodes: list[Any], which: str) -> np.ndarray:
        """Returns the bytes of the state, and those of them on the host."""
        found = np.zeros(2, np.int64)

        def init(tree: Any) -> None:
            for leaf in map(jax.typeof, jax.tree.leaves(optimizer.init(tree))):
                on_host = leaf.memory_space == jax.memory.Space.Host
                found[:] += _bytes(leaf) * np.array([1, on_host])

        try:
            jax.eval_shape(init, treedef.unflatten(nodes))
        except Exception as error:
            error.add_note(f"`describe_state` called `init` with {which}.")
            raise
        return found

    whole = state(described, "all leaves")
    none = state(absent, "every leaf left out")
    places = [place for place in _paths.places(params) if not place.empty]
    rows, rest = [], whole
    for i, (place, leaf) in enumerate(zip(places, described, strict=True)):
        alone = state(
            [*absent[:i], leaf, *absent[i + 1 :]],
            f"every leaf but '{place.name}' left out",
        )
        own = alone - none
        rest = rest - own
        row = StateRow(
            path=place.name,
            shape=leaf.shape,
            dtype=str(leaf.dtype),
            parameter_bytes=_bytes(leaf),
            state_bytes=int(own[0]),
            host_bytes=int(own[1]),
        )
        rows.append(row)
    shared = int(rest[0])
    return StateDescription(tuple(rows), shared, joint_bytes=shared - int(none[0]))


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
