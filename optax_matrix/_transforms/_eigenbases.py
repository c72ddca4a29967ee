"""What SOAP and the KL rules share: two bases a matrix, and moments in them."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from optax_matrix import _linalg
from optax_matrix._transforms import _numerics, _preconditioner
from optax_matrix._transforms._preconditioner import Health


class Side(NamedTuple):
    """What is known of one side of a matrix."""

    statistic: Array  # L or R, (m, m)
    basis: Array  # Q, its eigenvectors, (m, m); zero before the first refresh
    # Running inverse square roots of its eigenvalues, (m,); only of the KL rules.
    scale: Array | None
    health: Health


class Moments(NamedTuple):
    """Moments of a matrix in the two bases, and these; None is the identity."""

    momentum: Array  # (m, n)
    variance: Array | None  # (m, n)
    left: Side | None
    right: Side | None


def side(size: int, dtype: str) -> Side:
    """A side of which nothing is known yet."""
    zeros = jnp.zeros((size, size), dtype)
    return Side(zeros, zeros, None, _preconditioner.healthy())


def rotated(x: Array, left: Side | None, right: Side | None, precision: str) -> Array:
    """Q_Lᵀ x Q_R."""
    if left is not None:
        x = jnp.matmul(left.basis.astype(x.dtype).T, x, precision=precision)
    if right is not None:
        x = jnp.matmul(x, right.basis.astype(x.dtype), precision=precision)
    return x


def rotated_back(
    x: Array, left: Side | None, right: Side | None, precision: str
) -> Array:
    """Q_L x Q_Rᵀ."""
    if left is not None:
        x = jnp.matmul(left.basis.astype(x.dtype), x, precision=precision)
    if right is not None:
        x = jnp.matmul(x, right.basis.astype(x.dtype).T, precision=precision)
    return x


def started(side: Side | None, max_failures: ArrayLike) -> Side | None:
    """With the eigenvectors of its statistic as its basis."""
    if side is None:
        return None
    wide = _wide(side.statistic)
    found = _linalg.eigenbasis(wide)
    good = jnp.all(jnp.isfinite(found))
    # Nothing can be kept yet.
    basis = jnp.where(good, found, jnp.eye(found.shape[-1], dtype=found.dtype))
    return side._replace(
        basis=basis.astype(side.basis.dtype),
        health=_preconditioner.after_refresh(side.health, good, max_failures),
    )


def followed(
    side: Side | None, max_failures: ArrayLike, sort: bool
) -> tuple[Side | None, Array | None]:
    """With its basis moved by a power step, and where its columns were before."""
    if side is None:
        return None, None
    old = _wide(side.basis)
    found, order = _linalg.power_step(_wide(side.statistic), old, sort)
    good = jnp.all(jnp.isfinite(found))
    basis = jnp.where(good, found, old).astype(side.basis.dtype)
    health = _preconditioner.after_refresh(side.health, good, max_failures)
    order = jnp.where(good, order, jnp.arange(order.shape[-1]))
    return side._replace(basis=basis, health=health), order


def carried(
    momentum: Array,
    old: tuple[Side | None, Side | None],
    new: tuple[Side | None, Side | None],
    precision: str,
) -> Array:
    """A momentum in the old bases, in the new ones."""
    wide = _wide(momentum)
    moved = rotated(rotated_back(wide, *old, precision), *new, precision)
    return moved.astype(momentum.dtype)


def refresh_flops(m: int, n: int, max_dim: int) -> float:
    """About what a power step costs: a product and a QR factorization a side."""
    return float(sum(size**3 for size in (m, n) if size <= max_dim))


def average(old: Array, new: Array, decay: ArrayLike) -> Array:
    """A moving average in the dtype of what is new."""
    return _numerics.moving_average(old.astype(new.dtype), new, decay)


def _wide(x: Array) -> Array:
    return x.astype(_linalg.at_least_float32(x.dtype))
