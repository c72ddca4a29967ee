"""The rule of SOAP for one matrix."""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from optax_matrix._transforms import _eigenbases, _numerics, _preconditioner
from optax_matrix._transforms._eigenbases import InBases, Moments
from optax_matrix._transforms._preconditioner import Scalars


@dataclasses.dataclass(frozen=True)
class SoapRule(InBases):
    """SOAP for one matrix; see `soap_precondition`."""

    def init(self, m: int, n: int, dtype: DTypeLike) -> Moments:
        """Returns zero moments, statistics and bases."""
        left, right = self.settings.sides(m, n)
        zeros = jnp.zeros((m, n), self.mu_dtype or dtype)
        return Moments(
            zeros, zeros, self.side(m, left, dtype), self.side(n, right, dtype)
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
            _variance(state), jnp.square(inside), scalars["b2"]
        )
        terms = jnp.maximum(scalars["count"], 1)
        scale = jnp.sqrt(_numerics.bias_correction(scalars["b2"], terms, g))
        scale = scale / _numerics.bias_correction(scalars["momentum"], terms, g)
        eps = _numerics.as_scalar(scalars["eps"], g)
        direction = scale * momentum / (jnp.sqrt(variance) + eps)
        if left is not None:
            outer = self.product(g, g.T)
            left = self.observed(left, outer, scalars["factor_b2"])
        if right is not None:
            outer = self.product(g.T, g)
            right = self.observed(right, outer, scalars["factor_b2"])
        return self.rotated_back(direction, state.left, state.right), Moments(
            momentum.astype(state.momentum.dtype),
            variance.astype(_variance(state).dtype),
            left,
            right,
        )

    def refresh(self, state: Moments, scalars: Scalars, first: bool) -> Moments:
        """Refreshes both bases, and takes the moments into them."""
        del scalars
        left, rows = self.renewed(state.left, first, sort=True)
        right, columns = self.renewed(state.right, first, sort=True)
        if first:  # there are no moments yet
            return state._replace(left=left, right=right)
        variance = _variance(state)
        if rows is not None:
            variance = jnp.take(variance, rows, axis=0)
        if columns is not None:
            variance = jnp.take(variance, columns, axis=1)
        return Moments(self.carried(state, left, right), variance, left, right)

    def flops(self, m: int, n: int) -> int:
        """Returns the FLOPs of the statistics and of the rotations there and back."""
        return _preconditioner.update_flops(m, n, self.settings.sides(m, n), 2)


def _variance(state: Moments) -> Array:
    assert state.variance is not None
    return state.variance
