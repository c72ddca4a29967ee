"""Adam in the eigenbasis of Shampoo's statistics (SOAP)."""

import dataclasses

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _check, _layout, _placement
from optax_matrix._transforms import _arguments, _eigenbases, _numerics, _preconditioner
from optax_matrix._transforms._eigenbases import SOAP, InBases, Moments
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


def soap_precondition(
    momentum: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    *,
    eps: ArrayLike = 1e-8,
    refresh: ArrayLike = 10,
    preconditioner: SOAP = SOAP(),
    mu_dtype: DTypeLike | None = None,
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
    first gradient initializes the bases, by the eigenvectors of its statistics in
    descending order; the first update is **zero**, and the moments do not see that
    gradient. Whenever :math:`s` is a positive multiple of ``refresh``, after the update
    and with its gradient in :math:`L`: the columns of :math:`Q_L` are sorted by
    :math:`q^\top L q`, :math:`V` is permuted accordingly, :math:`Q_L` becomes the Q
    factor of :math:`L Q_L`, and :math:`M` is rotated into the new basis. All this is as
    in the authors' code.

    Args:
      momentum: :math:`\beta_1`, in [0, 1).
      b2: :math:`\beta_2`, in [0, 1).
      eps: :math:`\epsilon`, positive, in the unit of the gradient.
      refresh: Number of updates from one power step of the bases to the next, at
        least 1.
      preconditioner: All other settings, see `SOAP`.
      mu_dtype: The dtype of :math:`M` and :math:`V` in the state: bfloat16, float32 or
        float64. None is float32, and float64 for float64 updates.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack has its own state.
      placement: Where leaves lie on a mesh with auto axes, see `Placement`.

    Returns:
      A transformation for leaves with at least two axes. Updates keep their shape and
      dtype; all arithmetic is in float32, or float64 for float64. The state of an m×n
      matrix is 2mn + 2m² + 2n² numbers.

    Raises:
      ValueError: At construction, for numbers outside these ranges; at ``init``, if a
        leaf does not fit ``layout`` or its sharding does not divide it, with its path.
      TypeError: At construction, for arguments of another type; at ``init``, for leaves
        that are not real floating, with their paths.

    Sharding:
      Any. Each matrix has one owner, which has its state; it receives the gradient in
      one exchange for all matrices of a shape, and sends the update in another. The
      number of rows of the state depends on the number of devices, see `relay_state`.

    Precision:
      Squares of gradients are averaged: entries below 1e-19 or above 1e19 are lost.

    References:
      Vyas et al., 2024, SOAP, `arXiv:2409.11321 <https://arxiv.org/abs/2409.11321>`_
      and https://github.com/nikhilvyas/SOAP. Differs: weight decay is another stage.
    """
    for name, value in (("momentum", momentum), ("b2", b2)):
        _arguments.number(name, value, 0.0, 1.0)
    _arguments.number("eps", eps, 0.0, low_open=True)
    _preconditioner.check_refresh(refresh, 0)
    _check.instance("preconditioner", preconditioner, SOAP)
    factor_b2 = preconditioner.factor_b2
    scalars = {
        "momentum": momentum,
        "b2": b2,
        "factor_b2": b2 if factor_b2 is None else factor_b2,
        "eps": eps,
        "start": 0,
        "refresh": refresh,
    }
    return _preconditioner.per_matrix(
        SoapRule(preconditioner, _arguments.state_dtype("mu_dtype", mu_dtype)),
        preconditioner,
        scalars,
        layout=layout,
        placement=placement,
    )
