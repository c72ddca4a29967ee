"""Multiplies both sides of an update by roots of its running statistics (Shampoo)."""

import dataclasses
import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _check, _layout, _linalg, _placement
from optax_matrix._transforms import _arguments, _moments, _numerics, _preconditioner
from optax_matrix._transforms._moments import Moment
from optax_matrix._transforms._preconditioner import Health, Preconditioner, Scalars


def _checked(
    exponents: tuple[float | None, float | None], root: _linalg.RootMethod
) -> tuple[float | None, float | None]:
    if not isinstance(exponents, tuple | list) or len(exponents) != 2:
        raise ValueError(
            "`exponents` must be a pair, one for the inputs and one for the outputs, "
            f"got {exponents!r}."
        )
    if all(exponent is None for exponent in exponents):
        raise ValueError("`exponents` must not leave out both sides, got (None, None).")
    for exponent in exponents:
        if exponent is None:
            continue
        if isinstance(exponent, bool) or not isinstance(exponent, int | float):
            raise TypeError(
                f"`exponents` must be Python numbers or None, got {exponents!r}."
            )
        if not -math.inf < exponent < 0:
            raise ValueError(
                f"`exponents` must be negative and finite, got {exponents!r}."
            )
        p = round(-1 / exponent)
        if root == "newton" and (p < 1 or abs(1 / exponent + p) > 1e-6):
            raise ValueError(
                "`exponents` must be -1/p with a whole p for root='newton', got "
                f"{exponents!r}. Use root='eigh' for others."
            )
    return exponents[0], exponents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shampoo(Preconditioner):
    r"""The settings of `shampoo_precondition` and of the optimizers that use it.

    Args:
      exponents: :math:`p_L` of the inputs' and :math:`p_R` of the outputs' side,
        negative. None leaves a side out: ``(-0.5, None)`` is one-sided Shampoo.
      root: ``"eigh"``, or ``"newton"`` for a coupled Newton iteration, which consists
        of matmuls alone and takes exponents -1/p with a whole p.
      residual_bound: A root is rejected if it is not finite or if its residual exceeds
        this, and the last good one stays in use. The residual is
        :math:`\max |AQ - Q\Lambda| / \lambda_{\max}` with ``"eigh"`` and an estimate of
        :math:`\max |X^p A - I|` with ``"newton"``.
      stagger: See `Preconditioner`, as the following.
      block_size: See `Preconditioner`.
      max_dim: See `Preconditioner`.
      max_failures: See `Preconditioner`.
      factor_dtype: See `Preconditioner`.
      precision: See `Preconditioner`.

    Raises:
      TypeError: If an exponent is not a number, or a count not an int.
      ValueError: If an argument is outside its range.

    Example:
      >>> settings = Shampoo(exponents=(-0.5, None), root="newton", stagger=True)
    """

    exponents: tuple[float | None, float | None] = (-0.25, -0.25)
    root: _linalg.RootMethod = "eigh"
    residual_bound: float = 0.1

    def __post_init__(self) -> None:
        """Checks the arguments and stores them in a hashable form."""
        super().__post_init__()
        _check.one_of("root", self.root, ("eigh", "newton"))
        self._store_number("residual_bound", low_open=True)
        object.__setattr__(self, "exponents", _checked(self.exponents, self.root))

    def sides(self, m: int, n: int) -> tuple[bool, bool]:
        """Returns which sides of an m×n matrix have a root."""
        left, right = (
            exponent is not None and size <= self.max_dim
            for size, exponent in zip((m, n), self.exponents, strict=True)
        )
        return left, right


class RootSide(NamedTuple):
    """State of one side of a matrix."""

    statistic: Array  # L or R, packed
    root: Array  # its power, packed; the identity before the first refresh
    health: Health


class ShampooMatrix(NamedTuple):
    """State of one matrix; a side that is left out is None."""

    momentum: Moment | None
    left: RootSide | None
    right: RootSide | None


