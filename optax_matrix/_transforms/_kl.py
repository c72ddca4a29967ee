"""Statistics that minimize a Kullback-Leibler divergence: KL-SOAP and KL-Shampoo."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _check, _layout, _placement
from optax_matrix._linalg import Parts, Traffic
from optax_matrix._transforms import _eigenbases, _numerics, _preconditioner
from optax_matrix._transforms._eigenbases import InBases, Moments, Side, Sides


@dataclasses.dataclass(frozen=True)
class KLRule(InBases):
    """KL-SOAP, or KL-Shampoo without a variance, for one matrix."""

    sort = False

    with_variance: bool
    max_dim: int
    moment_dtype: str | None
    factor_dtype: str | None
    precision: str

    def init(self, m: int, n: int, dtype: DTypeLike) -> Moments:
        """Nothing seen."""
        own = jnp.dtype(dtype).name

        def side(size: int) -> Side | None:
            if size > self.max_dim:
                return None
            plain = _eigenbases.side(size, self.factor_dtype or own)
            scale = jnp.zeros((size,), own)
            return plain._replace(scale=scale)

        zeros = jnp.zeros((m, n), self.moment_dtype or own)
        return Moments(zeros, zeros if self.with_variance else None, side(m), side(n))

    def before(
        self, x: Array, state: Moments, scalars: _placement.Scalars, parts: Parts
    ) -> tuple[Array, Moments]:
        """The step with what is known so far, then the statistics with this update."""
        g = _numerics.wide(x)
        (m, _), left, right = g.shape, state.left, state.right
        first = scalars["count"] == 0
        # What is not said to be whole is this part's rows.
        across = _eigenbases.rotated_right(parts.own(g), right, self.precision, parts)
        whole = parts.gather(across, m)
        inside = across
        if left is not None:
            inside = _eigenbases.rotated_left(whole, left, self.precision, parts)
        # The moments do not see the first gradient, and so the first update is zero;
        # a product, so that it is NaN if the gradient is.
        inside = inside * (scalars["count"] > 0).astype(g.dtype)
        momentum = _eigenbases.average(state.momentum, inside, scalars["b1"])
        eps = _numerics.as_scalar(scalars["eps"], g)
        by_left, by_right = _scale(left, g), _all(right, g, parts).T
        if state.variance is None:
            variance = None
            scale = by_left * by_right
            direction = momentum * scale / (1 + eps * scale)
        else:
            squares = jnp.square(inside)
            wide = _eigenbases.average(state.variance, squares, scalars["b2"])
            direction = momentum / (jnp.sqrt(wide) + eps)
            variance = wide.astype(state.variance.dtype)
        update = _eigenbases.rotated_back(direction, left, right, self.precision, parts)

        down = _eigenbases.rotated_left(g, left, self.precision, parts)
        # Of the first gradient, while nothing is known of the other side.
        for_left = jnp.where(first, g, whole * by_right)
        for_right = jnp.where(first, g, parts.gather(down * by_left, m))
        of_left = jnp.mean(jnp.square(inside * by_right), axis=1, keepdims=True)
        of_right = jnp.sum(jnp.square(inside * by_left), axis=0, keepdims=True)
        of_right = parts.own(parts.sum(of_right).T / m)
        new_left = self._observed(left, for_left, of_left, scalars, parts)
        new_right = self._observed(right, for_right.T, of_right, scalars, parts)
        momentum = momentum.astype(state.momentum.dtype)
        return update, Moments(momentum, variance, new_left, new_right)

    def _observed(
        self,
        side: Side | None,
        half: Array,
        values: Array,
        scalars: _placement.Scalars,
        parts: Parts,
    ) -> Side | None:
        """A side with one more statistic H Hᵀ / n, H being m×n, and eigenvalues."""
        if side is None:
            return None
        (size, n), decay = half.shape, scalars["factor_b2"]
        outer = jnp.matmul(parts.own(half), half.T, precision=self.precision) / n
        statistic = _eigenbases.average(side.statistic, outer, decay)
        known = jnp.square(_scale(side, half))
        known = jnp.where(known > 0, 1 / jnp.where(known > 0, known, 1), 0)
        values = _eigenbases.average(known, values, decay)
        scale = jnp.where(values > 0, 1 / jnp.sqrt(jnp.where(values > 0, values, 1)), 0)
        largest = _numerics.as_scalar(scalars["max_scale"], half)
        limit = jnp.maximum(10, jnp.minimum(size, largest))
        return side._replace(
            statistic=statistic.astype(side.statistic.dtype),
            scale=jnp.minimum(scale, limit)[:, 0],
        )

    def finish(
        self,
        state: Moments,
        given: Sides,
        found: Any,
        scalars: _placement.Scalars,
        first: bool,
        parts: Parts,
    ) -> Moments:
        """The bases, and the momentum in them; at first all eigenvalues are alike."""
        (left, _), (right, _) = _eigenbases.both_renewed(
            state, given, found, scalars["max_failures"], parts
        )
        if first:
            alike = scalars["initial"] ** -0.5
            return state._replace(left=_level(left, alike), right=_level(right, alike))
        old, new = (state.left, state.right), (left, right)
        momentum = _eigenbases.carried(state.momentum, old, new, self.precision, parts)
        return Moments(momentum, state.variance, left, right)

    def flops(self, m: int, n: int, parts: int = 1) -> int:
        """Of statistics, the rotations there and back, and those of one side alone."""
        sides = m <= self.max_dim, n <= self.max_dim
        one = sides[0] * 2 * -(-m // parts) * m * n
        return _preconditioner.update_flops(m, n, sides, 2, parts) + one

    def traffic(self, m: int, n: int, parts: int, dtype: DTypeLike) -> Traffic:
        """Bases, the momentum between the rotations back, and what is of one side."""
        sides = m <= self.max_dim, n <= self.max_dim
        between = 2 * sides[0] + sides[1]
        return _preconditioner.update_traffic(
            m, n, sides, between, parts, dtype, self.factor_dtype
        )

    def refresh_cost(self, m: int, n: int) -> float:
        """See `_eigenbases.refresh_flops`."""
        return _eigenbases.refresh_flops(m, n, self.max_dim)


def _level(side: Side | None, scale: Array) -> Side | None:
    if side is None or side.scale is None:
        return None
    return side._replace(scale=jnp.full_like(side.scale, scale))


def _scale(side: Side | None, like: Array) -> Array:
    """Inverse square roots of eigenvalues, a column; 1 for a side that is left out."""
    if side is None or side.scale is None:
        return jnp.ones((1, 1), like.dtype)
    return side.scale[:, None].astype(like.dtype)


def _all(side: Side | None, like: Array, parts: Parts) -> Array:
    """`_scale` of the whole side."""
    if side is None:
        return _scale(side, like)
    return parts.gather(_scale(side, like), side.basis.shape[-1])


def kl_transformation(
    with_variance: bool,
    scalars: dict[str, ArrayLike],
    *,
    refresh: int,
    stagger: bool,
    block_size: int | None,
    max_dim: int,
    moment_dtype: DTypeLike | None,
    factor_dtype: DTypeLike | None,
    precision: str,
    layout: _layout.Layout,
    placement: _placement.Placement | None,
) -> optax.GradientTransformationExtraArgs:
    """Checks the arguments and makes the transformation."""
    for name in ("b1", "b2", "factor_b2"):
        _check.in_range(name, scalars[name], 0.0, 1.0)
    for name in ("eps", "initial", "max_scale"):
        _check.in_range(name, scalars[name], 0.0, low_open=True)
    _check.in_range("max_failures", scalars["max_failures"], 1)
    _preconditioner.check_sizes(max_dim, block_size)
    _check.one_of("precision", precision, ("default", "high", "highest"))
    rule = KLRule(
        with_variance,
        max_dim,
        _preconditioner.as_state_dtype("moment_dtype", moment_dtype),
        _preconditioner.as_state_dtype("factor_dtype", factor_dtype),
        precision,
    )
    return _preconditioner.per_matrix(
        rule,
        _preconditioner.as_cadence(0, refresh, stagger),
        scalars,
        block_size=block_size,
        layout=layout,
        placement=placement,
    )
