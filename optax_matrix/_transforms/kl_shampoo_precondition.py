"""Whitens both sides by statistics that minimize a KL divergence (KL-Shampoo)."""

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _check, _layout, _placement
from optax_matrix._transforms import _arguments, _eigenbases
from optax_matrix._transforms._kl import KL, KLRule


def kl_shampoo_precondition(
    momentum: optax.ScalarOrSchedule = 0.9,
    b2: ArrayLike = 0.98,
    *,
    eps: ArrayLike = 1e-8,
    refresh: ArrayLike = 10,
    preconditioner: KL = KL(),
    mu_dtype: DTypeLike | None = None,
    layout: _layout.Layout = None,
    placement: _placement.Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Whitens both sides by statistics that take each other into account (KL-Shampoo).

    With the statistics :math:`L, R`, their bases and eigenvalue estimates as in
    `kl_soap_precondition`,

    .. math::
      M \leftarrow \beta_1 M + (1 - \beta_1) Q_L^\top G Q_R, \quad
      S_{ij} = (\lambda_{L,i} \lambda_{R,j})^{-1/2}, \quad
      U = Q_L \left[ M \circ S / (1 + \epsilon S) \right] Q_R^\top,

    by the bases and eigenvalues before this gradient. There is no bias correction, and
    the first update is **zero**. With exact ones this is :math:`L^{-1/2} M R^{-1/2}`.

    Args:
      momentum: :math:`\beta_1`, in [0, 1), or a schedule.
      b2: Decay of the statistics and of the eigenvalues, in [0, 1).
      eps: :math:`\epsilon`, positive.
      refresh: See `soap_precondition`.
      preconditioner: All other settings, see `KL`.
      mu_dtype: See `soap_precondition`; there is no :math:`V`.
      layout: See `soap_precondition`.
      placement: See `soap_precondition`.

    Returns:
      A transformation, as `soap_precondition`. The state of an m×n matrix is
      mn + 3(m² + m + n² + n)/2 numbers.

    Raises:
      ValueError: As `soap_precondition`.
      TypeError: As `soap_precondition`.

    References:
      As `kl_soap_precondition`.
    """
    _check.instance("preconditioner", preconditioner, KL)
    mu_dtype = _arguments.mu_dtype(mu_dtype, divided=True)
    return _eigenbases.transformation(
        KLRule(preconditioner, mu_dtype, with_variance=False),
        preconditioner,
        momentum,
        b2,
        eps=eps,
        refresh=refresh,
        layout=layout,
        placement=placement,
    )
