"""The rule of SOAP for one matrix."""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from optax_matrix._transforms import _eigenbases, _moments, _numerics, _preconditioner
from optax_matrix._transforms._eigenbases import InBases, Moments, Side
from optax_matrix._transforms._moments import Moment
from optax_matrix._transforms._preconditioner import Scalars


@dataclasses.dataclass(frozen=True)
class SoapRule(InBases):
    """SOAP for one matrix; see `soap_precondition`."""

    def init(self, m: int, n: int, dtype: DTypeLike) -> Moments:
        """Returns zero moments, statistics and bases."""
        left, right = self.settings.sides(m, n)
        return Moments(
            *self.zero_moments(m, n, dtype),
            self.side(m, left, dtype),
            self.side(n, right, dtype),
        )

    def observe(
        self, g: Array, state: Moments, scalars: Scalars
    ) -> tuple[Array, Moments]:
        """Takes Adam's step in the present bases, then averages the statistics."""
        g, left, right = _numerics.wide(g), state.left, state.right
        # The moments do not see the first gradient, so the first update is zero; it is
        # multiplied so that it is NaN if the gradient is.
        seen = g * (scalars["count"] > 0).astype(g.dtype)
        inside = self.rotated(seen, left, right)
        momentum = _eigenbases.average(state.momentum, inside, scalars["momentum"])
        variance = _eigenbases.average(
            self.variance(state), jnp.square(inside), scalars["b2"], square=True
        )
        terms = jnp.maximum(scalars["count"], 1)
        scale = jnp.sqrt(_numerics.bias_correction(scalars["b2"], terms, g))
        scale = scale / _numerics.bias_correction(scalars["momentum"], terms, g)
        eps = _numerics.as_scalar(scalars["eps"], g)
        direction = scale * momentum / (jnp.sqrt(variance) + eps)
        return self.rotated_back(direction, left, right), Moments(
            _moments.write(momentum, state.momentum, scalars["count"]),
            self.kept_variance(variance, state, scalars),
            *self.observed_sides(g, state, scalars),
        )

    def observed_sides(
        self, g: Array, state: Moments, scalars: Scalars
    ) -> tuple[Side | None, Side | None]:
        """Averages GGᵀ and GᵀG."""
        left, right, decay = state.left, state.right, scalars["factor_b2"]
        if left is not None:
            left = self.observed(left, self.product(g, g.T), decay)
        if right is not None:
            right = self.observed(right, self.product(g.T, g), decay)
        return left, right

    def refresh(self, state: Moments, scalars: Scalars, first: bool) -> Moments:
        """Refreshes both bases, and takes the moments into them."""
        left, rows = self.renewed(state.left, first, sort=True)
        right, columns = self.renewed(state.right, first, sort=True)
        if first:  # there are no moments yet
            return state._replace(left=left, right=right)
        variance = _moments.read(self.variance(state), square=True)
        if rows is not None:
            variance = jnp.take(variance, rows, axis=0)
        if columns is not None:
            variance = jnp.take(variance, columns, axis=1)
        momentum = self.carried(state, left, right, scalars)
        variance = self.kept_variance(variance, state, scalars)
        return Moments(momentum, variance, left, right)

    def flops(self, m: int, n: int) -> int:
        """Returns the FLOPs of the statistics and of the rotations there and back."""
        return _preconditioner.update_flops(m, n, self.settings.sides(m, n), 2)

    def variance(self, state: Moments) -> Moment:
        """Returns the second moment, which this rule always has."""
        assert state.variance is not None
        return state.variance

    def kept_variance(self, new: Array, state: Moments, scalars: Scalars) -> Moment:
        """Returns the second moment as it is kept."""
        old = self.variance(state)
        return _moments.write(new, old, scalars["count"], square=True)
