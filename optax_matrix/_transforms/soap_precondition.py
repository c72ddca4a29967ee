"""Adam in the slowly turning eigenbasis of Shampoo's statistics (SOAP)."""

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
class SoapRule(InBases):
    """SOAP for one matrix; see `soap_precondition`."""

    sort = True

    max_dim: int
    moment_dtype: str | None
    factor_dtype: str | None
    precision: str

    def init(self, m: int, n: int, dtype: DTypeLike) -> Moments:
        """Nothing seen."""
        own = jnp.dtype(dtype).name
        sides = [
            _eigenbases.side(size, self.factor_dtype or own)
            if size <= self.max_dim
            else None
            for size in (m, n)
        ]
        zeros = jnp.zeros((m, n), self.moment_dtype or own)
        return Moments(zeros, zeros, *sides)

    def before(
        self, x: Array, state: Moments, scalars: _placement.Scalars, parts: Parts
    ) -> tuple[Array, Moments]:
        """Adam in the bases so far, then the statistics with this update."""
        g = _numerics.wide(x)
        sides, variance = (state.left, state.right), _variance(state)
        # The moments do not see the first gradient, and so the first update is zero;
        # a product, so that it is NaN if the gradient is.
        seen = g * (scalars["count"] > 0).astype(g.dtype)
        inside = _eigenbases.rotated_left(seen, state.left, self.precision, parts)
        inside = _eigenbases.rotated_right(inside, state.right, self.precision, parts)
        momentum = _eigenbases.average(state.momentum, inside, scalars["b1"])
        squares = jnp.square(inside)
        wide = _eigenbases.average(variance, squares, scalars["b2"])
        terms = jnp.maximum(scalars["count"], 1)
        scale = jnp.sqrt(_numerics.bias_correction(scalars["b2"], terms, g))
        scale = scale / _numerics.bias_correction(scalars["b1"], terms, g)
        eps = _numerics.as_scalar(scalars["eps"], g)
        direction = scale * momentum / (jnp.sqrt(wide) + eps)
        update = _eigenbases.rotated_back(direction, *sides, self.precision, parts)
        left, right = (
            observed(one, other, scalars["factor_b2"], self.precision, parts)
            for one, other in ((state.left, g), (state.right, g.T))
        )
        momentum = momentum.astype(state.momentum.dtype)
        variance = wide.astype(variance.dtype)
        return update, Moments(momentum, variance, left, right)

    def finish(
        self,
        state: Moments,
        given: Sides,
        found: Any,
        scalars: _placement.Scalars,
        first: bool,
        parts: Parts,
    ) -> Moments:
        """The bases, and the moments in them."""
        (left, rows), (right, columns) = _eigenbases.both_renewed(
            state, given, found, scalars["max_failures"], parts
        )
        if first:  # there are no moments yet
            return state._replace(left=left, right=right)
        variance = _variance(state)
        if rows is not None:
            whole = parts.gather(variance, rows.shape[-1])
            variance = parts.own(jnp.take(whole, rows, axis=0))
        if columns is not None:
            variance = jnp.take(variance, columns, axis=1)
        old, new = (state.left, state.right), (left, right)
        momentum = _eigenbases.carried(state.momentum, old, new, self.precision, parts)
        return Moments(momentum, variance, left, right)

    def flops(self, m: int, n: int, parts: int = 1) -> int:
        """Of statistics, and of the rotations there and back."""
        return _preconditioner.update_flops(m, n, self._sides(m, n), 2, parts)

    def traffic(self, m: int, n: int, parts: int, dtype: DTypeLike) -> Traffic:
        """Bases, and the momentum between the rotations back."""
        sides = self._sides(m, n)
        return _preconditioner.update_traffic(
            m, n, sides, sides[0], parts, dtype, self.factor_dtype
        )

    def _sides(self, m: int, n: int) -> tuple[bool, bool]:
        return m <= self.max_dim, n <= self.max_dim

    def refresh_cost(self, m: int, n: int) -> float:
        """See `_eigenbases.refresh_flops`."""
        return _eigenbases.refresh_flops(m, n, self.max_dim)


def _variance(state: Moments) -> Array:
    assert state.variance is not None
    return state.variance


def observed(
    side: Side | None, g: Array, decay: ArrayLike, precision: str, parts: Parts
) -> Side | None:
    """A side whose average has G Gᵀ in it, with G from that side."""
    if side is None:
        return None
    outer = jnp.matmul(parts.own(g), g.T, precision=precision)
    statistic = _eigenbases.average(side.statistic, outer, decay)
    return side._replace(statistic=statistic.astype(side.statistic.dtype))


