"""Multiplies both sides of an update by roots of its running statistics (Shampoo)."""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _check, _layout, _linalg, _placement
from optax_matrix._linalg import Parts, Traffic
from optax_matrix._transforms import _numerics, _preconditioner
from optax_matrix._transforms._preconditioner import Health


class RootSide(NamedTuple):
    """What is known of one side of a matrix."""

    statistic: Array  # L or R, (m, m)
    root: Array  # its power, (m, m); the identity before the first
    health: Health


class ShampooMatrix(NamedTuple):
    """State of one matrix; a side that is left out is None."""

    momentum: Array | None  # (m, n)
    left: RootSide | None
    right: RootSide | None


@dataclasses.dataclass(frozen=True)
class ShampooRule:
    """Shampoo for one matrix; see `shampoo_precondition`."""

    exponents: tuple[float | None, float | None]
    root: _linalg.RootMethod
    with_momentum: bool
    summed: bool
    max_dim: int
    moment_dtype: str | None
    factor_dtype: str | None
    precision: str

    def init(self, m: int, n: int, dtype: DTypeLike) -> ShampooMatrix:
        """Nothing seen, and both roots the identity."""
        own = jnp.dtype(dtype).name
        momentum = jnp.zeros((m, n), self.moment_dtype or own)

        def side(size: int) -> RootSide:
            eye = jnp.eye(size, dtype=self.factor_dtype or own)
            return RootSide(jnp.zeros_like(eye), eye, _preconditioner.healthy())

        left, right = (
            side(size) if kept else None
            for size, kept in zip((m, n), self._sides(m, n), strict=True)
        )
        return ShampooMatrix(momentum if self.with_momentum else None, left, right)

    def before(
        self, x: Array, state: ShampooMatrix, scalars: _placement.Scalars, parts: Parts
    ) -> tuple[Array, ShampooMatrix]:
        """The statistics with this update, and its momentum."""
        g = _numerics.wide(x)
        left = self._observed(state.left, g, scalars, parts)
        right = self._observed(state.right, g.T, scalars, parts)
        g, momentum = parts.own(g), state.momentum
        if momentum is not None:
            wide = _numerics.moving_average(_numerics.wide(momentum), g, scalars["b1"])
            momentum = wide.astype(momentum.dtype)
            g = wide / _numerics.bias_correction(scalars["b1"], _seen(scalars), g)
        return g, ShampooMatrix(momentum, left, right)

    def _observed(
        self,
        side: RootSide | None,
        g: Array,
        scalars: _placement.Scalars,
        parts: Parts,
    ) -> RootSide | None:
        if side is None:
            return None
        outer = jnp.matmul(parts.own(g), g.T, precision=self.precision)
        old = _numerics.wide(side.statistic)
        if self.summed:
            new = old + outer
        else:
            new = _numerics.moving_average(old, outer, scalars["b2"])
        return side._replace(statistic=new.astype(side.statistic.dtype))

    def prepare(
        self,
        state: ShampooMatrix,
        scalars: _placement.Scalars,
        first: bool,
        parts: Parts,
    ) -> tuple[Array | None, Array | None]:
        """Both statistics, corrected for their bias."""
        del first

        def corrected(side: RootSide | None) -> Array | None:
            if side is None:
                return None
            a = _numerics.wide(parts.gather(side.statistic, side.statistic.shape[-1]))
            if self.summed:
                return a
            return a / _numerics.bias_correction(scalars["b2"], _seen(scalars), a)

        return corrected(state.left), corrected(state.right)

    def factor(
        self,
        given: tuple[Array | None, Array | None],
        scalars: _placement.Scalars,
        first: bool,
    ) -> tuple[Any, Any]:
        """Their eigendecompositions, or Newton's roots."""
        del first

        def factored(a: Array | None, exponent: float | None) -> Any:
            if a is None or exponent is None:
                return None
            if self.root == "eigh":
                return _linalg.decomposed(a)
            p = round(-1 / exponent)
            return _linalg.inverse_root_by_newton(a, p, scalars["damping"])

        left, right = given
        return factored(left, self.exponents[0]), factored(right, self.exponents[1])

    def finish(
        self,
        state: ShampooMatrix,
        given: tuple[Array | None, Array | None],
        found: tuple[Any, Any],
        scalars: _placement.Scalars,
        first: bool,
        parts: Parts,
    ) -> ShampooMatrix:
        """Both roots; one that fails keeps the last good one."""
        del first

        def rooted(
            side: RootSide | None, a: Array | None, made: Any, exponent: float | None
        ) -> RootSide | None:
            if side is None or a is None or exponent is None:
                return None
            if self.root == "eigh":
                damping = scalars["damping"]
                made = _linalg.power_by_eigh(a, made, exponent, damping, parts)
            good = jnp.all(jnp.isfinite(made.value))
            good = good & (made.residual <= scalars["residual_bound"])
            # A statistic that is zero says nothing, which is no failure either.
            said = jnp.any(a != 0)
            new = parts.own(made.value).astype(side.root.dtype)
            health = _preconditioner.after_refresh(
                side.health, good, scalars["max_failures"]
            )
            root = jnp.where(good & said, new, side.root)
            return RootSide(side.statistic, root, health)

        return state._replace(
            left=rooted(state.left, given[0], found[0], self.exponents[0]),
            right=rooted(state.right, given[1], found[1], self.exponents[1]),
        )

    def after(
        self, x: Array, state: ShampooMatrix, scalars: _placement.Scalars, parts: Parts
    ) -> Array:
        """The momentum between the roots."""
        del scalars
        if state.right is not None:
            root = parts.gather(state.right.root, state.right.root.shape[-1])
            x = jnp.matmul(x, root.astype(x.dtype), precision=self.precision)
        if state.left is not None:
            root = state.left.root.astype(x.dtype)
            x = parts.gather(x, root.shape[-1])
            x = jnp.matmul(root, x, precision=self.precision)
        return x

    def flops(self, m: int, n: int, parts: int = 1) -> int:
        """Of statistics, and of the roots times the momentum."""
        return _preconditioner.update_flops(m, n, self._sides(m, n), 1, parts)

    def traffic(self, m: int, n: int, parts: int, dtype: DTypeLike) -> Traffic:
        """A root, and the momentum between both."""
        left, right = self._sides(m, n)
        return _preconditioner.update_traffic(
            m, n, (False, right), left, parts, dtype, self.factor_dtype
        )

    def _sides(self, m: int, n: int) -> tuple[bool, bool]:
        """Which have a root."""
        left, right = (
            exponent is not None and size <= self.max_dim
            for size, exponent in zip((m, n), self.exponents, strict=True)
        )
        return left, right

    def refresh_cost(self, m: int, n: int) -> float:
        """About what the roots of both sides cost."""
        return float(
            sum(size**3 for size in itertools.compress((m, n), self._sides(m, n)))
        )


