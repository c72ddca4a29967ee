"""What SOAP and the KL rules share: moments of a matrix in two eigenbases."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _check, _layout, _linalg, _placement
from optax_matrix._transforms import _arguments, _moments, _numerics, _preconditioner
from optax_matrix._transforms._moments import Moment
from optax_matrix._transforms._preconditioner import (
    Health,
    MatrixRule,
    Preconditioner,
    Scalars,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EigenbasisSettings(Preconditioner):
    """The settings that SOAP and the KL rules have in common; see `SOAP`."""

    factor_b2: float | None = None

    def __post_init__(self) -> None:
        """Checks the arguments and stores them in a hashable form."""
        super().__post_init__()
        if self.factor_b2 is not None:
            self._store_number("factor_b2", 1.0)

    def sides(self, m: int, n: int) -> tuple[bool, bool]:
        """Returns which sides of an m×n matrix have a basis."""
        return m <= self.max_dim, n <= self.max_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class SOAP(EigenbasisSettings):
    r"""The settings of `soap_precondition` and of the optimizers that use it.

    Args:
      factor_b2: Decay of the two statistics, in [0, 1). None is the ``b2`` of the
        second moment.
      stagger: See `Preconditioner`, as the following.
      block_size: See `Preconditioner`.
      max_dim: See `Preconditioner`; such a side keeps the identity for its basis.
      max_failures: See `Preconditioner`.
      factor_dtype: See `Preconditioner`.
      precision: See `Preconditioner`.

    Raises:
      TypeError: If a count is not an int.
      ValueError: If an argument is outside its range.

    Example:
      >>> settings = SOAP(stagger=True, block_size=1024)
    """


class Side(NamedTuple):
    """State of one side of a matrix."""

    statistic: Array  # L or R, packed
    basis: Array  # Q, its eigenvectors, (m, m); zero before the first refresh
    # Running inverse square roots of its eigenvalues, (m,); only of the KL rules.
    scale: Array | None
    health: Health


# Of an m×n matrix; a tuple of them in `whiten_momentum`.
Momentum: TypeAlias = Any


class Moments(NamedTuple):
    """Moments of a matrix in its two bases; None for a side is the identity."""

    momentum: Momentum
    variance: Moment | None  # of squares
    left: Side | None
    right: Side | None


@dataclasses.dataclass(frozen=True)
class InBases:
    """The part of a rule that SOAP and the KL rules have in common."""

    settings: EigenbasisSettings
    mu_dtype: str | None

    def side(self, size: int, kept: bool, dtype: DTypeLike) -> Side | None:
        """Returns a side with zero statistics and basis."""
        if not kept:
            return None
        zeros = jnp.zeros((size, size), self.settings.factor_dtype or dtype)
        return Side(_linalg.pack(zeros), zeros, None, _preconditioner.healthy())

    def rotated(self, x: Array, left: Side | None, right: Side | None) -> Array:
        """Returns Q_Lᵀ x Q_R."""
        if left is not None:
            x = self.product(left.basis.astype(x.dtype).T, x)
        if right is not None:
            x = self.product(x, right.basis.astype(x.dtype))
        return x

    def rotated_back(self, x: Array, left: Side | None, right: Side | None) -> Array:
        """Returns Q_L x Q_Rᵀ."""
        if right is not None:
            x = self.product(x, right.basis.astype(x.dtype).T)
        if left is not None:
            x = self.product(left.basis.astype(x.dtype), x)
        return x

    def product(self, x: Array, y: Array) -> Array:
        """Returns a matmul of the precision that was asked for."""
        return jnp.matmul(x, y, precision=self.settings.precision)

    def observed(self, side: Side, outer: Array, decay: ArrayLike) -> Side:
        """Returns the side with one more outer product in the average."""
        statistic = average(side.statistic, _linalg.pack(outer), decay)
        return side._replace(statistic=statistic.astype(side.statistic.dtype))

    def renewed(
        self, side: Side | None, first: bool, sort: bool
    ) -> tuple[Side | None, Array | None]:
        """Refreshes a basis: by eigenvectors at first, then by one power step.

        Args:
          side: The side.
          first: Whether this is the first basis.
          sort: Whether the columns are ordered by eigenvalue.

        Returns:
          The side, with the last good basis if the new one is not finite; and the
          positions that the columns had in the basis before.
        """
        if side is None:
            return None, None
        statistic = _linalg.unpack(_wide(side.statistic))
        old = _wide(side.basis)
        same = jnp.arange(old.shape[-1])
        if first:
            # There is no last good basis yet.
            old, order = jnp.eye(old.shape[-1], dtype=old.dtype), same
            new = _linalg.eigenbasis(statistic)
        else:
            product, order = _linalg.power_product(statistic, old, sort)
            new = _linalg.q_factor(product)
        good = jnp.all(jnp.isfinite(new))
        basis = jnp.where(good, new, old).astype(side.basis.dtype)
        health = _preconditioner.after_refresh(
            side.health, good, self.settings.max_failures
        )
        return (
            side._replace(basis=basis, health=health),
            jnp.where(good, order, same),
        )

    def zero_moments(self, m: int, n: int, dtype: DTypeLike) -> tuple[Moment, Moment]:
        """Returns a first and a second moment of zeros as they are kept."""
        zeros = jnp.zeros((m, n), dtype)
        in_8_bits = self.mu_dtype in _moments.EIGHT_BITS
        nu_dtype = _moments.OF_SQUARES if in_8_bits else self.mu_dtype
        return _moments.zeros(zeros, self.mu_dtype), _moments.zeros(zeros, nu_dtype)

    def carried(
        self, state: Moments, left: Side | None, right: Side | None, scalars: Scalars
    ) -> Momentum:
        """Returns the momentum in new bases."""
        momentum = _moments.read(state.momentum)
        momentum = self.rotated_back(momentum, state.left, state.right)
        momentum = self.rotated(momentum, left, right)
        return _moments.write(momentum, state.momentum, scalars["count"])

    def apply(self, direction: Array, state: Moments) -> Array:
        """Returns the direction: a refresh acts from the next update on."""
        del state
        return direction

    def refresh_flops(self, m: int, n: int) -> float:
        """Returns about the cost of a power step: a product and a QR per side."""
        kept = zip((m, n), self.settings.sides(m, n), strict=True)
        return float(sum(size**3 for size, side in kept if side))


def average(
    old: Moment, new: Array, decay: ArrayLike, *, square: bool = False
) -> Array:
    """Returns a moving average in the dtype of `new`; of squares, see `_moments`."""
    old = _moments.read(old, new.dtype, square=square)
    return _numerics.moving_average(old, new, decay)


def _wide(x: Array) -> Array:
    return x.astype(_linalg.at_least_float32(x.dtype))


def transformation(
    rule: MatrixRule,
    settings: EigenbasisSettings,
    momentum: optax.ScalarOrSchedule,
    b2: ArrayLike,
    *,
    eps: ArrayLike,
    refresh: ArrayLike,
    more: Mapping[str, Any] | None = None,
    layout: _layout.Layout,
    placement: _placement.Placement | None,
) -> optax.GradientTransformationExtraArgs:
    """Checks the numbers and makes the transformation of a rule in eigenbases.

    `more` has further hyperparameters of the rule, which are not checked.
    """
    _arguments.number_or_schedule("momentum", momentum, 0.0, 1.0)
    _check.number("b2", b2, 0.0, 1.0)
    _check.number("eps", eps, 0.0, low_open=True)
    _preconditioner.check_refresh(refresh, 0)
    scalars = {
        "momentum": momentum,
        "b2": b2,
        "factor_b2": b2 if settings.factor_b2 is None else settings.factor_b2,
        "eps": eps,
        "start": 0,
        "refresh": refresh,
        **(more or {}),
    }
    return _preconditioner.preconditioned(
        rule, settings, scalars, layout=layout, placement=placement
    )