def soap_precondition(
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    *,
    factor_b2: ArrayLike | None = None,
    eps: ArrayLike = 1e-8,
    refresh: int = 10,
    stagger: bool = False,
    block_size: int | None = None,
    max_dim: int = 10_000,
    max_failures: ArrayLike = 3,
    moment_dtype: DTypeLike | None = None,
    factor_dtype: DTypeLike | None = None,
    precision: str = "highest",
    layout: _layout.Layout = None,
    placement: _placement.Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes Adam's step in the eigenbasis of Shampoo's two statistics (SOAP).

    With :math:`L, R` averages of :math:`GG^\top` and :math:`G^\top G`, their bases
    :math:`Q_L, Q_R`, and :math:`s` the number of updates before this one,

    .. math::
      G' &= Q_L^\top G Q_R, \quad
      M \leftarrow \beta_1 M + (1 - \beta_1) G', \quad
      V \leftarrow \beta_2 V + (1 - \beta_2) G'^2, \\
      U &= Q_L \left[ \frac{M / (1 - \beta_1^s)}
        {(\sqrt V + \epsilon) / \sqrt{1 - \beta_2^s}} \right] Q_R^\top,

    and then :math:`L \leftarrow \beta L + (1 - \beta) GG^\top`, :math:`R` likewise. The
    bases are eigenvectors, by descending eigenvalue, of what the first gradient gives;
    the first update is **zero**, and the moments do not see that gradient. Whenever
    :math:`s` is a positive multiple of ``refresh``, after the update and with its
    gradient in :math:`L`: the columns of :math:`Q_L` are put in the order of
    :math:`q^\top L q`, :math:`V` is permuted along, :math:`Q_L` becomes the Q factor of
    :math:`L Q_L`, and :math:`M` is rotated into the new basis. All this is as in the
    authors' code.

    Args:
      b1: :math:`\beta_1`, in [0, 1).
      b2: :math:`\beta_2`, in [0, 1).
      factor_b2: :math:`\beta` of :math:`L` and :math:`R`, in [0, 1); None is ``b2``.
      eps: :math:`\epsilon`, positive, in the unit of the gradient.
      refresh: Updates from one power step of the bases to the next, at least 1.
      stagger: Whether each matrix takes its power step in an update of its own, as
        evenly as can be, instead of all in the same. The basis of the first gradient
        is for all in the first update either way.
      block_size: The largest block; longer sides are cut into blocks of this size, the
        last one smaller, each a matrix by itself. None: not cut.
      max_dim: A longer side (of a block) keeps the identity for its basis.
      max_failures: After so many refreshes in a row that were not finite, and so kept
        the last good basis, ``stuck`` in the state is set for good; see
        `diagnostics.refreshes`.
      moment_dtype: Of :math:`M` and :math:`V` in the state: bfloat16, float32 or
        float64. None is float32, or float64 for float64.
      factor_dtype: Of :math:`L, R, Q_L, Q_R` in the state, likewise. In bfloat16 the
        bases are orthogonal to three digits only.
      precision: Of the matmuls: ``"default"``, ``"high"`` or ``"highest"``. Of power
        steps it is always the highest.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack is taken by itself.
      placement: Where leaves lie on a mesh with auto axes, see `Placement`.

    Returns:
      A transformation for leaves with at least two axes. Updates keep their shape and
      dtype; all arithmetic is in float32, or float64 for float64. The state of an m×n
      matrix is 2mn + 2m² + 2n² numbers.

    Raises:
      ValueError: At construction, for numbers outside these ranges; at ``init``, if a
        leaf does not fit ``layout`` or its sharding does not divide it, with its path.
      TypeError: At construction, if a count is not an int.

    Sharding:
      Any. Each matrix, with its state, belongs to one device, which gets its gradient
      whole in one exchange for all of a shape and sends the update in another. Matrices
      that do not go round the devices are shared by several, each with its rows of the
      state; see docs/preconditioners.md. The first axis of the state depends on the
      number of devices.

    Precision:
      Squares of gradients are averaged: entries below 1e-19 or above 1e19 are lost.

    References:
      Vyas et al., 2024, SOAP, `arXiv:2409.11321 <https://arxiv.org/abs/2409.11321>`_
      and https://github.com/nikhilvyas/SOAP. Differs: weight decay is another stage.
    """
    for name, value in (("b1", b1), ("b2", b2), ("factor_b2", factor_b2)):
        if value is not None:
            _check.in_range(name, value, 0.0, 1.0)
    _check.in_range("eps", eps, 0.0, low_open=True)
    _preconditioner.check_sizes(max_dim, block_size)
    _check.in_range("max_failures", max_failures, 1)
    _check.one_of("precision", precision, ("default", "high", "highest"))
    rule = SoapRule(
        max_dim,
        _preconditioner.as_state_dtype("moment_dtype", moment_dtype),
        _preconditioner.as_state_dtype("factor_dtype", factor_dtype),
        precision,
    )
    scalars = {
        "b1": b1,
        "b2": b2,
        "factor_b2": b2 if factor_b2 is None else factor_b2,
        "eps": eps,
        "max_failures": max_failures,
    }
    return _preconditioner.per_matrix(
        rule,
        _preconditioner.as_cadence(0, refresh, stagger),
        scalars,
        block_size=block_size,
        layout=layout,
        placement=placement,
    )