def _seen(scalars: _placement.Scalars) -> Array:
    return _numerics.next_count(scalars["count"])


def shampoo_precondition(
    b1: ArrayLike | None = 0.9,
    b2: ArrayLike | None = 0.95,
    *,
    exponents: tuple[float | None, float | None] = (-0.25, -0.25),
    damping: ArrayLike = 1e-6,
    root: _linalg.RootMethod = "eigh",
    start: int = 0,
    refresh: int = 10,
    stagger: bool = False,
    block_size: int | None = None,
    max_dim: int = 10_000,
    residual_bound: ArrayLike = 0.1,
    max_failures: ArrayLike = 3,
    moment_dtype: DTypeLike | None = None,
    factor_dtype: DTypeLike | None = None,
    precision: str = "highest",
    layout: _layout.Layout = None,
    placement: _placement.Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies both sides of the momentum by roots of running statistics (Shampoo).

    For a gradient :math:`G` of inputs × outputs, with hats for bias correction (a
    division by :math:`1 - \beta^t`) and exponents :math:`p_L, p_R`,

    .. math::
      M \leftarrow \beta_1 M + (1 - \beta_1) G, \quad
      L \leftarrow \beta_2 L + (1 - \beta_2) G G^\top, \quad
      R \leftarrow \beta_2 R + (1 - \beta_2) G^\top G, \\
      U = \hat L_\epsilon^{p_L} \, \hat M \, \hat R_\epsilon^{p_R}, \quad
      \hat L_\epsilon = \hat L + \epsilon \lambda_{\max}(\hat L) I.

    The roots are computed in update ``start`` (counted from 0), with its gradient in
    the statistics, and every ``refresh`` updates from there; until then the update is
    :math:`\hat M`. The size of :math:`U` has little to do with that of :math:`G`: see
    `graft_to`.

    Args:
      b1: :math:`\beta_1`, in [0, 1). None: no momentum, :math:`\hat M = G`, and no
        state for it.
      b2: :math:`\beta_2`, in [0, 1). None: :math:`L` and :math:`R` are plain sums.
      exponents: :math:`p_L` of the inputs' and :math:`p_R` of the outputs' side,
        negative. None leaves a side out: ``(-0.5, None)`` is one-sided Shampoo.
      damping: :math:`\epsilon`, not negative, relative to the largest eigenvalue. Below
        1e-7 float32 cannot tell the smallest eigenvalues from rounding.
      root: ``"eigh"``, or ``"newton"`` for a coupled Newton iteration of matmuls alone,
        for exponents -1/p with a whole p.
      start: The first update with roots, at least 0.
      refresh: Updates from one computation of the roots to the next, at least 1.
      stagger: Whether each matrix then has an update of its own for it, as evenly as
        can be, instead of all the same. In update ``start`` it is all.
      block_size: The largest block; longer sides are cut into blocks of this size, the
        last one smaller, each a matrix by itself. None: not cut.
      max_dim: A longer side (of a block) is left out.
      residual_bound: A root is bad if it is not finite or if its residual is above
        this: with eigh :math:`\max |AQ - Q\Lambda| / \lambda_{\max}`, with Newton
        :math:`\max |X^p A - I|` by its own account. The last good one stays in use.
      max_failures: After so many bad roots in a row ``stuck`` in the state is set for
        good; see `diagnostics.refreshes`.
      moment_dtype: Of :math:`M` in the state: bfloat16, float32 or float64. None is
        float32, or float64 for float64.
      factor_dtype: Of :math:`L, R` and their roots in the state, likewise.
      precision: Of the matmuls: ``"default"``, ``"high"`` or ``"highest"``. In roots it
        is always the highest.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack is taken by itself.
      placement: Where leaves lie on a mesh with auto axes, see `Placement`.

    Returns:
      A transformation for leaves with at least two axes. Updates keep their shape and
      dtype; all arithmetic is in float32, or float64 for float64. The state of an m×n
      matrix is mn + 2m² + 2n² numbers. A statistic that is zero at a refresh leaves
      its root as it was, the identity at first.

    Raises:
      ValueError: At construction, for numbers outside these ranges; at ``init``, if a
        leaf does not fit ``layout`` or its sharding does not divide it, with its path.
      TypeError: At construction, if a count is not an int.

    Sharding:
      As `soap_precondition`.

    Precision:
      Squares of gradients are averaged: entries below 1e-19 or above 1e19 are lost.

    References:
      Gupta, Koren and Singer, 2018, `arXiv:1802.09568
      <https://arxiv.org/abs/1802.09568>`_; Anil et al., 2020, `arXiv:2002.09018
      <https://arxiv.org/abs/2002.09018>`_; Shi et al., 2023, Distributed Shampoo,
      `arXiv:2309.06497 <https://arxiv.org/abs/2309.06497>`_. Differs: damping is
      relative.
    """
    for name, value in (("b1", b1), ("b2", b2)):
        if value is not None:
            _check.in_range(name, value, 0.0, 1.0)
    _check.in_range("damping", damping, 0.0)
    _check.one_of("root", root, ("eigh", "newton"))
    _check.in_range("residual_bound", residual_bound, 0.0, low_open=True)
    _check.one_of("precision", precision, ("default", "high", "highest"))
    _preconditioner.check_sizes(max_dim, block_size)
    _check.in_range("max_failures", max_failures, 1)
    rule = ShampooRule(
        _checked(exponents, root),
        root,
        b1 is not None,
        b2 is None,
        max_dim,
        _preconditioner.as_state_dtype("moment_dtype", moment_dtype),
        _preconditioner.as_state_dtype("factor_dtype", factor_dtype),
        precision,
    )
    given = {
        "b1": b1,
        "b2": b2,
        "damping": damping,
        "residual_bound": residual_bound,
        "max_failures": max_failures,
    }
    return _preconditioner.per_matrix(
        rule,
        _preconditioner.as_cadence(start, refresh, stagger),
        {name: value for name, value in given.items() if value is not None},
        block_size=block_size,
        layout=layout,
        placement=placement,
    )


def _checked(
    exponents: tuple[float | None, float | None], root: _linalg.RootMethod
) -> tuple[float | None, float | None]:
    if not isinstance(exponents, tuple | list) or len(exponents) != 2:
        raise ValueError(
            "`exponents` must be a pair, of the inputs' and of the outputs' side, got "
            f"{exponents!r}."
        )
    if all(exponent is None for exponent in exponents):
        raise ValueError("`exponents` must not leave out both sides, got (None, None).")
    for exponent in exponents:
        if exponent is None:
            continue
        if isinstance(exponent, bool) or not isinstance(exponent, int | float):
            raise TypeError(
                "`exponents` fix the program and must be Python numbers or None, got "
                f"{exponents!r}."
            )
        if not -math.inf < exponent < 0:
            raise ValueError(
                f"`exponents` must be negative and finite, got {exponents!r}."
            )
        p = round(-1 / exponent)
        if root == "newton" and (p < 1 or abs(1 / exponent + p) > 1e-6):
            raise ValueError(
                "`exponents` must be -1/p with a whole p for root='newton', got "
                f"{exponents!r}. Use root='eigh' for any others."
            )
    return exponents[0], exponents[1]
