"""What training costs before it runs: who works where, and what is exchanged."""

from typing import Any

import jax
import optax

from optax_matrix import _layout, _linalg, _placement, _routing
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
        place.stack_size,
    )


def _masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
