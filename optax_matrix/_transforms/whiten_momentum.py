"""Whitens the momentum in the eigenbasis of the gradients' statistics."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _check, _layout, _placement
from optax_matrix._transforms import _arguments, _eigenbases, _numerics
from optax_matrix._transforms._eigenbases import SOAP, Moments, Momentum
from optax_matrix._transforms._preconditioner import Scalars
from optax_matrix._transforms._soap import SoapRule


@dataclasses.dataclass(frozen=True)
class WhitenedMomentumRule(SoapRule):
    """Whitened momentum for one matrix; see `whiten_momentum`.

    The state is SOAP's, but the momentum is a tuple of averages, not in the bases.
    """

    averages: int = 1

    def init(self, m: int, n: int, dtype: DTypeLike) -> Moments:
        """Returns zero moments, statistics and bases."""
        zeros = super().init(m, n, dtype)
        return zeros._replace(momentum=(zeros.momentum,) * self.averages)

    def observe(
        self, g: Array, state: Moments, scalars: Scalars
    ) -> tuple[Array, Moments]:
        """Whitens the momentum in the present bases, then averages the statistics."""
        g = _numerics.wide(g)
        momenta = tuple(
            _eigenbases.average(old, g, decay)
            for old, decay in zip(state.momentum, scalars["decays"], strict=True)
        )
        ahead = _numerics.mixture(g, momenta, scalars["weights"], scalars["momentum"])
        # There are no bases before the first gradient, so it is not whitened; the
        # product is NaN if the gradient is.
        seen = scalars["count"] > 0
        inside = self.rotated(ahead, state.left, state.right) * seen.astype(g.dtype)
        variance = _eigenbases.average(
            self.variance(state), jnp.square(inside), scalars["b2"], square=True
        )
        eps = _numerics.as_scalar(scalars["eps"], g)
        white = inside / jnp.maximum(jnp.sqrt(variance), eps)
        white = self.rotated_back(white, state.left, state.right)
        norms = [jnp.maximum(self.schatten4(x), eps) for x in (ahead, white)]
        direction = jnp.where(seen, white * (norms[0] / norms[1]), ahead)
        return direction, Moments(
            tuple(
                _numerics.stored(new, old, len(momenta) * scalars["count"] + i)
                for i, (new, old) in enumerate(
                    zip(momenta, state.momentum, strict=True)
                )
            ),
            self.kept_variance(variance, state, scalars),
            *self.observed_sides(g, state, scalars),
        )

    def carried(
        self, state: Moments, left: object, right: object, scalars: Scalars
    ) -> Momentum:
        """Returns the momentum, which is not in the bases."""
        del left, right, scalars
        return state.momentum

    def schatten4(self, x: Array) -> Array:
        """Returns the Schatten-4 norm, from the Gram matrix of the smaller side."""
        m, n = x.shape
        gram = self.product(x, x.T) if m <= n else self.product(x.T, x)
        return jnp.sqrt(jnp.linalg.norm(gram))

    def flops(self, m: int, n: int) -> int:
        """Returns the FLOPs of `soap_precondition` and of two Gram matrices."""
        return super().flops(m, n) + 2 * 2 * m * n * min(m, n)


def whiten_momentum(
    momentum: optax.ScalarOrSchedule = 0.95,
    b2: ArrayLike = 0.9,
    *,
    decays: Sequence[optax.ScalarOrSchedule] | None = None,
    weights: Sequence[optax.ScalarOrSchedule] | None = None,
    eps: ArrayLike = 1e-8,
    refresh: ArrayLike = 1,
    preconditioner: SOAP = SOAP(),
    mu_dtype: DTypeLike | None = None,
    layout: _layout.Layout = None,
    placement: _placement.Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Whitens the momentum in the eigenbasis of the gradients' statistics.

    Unlike in `soap_precondition`, the momentum is that of `ema_momentum`, outside of
    the bases; the second moment :math:`V` is that of the momentum and not of the
    gradient; and nothing is bias-corrected, because the norm of the momentum is
    restored. With the bases :math:`Q_L, Q_R` from before this gradient,

    .. math::
      M &\leftarrow \beta_1 M + (1 - \beta_1) G, \quad
      P = Q_L^\top [\beta_1 M + (1 - \beta_1) G] Q_R, \quad
      V \leftarrow \beta_2 V + (1 - \beta_2) P^2, \\
      D &= Q_L [P / \max(\sqrt V, \epsilon)] Q_R^\top, \quad
      U = D \, \|P\|_4 / \|D\|_4,

    with the Schatten-4 norm :math:`\|X\|_4 = \|X X^\top\|_F^{1/2}`, of which both are
    at least :math:`\epsilon`. Then
    :math:`L` and :math:`R` average :math:`GG^\top` and :math:`G^\top G` by
    :math:`\beta_2`, and the bases are refreshed, both as in `soap_precondition`. The
    first update, without bases, is the momentum.

    With ``decays`` and ``weights``, the mixture :math:`\sum_k w_k M_k` of
    `mixed_momentum` takes the place of :math:`M`.

    Args:
      momentum: :math:`\beta_1`, in [0, 1), or a schedule.
      b2: :math:`\beta_2`, in [0, 1).
      decays: The decay of each average, see `mixed_momentum`. None: one average, of
        decay :math:`\beta_1`.
      weights: The weight of each average, see `mixed_momentum`. None: a single 1.
      eps: :math:`\epsilon`, positive, in the unit of the gradient.
      refresh: Number of updates from one power step of the bases to the next, at
        least 1.
      preconditioner: All other settings, see `SOAP`.
      mu_dtype: See `soap_precondition`, as the following.
      layout: See `soap_precondition`.
      placement: See `soap_precondition`.

    Returns:
      A transformation, as `soap_precondition`, with a state of the same size, and one
      more array per matrix for each average beyond the first.

    Raises:
      ValueError: As `soap_precondition`.
      TypeError: As `soap_precondition`.

    Precision:
      Fourth powers are added in float32: momenta with a norm below 1e-8 or above 1e9
      are lost.

    References:
      "SOAP-Muon" of the modded-nanogpt optimization track, records 44 to 46, 2026; with
      two averages, pull request `339
      <https://github.com/KellerJordan/modded-nanogpt/pull/339>`_.
    """
    _check.instance("preconditioner", preconditioner, SOAP)
    mu_dtype = _arguments.mu_dtype(mu_dtype)
    if (decays is None) != (weights is None):
        raise ValueError(
            "`decays` and `weights` must be given together, got "
            f"{decays!r} and {weights!r}."
        )
    if decays is not None:
        _arguments.mixture(decays, weights)
    kernels = [momentum] if decays is None else decays
    shares = [1.0] if weights is None else weights

    return _eigenbases.transformation(
        WhitenedMomentumRule(preconditioner, mu_dtype, len(kernels)),
        preconditioner,
        momentum,
        b2,
        eps=eps,
        refresh=refresh,
        more={"decays": tuple(kernels), "weights": tuple(shares)},
        layout=layout,
        placement=placement,
    )
