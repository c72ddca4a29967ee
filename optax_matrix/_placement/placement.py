"""Where the leaves of a tree lie."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType

from optax_matrix import _check, _layout, _mesh, _paths


@dataclasses.dataclass(frozen=True)
class Placement:
    """Says where the matrices of a tree lie, and how many are worked on at once.

    On a mesh with explicit axes (the default of `jax.make_mesh` since JAX 0.9) the
    types of arrays carry their shardings, and no `Placement` is needed. On a mesh with
    auto axes, shardings are not visible while a function is traced: pass the parameters
    or their shardings here. Without them, orthogonalization assumes that leaves are
    replicated if a mesh is set (`jax.set_mesh`), so that sharded leaves are gathered
    first; with no mesh set, and in preconditioners, every product is left to the
    compiler.

    Args:
      sharding: The sharded parameters, or a tree (prefix) of their shardings, each a
        `jax.NamedSharding` on one mesh, or arrays on one device. Updates must have the
        same shardings.
      stack_size: The largest number of matrices of one shape that a device multiplies
        in one batched product, or receives in one exchange, at least 1. 1 is a loop,
        which is fastest on CPU; larger stacks take more memory. None: 1 on CPU and
        stacks of 2²⁶ entries elsewhere, and exchanges of up to 1 GiB per device.
      period: Every how many updates `orthogonalize` works on whole matrices, at least
        1, beginning with the first. In all others, every device orthogonalizes the
        pieces that it holds as if they were matrices, without an exchange (MuonBP). On
        a mesh with auto axes this needs ``sharding``.
      piece_scale: The learning rate of these other updates over that of updates of
        whole matrices, not negative. Before it, pieces are multiplied so that polar
        factors of them have the RMS of those of whole matrices. It needs an optimizer
        that does not fix the size of its updates.

    Raises:
      TypeError: At construction, if ``sharding`` has leaves that are neither, a count
        is not an int, or ``piece_scale`` is not a number.
      ValueError: At construction, if a count is below 1, or ``piece_scale`` is negative
        or not finite.

    References:
      ``period``: Khaled et al., 2025, MuonBP, `arXiv:2510.16981
      <https://arxiv.org/abs/2510.16981>`_, where ``piece_scale`` is the ratio of the
      two learning rates.

    Example:
      >>> import jax
      >>> mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
      >>> everywhere = jax.NamedSharding(mesh, jax.P())
      >>> placement = Placement(everywhere)  # one sharding for all leaves
    """

    sharding: Any = None
    stack_size: int | None = None
    period: int = 1
    piece_scale: float = 1.0

    def __post_init__(self) -> None:
        """Stores the shardings of the parameters instead of the parameters."""
        if self.stack_size is not None:
            _check.static_int("stack_size", self.stack_size, 1)
        _check.static_int("period", self.period, 1)
        _check.static_number("piece_scale", self.piece_scale)
        _check.in_range("piece_scale", self.piece_scale, 0.0)
        object.__setattr__(self, "piece_scale", float(self.piece_scale))

        def sharding_of(leaf: Any) -> Any:
            found = getattr(leaf, "sharding", None)
            # That of a `jax.ShapeDtypeStruct` may be None, which is no leaf.
            return leaf if found is None else found

        tree = jax.tree.map(sharding_of, _paths.unboxed(self.sharding))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            named = isinstance(leaf, jax.NamedSharding)
            if not named and not isinstance(leaf, jax.sharding.SingleDeviceSharding):
                raise TypeError(
                    "`sharding` must hold sharded arrays or `jax.NamedSharding`s, got "
                    f"{type(leaf).__name__} at '{_paths.path_name(path)}'. Pass the "
                    "parameters, or jax.tree.map(lambda p: p.sharding, params)."
                )
        object.__setattr__(self, "sharding", tree)

    def shardings(
        self, tree: Any, by_type: bool = False
    ) -> list[jax.NamedSharding | None]:
        """Returns the sharding of every leaf, or None where it is on one device.

        Inside a `jax.shard_map` of the user's every device has leaves of its own.

        Args:
          tree: Arrays or their descriptions.
          by_type: Whether to ignore shardings over auto axes, which are visible only
            outside `jax.jit`, so that ``init`` and ``update`` agree.
        """
        if self.sharding is None or _mesh.inside_shard_map():
            of = _mesh.sharding_of_type if by_type else _mesh.visible_sharding
            return [of(leaf) for leaf in jax.tree.leaves(tree)]
        matched = _paths.match(self.sharding, tree, "sharding", lambda _: False)
        return [
            entry if isinstance(entry, jax.NamedSharding) else None
            for _, entry, _ in matched
        ]


def as_placement(placement: Placement | None, *, periodic: bool = False) -> Placement:
    """Returns the placement, or the default one for None.

    Args:
      placement: The placement.
      periodic: Whether the user can work on pieces of matrices.

    Raises:
      TypeError: If it is something else, such as a tree of parameters.
      ValueError: If it has a period, and the user needs whole matrices.
    """
    if placement is None:
        return Placement()
    _check.instance("placement", placement, Placement)
    if placement.period > 1 and not periodic:
        raise ValueError(
            f"`placement` must have period 1 here, got {placement.period}: only stages "
            "that orthogonalize, and do nothing else with matrices, work on pieces."
        )
    return placement


def check_visible(leaves: Sequence["Leaf"], placement: Placement) -> None:
    """Raises if pieces are wanted where the shardings of updates are not visible."""
    hidden = placement.sharding is None and any(
        AxisType.Auto in leaf.sharding.mesh.axis_types
        for leaf in leaves
        if leaf.sharding is not None
    )
    if hidden:
        raise ValueError(
            f"`placement` has the period {placement.period}, but no `sharding`, which "
            "it needs on a mesh with auto axes: pass the sharded parameters, as in "
            f"om.Placement(params, period={placement.period})."
        )


class Leaf(NamedTuple):
    """A leaf, its matrices, and its sharding, which is None on one device."""

    value: Any
    view: _layout.MatrixView
    sharding: jax.NamedSharding | None


def resolve(
    tree: Any,
    layout: _layout.Layout,
    placement: Placement,
    by_type: bool = False,
) -> list[Leaf]:
    """Finds the matrices and the sharding of every leaf, in the order of the leaves.

    Args:
      tree: Arrays or their descriptions.
      layout: Which axes make the matrices, see `_layout.tree_views`.
      placement: Where leaves lie.
      by_type: See `Placement.shardings`.

    Raises:
      TypeError: If an entry of `layout` is not a layout.
      ValueError: If `layout` or `placement` does not match `tree`, or a layout does not
        fit its leaf.
    """
    pairs = zip(
        _layout.tree_views(layout, tree),
        placement.shardings(tree, by_type),
        strict=True,
    )
    return [Leaf(value, view, sharding) for (view, value), sharding in pairs]
