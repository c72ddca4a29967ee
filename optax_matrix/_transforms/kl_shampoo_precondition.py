"""Whitens both sides by statistics that minimize a KL divergence (KL-Shampoo)."""

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _layout, _placement
from optax_matrix._transforms import _kl


def kl_shampoo_precondition(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.98,
    *,
    eps: ArrayLike = 1e-8,
    refresh: int = 10,
    stagger: bool = False,
    initial: ArrayLike = 0.1,
    max_scale: ArrayLike = 4000.0,
    block_size: int | None = None,
    max_dim: int = 10_000,
    max_failures: ArrayLike = 3,
    moment_dtype: DTypeLike | None = None,
    factor_dtype: DTypeLike | None = None,
    precision: str = "highest",
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
      b1: :math:`\beta_1`, in [0, 1).
      b2: Decay of the statistics and of the eigenvalues, in [0, 1).
      eps: :math:`\epsilon`, positive.
      refresh: See `soap_precondition`.
      stagger: See `soap_precondition`.
      initial: See `kl_soap_precondition`.
      max_scale: See `kl_soap_precondition`.
      block_size: See `soap_precondition`.
      max_dim: See `soap_precondition`.
      max_failures: See `soap_precondition`.
      moment_dtype: See `soap_precondition`.
      factor_dtype: See `soap_precondition`.
      precision: See `soap_precondition`.
      layout: See `soap_precondition`.
      placement: See `soap_precondition`.

    Returns:
      A transformation, as `soap_precondition`. The state of an m×n matrix is
      mn + 2m² + 2n² + m + n numbers.

    Raises:
      ValueError: As `soap_precondition`.
      TypeError: As `soap_precondition`.

    References:
      As `kl_soap_precondition`.
    """
    return _kl.kl_transformation(
        False,
        {
            "b1": b1,
            "b2": b2,
            "factor_b2": b2,
            "eps": eps,
            "initial": initial,
            "max_scale": max_scale,
            "max_failures": max_failures,
        },
        refresh=refresh,
        stagger=stagger,
        block_size=block_size,
        max_dim=max_dim,
        moment_dtype=moment_dtype,
        factor_dtype=factor_dtype,
        precision=precision,
        layout=layout,
        placement=placement,
    )
