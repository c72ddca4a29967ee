"""Statistics that minimize a Kullback-Leibler divergence: KL-SOAP and KL-Shampoo."""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from optax_matrix._transforms import _eigenbases, _moments, _numerics, _preconditioner
from optax_matrix._transforms._eigenbases import (
    EigenbasisSettings,
    InBases,
    Moments,
    Side,
)
from optax_matrix._transforms._preconditioner import Scalars


@dataclasses.dataclass(frozen=True, kw_only=True)
class KL(EigenbasisSettings):
    r"""The settings of `kl_soap_precondition` and `kl_shampoo_precondition`.

    Args:
      initial: What all eigenvalues start from, positive.
      max_scale: The largest :math:`\lambda^{-1/2}`, positive. That of a side of m
        entries is the smaller of this and m, but at least 10.
      factor_b2: Decay of the two statistics and of the eigenvalues, in [0, 1). None is
        the ``b2`` of the transformation.
      stagger: See `Preconditioner`, as the following.
      block_size: See `Preconditioner`.
      max_dim: See `Preconditioner`; such a side keeps the identity for its basis.
      max_failures: See `Preconditioner`.
      factor_dtype: See `Preconditioner`.
      precision: See `Preconditioner`.

    Raises:
      TypeError: If a count is not an int.
      ValueError: If an argument is outside its range.
    """

    initial: float = 0.1
    max_scale: float = 4000.0

    def __post_init__(self) -> None:
        """Checks the arguments and stores them in a hashable form."""
        super().__post_init__()
        self._store_number("initial", low_open=True)
        self._store_number("max_scale", low_open=True)


@dataclasses.dataclass(frozen=True)
class KLRule(InBases):
    """KL-SOAP, or KL-Shampoo without a variance, for one matrix."""

    settings: KL
    with_variance: bool

    def init(self, m: int, n: int, dtype: DTypeLike) -> Moments:
        """Returns zero moments, statistics, bases and scales."""
        left, right = (
            side and side._replace(scale=jnp.zeros(side.basis.shape[:1], dtype))
            for side in (
                self.side(size, kept, dtype)
                for size, kept in zip((m, n), self.settings.sides(m, n), strict=True)
            )
        )
        momentum, variance = self.zero_moments(m, n, dtype)
        return Moments(momentum, variance if self.with_variance else None, left, right)

    def observe(
        self, g: Array, state: Moments, scalars: Scalars
    ) -> tuple[Array, Moments]:
        """Takes the step in the present bases, then averages the statistics."""
        g, left, right = _numerics.wide(g), state.left, state.right
        first = scalars["count"] == 0
        across, down = self.rotated(g, None, right), self.rotated(g, left, None)
        # The moments do not see the first gradient, so the first update is zero; it is
        # multiplied so that it is NaN if the gradient is.
        inside = self.rotated(across, left, None)
        inside = inside * (scalars["count"] > 0).astype(g.dtype)
        momentum = _eigenbases.average(state.momentum, inside, scalars["momentum"])
        eps = _numerics.as_scalar(scalars["eps"], g)
        by_left, by_right = _scale(left, g)[:, None], _scale(right, g)[None]
        if state.variance is None:
            variance = None
            scale = by_left * by_right
            direction = momentum * scale / (1 + eps * scale)
        else:
            wide = _eigenbases.average(
                state.variance, jnp.square(inside), scalars["b2"], square=True
            )
            direction = momentum / (jnp.sqrt(wide) + eps)
            variance = _moments.write(
                wide, state.variance, scalars["count"], square=True
            )

        # Nothing is known of the other side when the first gradient is seen.
        for_left = jnp.where(first, g, across * by_right)
        for_right = jnp.where(first, g, down * by_left).T
        of_left = jnp.mean(jnp.square(inside * by_right), axis=1)
        of_right = jnp.mean(jnp.square(inside * by_left), axis=0)
        return self.rotated_back(direction, left, right), Moments(
            _moments.write(momentum, state.momentum, scalars["count"]),
            variance,
            self._scaled(left, for_left, of_left, scalars),
            self._scaled(right, for_right, of_right, scalars),
        )

    def _scaled(
        self, side: Side | None, half: Array, values: Array, scalars: Scalars
    ) -> Side | None:
        """Returns the side with H Hᵀ / n, H being m×n, and eigenvalues averaged in."""
        if side is None:
            return None
        (size, n), decay = half.shape, scalars["factor_b2"]
        side = self.observed(side, self.product(half, half.T) / n, decay)
        known = jnp.square(_scale(side, half))
        known = jnp.where(known > 0, 1 / jnp.where(known > 0, known, 1), 0)
        values = _eigenbases.average(known, values, decay)
        scale = jnp.where(values > 0, 1 / jnp.sqrt(jnp.where(values > 0, values, 1)), 0)
        limit = max(10.0, min(float(size), self.settings.max_scale))
        return side._replace(scale=jnp.minimum(scale, limit))

    def refresh(self, state: Moments, scalars: Scalars, first: bool) -> Moments:
        """Refreshes both bases, and takes the momentum into them."""
        left, _ = self.renewed(state.left, first, sort=False)
        right, _ = self.renewed(state.right, first, sort=False)
        if first:
            return state._replace(left=self._level(left), right=self._level(right))
        momentum = self.carried(state, left, right, scalars)
        return Moments(momentum, state.variance, left, right)

    def _level(self, side: Side | None) -> Side | None:
        """Returns the side with all eigenvalues at their initial value."""
        if side is None or side.scale is None:
            return None
        scale = jnp.full_like(side.scale, self.settings.initial**-0.5)
        return side._replace(scale=scale)

    def flops(self, m: int, n: int) -> int:
        """Returns the FLOPs of the statistics and of the rotations.

        If there are two sides, one of them is also rotated by itself.
        """
        sides = self.settings.sides(m, n)
        own = 2 * m * m * n if all(sides) else 0
        return _preconditioner.update_flops(m, n, sides, 2) + own


def _scale(side: Side | None, like: Array) -> Array:
    """Returns the inverse roots of eigenvalues, (m,); 1 for a side without a basis."""
    if side is None or side.scale is None:
        return jnp.ones((1,), like.dtype)
    return side.scale.astype(like.dtype)
