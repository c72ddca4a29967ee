"""What SOAP and the KL rules share: two bases a matrix, and moments in them."""

from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from optax_matrix import _linalg
from optax_matrix._linalg import Parts
from optax_matrix._placement import Scalars
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


def rotated_left(x: Array, left: Side | None, precision: str, parts: Parts) -> Array:
    """This part's rows of Q_Lᵀ x, of the whole x."""
    if left is None:
        return parts.own(x)
    basis = _basis(left, x, parts)
    return jnp.matmul(parts.own(basis.T), x, precision=precision)


def rotated_right(
    rows: Array, right: Side | None, precision: str, parts: Parts
) -> Array:
    """x Q_R of some rows."""
    if right is None:
        return rows
    return jnp.matmul(rows, _basis(right, rows, parts), precision=precision)


def rotated_back(
    rows: Array,
    left: Side | None,
    right: Side | None,
    precision: str,
    parts: Parts,
) -> Array:
    """This part's rows of Q_L x Q_Rᵀ, of its rows of x."""
    if right is not None:
        basis = _basis(right, rows, parts)
        rows = jnp.matmul(rows, basis.T, precision=precision)
    if left is not None:
        whole = parts.gather(rows, left.basis.shape[-1])
        rows = jnp.matmul(left.basis.astype(rows.dtype), whole, precision=precision)
    return rows


def _basis(side: Side, like: Array, parts: Parts) -> Array:
    return parts.gather(side.basis, side.basis.shape[-1]).astype(like.dtype)


class Prepared(NamedTuple):
    """What a new basis of a side is made of, all of it."""

    matrix: Array  # to be factorized
    old: Array  # the basis so far
    order: Array  # where the columns of the new one were in it


Sides = tuple[Prepared | None, Prepared | None]


def prepared(
    side: Side | None, first: bool, sort: bool, parts: Parts
) -> Prepared | None:
    """Of a first basis, or of one that is moved by a power step."""
    if side is None:
        return None
    statistic, old = _whole(side.statistic, parts), _whole(side.basis, parts)
    if first:
        # Nothing can be kept yet.
        eye = jnp.eye(old.shape[-1], dtype=old.dtype)
        return Prepared(statistic, eye, jnp.arange(old.shape[-1]))
    product, order = _linalg.power_product(statistic, old, sort, parts)
    return Prepared(product, old, order)


def factored(given: Prepared | None, first: bool) -> Array | None:
    """The new basis: eigenvectors at first, and then the Q factor."""
    if given is None:
        return None
    return (_linalg.eigenbasis if first else _linalg.q_factor)(given.matrix)


def renewed(
    side: Side | None,
    given: Prepared | None,
    found: Array | None,
    max_failures: ArrayLike,
    parts: Parts,
) -> tuple[Side | None, Array | None]:
    """With its new basis if that is finite, and where its columns were before."""
    if side is None or given is None or found is None:
        return None, None
    good = jnp.all(jnp.isfinite(found))
    basis = parts.own(jnp.where(good, found, given.old)).astype(side.basis.dtype)
    health = _preconditioner.after_refresh(side.health, good, max_failures)
    order = jnp.where(good, given.order, jnp.arange(given.order.shape[-1]))
    return side._replace(basis=basis, health=health), order


class InBases:
    """What rules with two bases have in common: how these are refreshed.

    Attributes:
      sort: Whether the columns of a basis are ordered by eigenvalue.
    """

    sort: ClassVar[bool]

    def prepare(
        self, state: Moments, scalars: Scalars, first: bool, parts: Parts
    ) -> Sides:
        """The statistics at first, and then these times the bases."""
        del scalars
        return (
            prepared(state.left, first, self.sort, parts),
            prepared(state.right, first, self.sort, parts),
        )

    def factor(
        self, given: Sides, scalars: Scalars, first: bool
    ) -> tuple[Array | None, Array | None]:
        """The new bases."""
        del scalars
        left, right = given
        return factored(left, first), factored(right, first)

    def after(self, x: Array, state: Moments, scalars: Scalars, parts: Parts) -> Array:
        """The update as it is: a refresh shows from the next one on."""
        del state, scalars, parts
        return x


def both_renewed(
    state: Moments,
    given: Sides,
    found: tuple[Array | None, Array | None],
    max_failures: ArrayLike,
    parts: Parts,
) -> tuple[tuple[Side | None, Array | None], tuple[Side | None, Array | None]]:
    """`renewed` of both sides."""
    return (
        renewed(state.left, given[0], found[0], max_failures, parts),
        renewed(state.right, given[1], found[1], max_failures, parts),
    )


def carried(
    momentum: Array,
    old: tuple[Side | None, Side | None],
    new: tuple[Side | None, Side | None],
    precision: str,
    parts: Parts,
) -> Array:
    """This part's rows of a momentum in the old bases, in the new ones."""
    left, right = new
    rows = rotated_back(_wide(momentum), *old, precision, parts)
    if left is not None:
        whole = parts.gather(rows, left.basis.shape[-1])
        rows = rotated_left(whole, left, precision, parts)
    rows = rotated_right(rows, right, precision, parts)
    return rows.astype(momentum.dtype)


def refresh_flops(m: int, n: int, max_dim: int) -> float:
    """About what a power step costs: a product and a QR factorization a side."""
    return float(sum(size**3 for size in (m, n) if size <= max_dim))


def average(old: Array, new: Array, decay: ArrayLike) -> Array:
    """A moving average in the dtype of what is new."""
    return _numerics.moving_average(old.astype(new.dtype), new, decay)


def _wide(x: Array) -> Array:
    return x.astype(_linalg.at_least_float32(x.dtype))


def _whole(rows: Array, parts: Parts) -> Array:
    """All of a square array of the state, to calculate with."""
    return _wide(parts.gather(rows, rows.shape[-1]))