@dataclasses.dataclass(frozen=True)
class ShampooRule:
    """Shampoo for one matrix; see `shampoo_precondition`."""

    settings: Shampoo
    with_momentum: bool
    summed: bool
    mu_dtype: str | None

    def init(self, m: int, n: int, dtype: DTypeLike) -> ShampooMatrix:
        """Returns zero statistics, and the identity for both roots."""
        momentum = _moments.zeros(jnp.zeros((m, n), dtype), self.mu_dtype)

        def side(size: int) -> RootSide:
            eye = jnp.eye(size, dtype=self.settings.factor_dtype or dtype)
            eye = _linalg.pack(eye)
            return RootSide(jnp.zeros_like(eye), eye, _preconditioner.healthy())

        left, right = (
            side(size) if kept else None
            for size, kept in zip((m, n), self.settings.sides(m, n), strict=True)
        )
        return ShampooMatrix(momentum if self.with_momentum else None, left, right)

    def observe(
        self, g: Array, state: ShampooMatrix, scalars: Scalars
    ) -> tuple[Array, ShampooMatrix]:
        """Averages the momentum and the statistics; the direction is the momentum."""
        g = _numerics.wide(g)
        left = self._observed(state.left, g, scalars)
        right = self._observed(state.right, g.T, scalars)
        momentum = state.momentum
        if momentum is not None:
            b1 = scalars["momentum"]
            mu = _numerics.moving_average(_moments.read(momentum, g.dtype), g, b1)
            momentum = _moments.write(mu, momentum, scalars["count"])
            g = mu / _numerics.bias_correction(b1, _seen(scalars), g)
        return g, ShampooMatrix(momentum, left, right)

    def _observed(
        self, side: RootSide | None, g: Array, scalars: Scalars
    ) -> RootSide | None:
        if side is None:
            return None
        outer = jnp.matmul(g, g.T, precision=self.settings.precision)
        outer = _linalg.pack(outer)
        old = _numerics.wide(side.statistic)
        if self.summed:
            new = old + outer
        else:
            new = _numerics.moving_average(old, outer, scalars["b2"])
        return side._replace(statistic=new.astype(side.statistic.dtype))

    def refresh(
        self, state: ShampooMatrix, scalars: Scalars, first: bool
    ) -> ShampooMatrix:
        """Computes both roots; one that fails keeps the last good one."""
        del first
        left, right = self.settings.exponents
        return state._replace(
            left=self._rooted(state.left, left, scalars),
            right=self._rooted(state.right, right, scalars),
        )

    def _rooted(
        self, side: RootSide | None, exponent: float | None, scalars: Scalars
    ) -> RootSide | None:
        if side is None or exponent is None:
            return None
        settings = self.settings
        a = _linalg.unpack(_numerics.wide(side.statistic))
        if not self.summed:
            a = a / _numerics.bias_correction(scalars["b2"], _seen(scalars), a)
        if settings.root == "eigh":
            found = _linalg.power_by_eigh(a, exponent, scalars["damping"])
        else:
            p = round(-1 / exponent)
            found = _linalg.inverse_root_by_newton(a, p, scalars["damping"])
        good = jnp.all(jnp.isfinite(found.value))
        good = good & (found.residual <= settings.residual_bound)
        health = _preconditioner.after_refresh(side.health, good, settings.max_failures)
        # A zero statistic has no root, which is not a failure.
        use = good & jnp.any(a != 0)
        new = _linalg.pack(found.value).astype(side.root.dtype)
        root = jnp.where(use, new, side.root)
        return RootSide(side.statistic, root, health)

    def apply(self, direction: Array, state: ShampooMatrix) -> Array:
        """Multiplies the direction by the roots of both sides."""
        x, precision = direction, self.settings.precision
        if state.right is not None:
            root = _linalg.unpack(state.right.root.astype(x.dtype))
            x = jnp.matmul(x, root, precision=precision)
        if state.left is not None:
            root = _linalg.unpack(state.left.root.astype(x.dtype))
            x = jnp.matmul(root, x, precision=precision)
        return x

    def flops(self, m: int, n: int) -> int:
        """Returns the FLOPs of the statistics and of the roots times the momentum."""
        return _preconditioner.update_flops(m, n, self.settings.sides(m, n), 1)

    def refresh_flops(self, m: int, n: int) -> float:
        """Returns about the cost of the roots of both sides."""
        kept = itertools.compress((m, n), self.settings.sides(m, n))
        return float(sum(size**3 for size in kept))


def _seen(scalars: Scalars) -> Array:
    return _numerics.next_count(scalars["count"])


def shampoo_precondition(
    momentum: optax.ScalarOrSchedule | None = 0.9,
    b2: ArrayLike | None = 0.95,
    *,
    damping: ArrayLike = 1e-6,
    start: ArrayLike = 0,
    refresh: ArrayLike = 10,
    preconditioner: Shampoo = Shampoo(),
    mu_dtype: DTypeLike | None = None,
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
    :math:`\hat M`. The size of :math:`U` is unrelated to that of :math:`G`: see
    `graft_to`.

    Args:
      momentum: :math:`\beta_1`, in [0, 1), or a schedule. None: :math:`\hat M = G`,
        without state.
      b2: :math:`\beta_2`, in [0, 1). None: :math:`L` and :math:`R` are plain sums.
      damping: :math:`\epsilon`, not negative, relative to the largest eigenvalue. Below
        1e-7 float32 cannot distinguish the smallest eigenvalues from rounding.
      start: The first update with roots, at least 0.
      refresh: Number of updates from one computation of the roots to the next, at
        least 1.
      preconditioner: All other settings, see `Shampoo`.
      mu_dtype: The dtype of :math:`M` in the state, see `ema_momentum`.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack has its own state.
      placement: Where leaves lie on a mesh with auto axes, see `Placement`.

    Returns:
      A transformation for leaves with at least two axes. Updates keep their shape and
      dtype; all arithmetic is in float32, or float64 for float64. The state of an m×n
      matrix is mn + m(m+1) + n(n+1) numbers: of a symmetric statistic or root it has
      one triangle. A statistic that is zero at a refresh leaves
      its root as it was, the identity at first.

    Raises:
      ValueError: At construction, for numbers outside these ranges; at ``init``, if a
        leaf does not fit ``layout`` or its sharding does not divide it, with its path.
      TypeError: At construction, for arguments of another type; at ``init``, for leaves
        that are not real floating, with their paths.

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
    if momentum is not None:
        _arguments.number_or_schedule("momentum", momentum, 0.0, 1.0)
    if b2 is not None:
        _check.number("b2", b2, 0.0, 1.0)
    _check.number("damping", damping, 0.0)
    _preconditioner.check_refresh(refresh, start)
    _check.instance("preconditioner", preconditioner, Shampoo)
    rule = ShampooRule(
        preconditioner,
        momentum is not None,
        b2 is None,
        _arguments.mu_dtype(mu_dtype),
    )
    given = {
        "momentum": momentum,
        "b2": b2,
        "damping": damping,
        "start": start,
        "refresh": refresh,
    }
    return _preconditioner.preconditioned(
        rule,
        preconditioner,
        {name: value for name, value in given.items() if value is not None},
        layout=layout,
        placement=placement,
    )
