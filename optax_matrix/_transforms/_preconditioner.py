"""What the preconditioners share: settings, state, and when it is refreshed."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _check, _layout, _placement
from optax_matrix._transforms import _arguments, _per_matrix
from optax_matrix._transforms._per_matrix import Scalars


class Health(NamedTuple):
    """How the refreshes of one root or basis went."""

    failures: jax.Array  # int32, consecutive failures; the last good result is in use
    stuck: jax.Array  # bool, whether there ever were `max_failures` in a row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preconditioner:
    """The settings that all preconditioners have.

    Args:
      stagger: Whether every matrix is refreshed in an update of its own, spread evenly
        over ``refresh`` updates, instead of all matrices in the same one. The first
        refresh is always of all matrices.
      block_size: The largest block, at least 1. Longer sides are cut into blocks of
        this size, the last one smaller, and each block is a matrix of its own. None:
        whole matrices.
      max_dim: Sides (of a block) longer than this have no statistic.
      max_failures: After this many failed refreshes in a row, ``stuck`` in the state is
        set permanently; see `diagnostics.refreshes`.
      factor_dtype: The dtype of statistics, roots and bases in the state: bfloat16,
        float32 or float64. None is float32, and float64 for float64 updates. In
        bfloat16 bases are orthogonal to three digits only.
      precision: The precision of the matmuls of every update: ``"default"``, ``"high"``
        or ``"highest"``. Refreshes always use the highest.

    Raises:
      TypeError: If a count is not an int.
      ValueError: If an argument is outside its range.
    """

    stagger: bool = False
    block_size: int | None = None
    max_dim: int = 10_000
    max_failures: int = 3
    factor_dtype: DTypeLike | None = None
    precision: str = "highest"

    def __post_init__(self) -> None:
        """Checks the arguments and stores them in a hashable form."""
        _check.boolean("stagger", self.stagger)
        _check.static_int("max_dim", self.max_dim, 1)
        _check.static_int("max_failures", self.max_failures, 1)
        if self.block_size is not None:
            _check.static_int("block_size", self.block_size, 1)
        _check.one_of("precision", self.precision, ("default", "high", "highest"))
        dtype = _arguments.state_dtype("factor_dtype", self.factor_dtype)
        object.__setattr__(self, "factor_dtype", dtype)

    def _store_number(self, name: str, high: float = math.inf, **bounds: bool) -> None:
        """Checks a number from 0 to `high`, and stores it as a Python float."""
        value = getattr(self, name)
        _check.number(name, value, 0.0, high, **bounds)
        object.__setattr__(self, name, float(value))


class MatrixRule(Protocol):
    """What a preconditioner does to one matrix; hashable.

    An update is `observe`, then `refresh` if it is due, then `apply`. Hyperparameters
    come in `scalars` and may be traced; ``count`` is the number of earlier updates.
    """

    def init(self, m: int, n: int, dtype: DTypeLike) -> Any:
        """Returns the state of an m×n matrix."""
        ...

    def observe(self, g: Array, state: Any, scalars: Scalars) -> tuple[Array, Any]:
        """Returns the direction for `apply`, and the state that has seen `g`."""
        ...

    def refresh(self, state: Any, scalars: Scalars, first: bool) -> Any:
        """Returns the state with new roots or bases; `first` for the first refresh."""
        ...

    def apply(self, direction: Array, state: Any) -> Array:
        """Returns the update."""
        ...

    def flops(self, m: int, n: int) -> int:
        """Returns the matmul FLOPs of an update of one matrix without a refresh."""
        ...

    def refresh_flops(self, m: int, n: int) -> float:
        """Returns what a refresh costs, relative to those of other shapes."""
        ...


@dataclasses.dataclass(frozen=True)
class Precondition:
    """Applies a rule to the matrices of one shape; the work of `map_matrices`."""

    rule: MatrixRule
    stagger: bool
    counts: tuple[tuple[tuple[int, int], int], ...]  # of all matrices, by shape
    stack_size: int | None

    def __call__(
        self,
        arrays: Sequence[Array],
        state: _placement.MatrixStack,
        scalars: Scalars,
    ) -> tuple[list[Array], _placement.MatrixStack]:
        """Returns the updates and the new states."""
        x, rule = _placement.concatenated(arrays), self.rule
        (m, n), (numbers, old) = x.shape[-2:], state
        size = self.stack_size or _placement.stack_size(m, n)

        def observe(g: Array, one: Any) -> tuple[Array, Any]:
            return rule.observe(g, one, scalars)

        direction, seen = _placement.map_stack(observe, (x, old), size)
        due = self._due(numbers, (m, n), scalars)

        def refreshed(ones: Any) -> Any:
            branches = [
                lambda one: one,
                lambda one: rule.refresh(one, scalars, first=False),
                lambda one: rule.refresh(one, scalars, first=True),
            ]
            # One matrix after another: a factorization gains nothing from a batch, and
            # most matrices are not due.
            return jax.lax.map(
                lambda pair: jax.lax.switch(pair[0], branches, pair[1]), (due, ones)
            )

        new = jax.lax.cond(jnp.any(due > 0), refreshed, lambda ones: ones, seen)
        y = _placement.map_stack(rule.apply, (direction, new), size)
        done = _placement.split_like(y.astype(x.dtype), arrays)
        return done, _placement.MatrixStack(numbers, new)

    def _due(self, numbers: Array, shape: tuple[int, ...], scalars: Scalars) -> Array:
        """Returns for every matrix 0, or 1 if it is due, or 2 for its first refresh."""
        since, every = scalars["count"] - scalars["start"], scalars["refresh"]
        turn = jnp.zeros_like(numbers)
        if self.stagger:
            positions = jnp.asarray(self._positions()[shape], jnp.float32)
            turn = jnp.floor(positions[numbers] * every).astype(numbers.dtype)
        later = (since > 0) & (since % every == turn)
        due = jnp.where(since == 0, 2, jnp.where(later, 1, 0))
        return jnp.where(numbers < 0, 0, due)

    def _positions(self) -> dict[tuple[int, ...], np.ndarray]:
        """Returns when each matrix of a shape is refreshed, in [0, 1) of a period.

        All matrices stand in a line, each as long as its refresh costs, so that every
        update does an equal share, and neighbours, who have different owners, are
        refreshed together. It does not depend on the mesh.
        """
        costs = [
            np.full(count, self.rule.refresh_flops(*shape))
            for shape, count in self.counts
        ]
        line = np.concatenate(costs)
        total = line.sum() or 1.0
        middles = (np.cumsum(line) - line / 2) / total
        ends = np.cumsum([count for _, count in self.counts])[:-1]
        shapes = [shape for shape, _ in self.counts]
        return dict(zip(shapes, np.split(middles, ends), strict=True))


def preconditioned(
    rule: MatrixRule,
    settings: Preconditioner,
    scalars: Mapping[str, Any],
    *,
    layout: _layout.Layout,
    placement: _placement.Placement | None,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that applies a rule to every matrix.

    Args:
      rule: The rule.
      settings: Its settings.
      scalars: Its hyperparameters, ``refresh`` and ``start`` among them; they may be
        schedules, or trees of them.
      layout: Which axes of a leaf are the matrix.
      placement: Where leaves lie.
    """
    place = _placement.as_placement(placement)

    def work(leaves: Sequence[_placement.Leaf]) -> Precondition:
        counts = tuple(_placement.matrix_counts(leaves).items())
        return Precondition(rule, settings.stagger, counts, place.stack_size)

    return _per_matrix.per_matrix(
        rule.init, work, scalars, layout, place, settings.block_size
    )


def healthy() -> Health:
    """Returns the health before the first refresh."""
    return Health(jnp.zeros((), jnp.int32), jnp.zeros((), bool))


def after_refresh(health: Health, good: jax.Array, max_failures: int) -> Health:
    """Updates the health after a refresh that was good or failed."""
    failures = jnp.where(good, 0, health.failures + 1)
    return Health(failures, health.stuck | (failures >= max_failures))


def update_flops(m: int, n: int, sides: tuple[bool, bool], rotations: int) -> int:
    """Returns the matmul FLOPs of an update of one m×n matrix without a refresh.

    Args:
      m: Inputs.
      n: Outputs.
      sides: Which of the two sides have a statistic.
      rotations: How many products there are with the matrices of each side, besides the
        one for the statistic.
    """
    left, right = sides
    return (1 + rotations) * 2 * m * n * (left * m + right * n)


def check_refresh(refresh: ArrayLike, start: ArrayLike) -> None:
    """Checks the two arguments of that name, which may be traced."""
    _check.whole_number("refresh", refresh, 1)
    _check.whole_number("start", start, 0)
