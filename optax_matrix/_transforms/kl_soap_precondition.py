"""Adam in the eigenbasis of statistics that minimize a KL divergence (KL-SOAP)."""

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _layout, _placement
from optax_matrix._transforms import _kl


def kl_soap_precondition(
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    *,
    factor_b2: ArrayLike | None = None,
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
    r"""Takes Adam's step in the eigenbasis of KL-Shampoo's statistics (KL-SOAP).

    As `soap_precondition`, but each side's statistic is of gradients that the other one
    has whitened. With :math:`\lambda_L, \lambda_R` running estimates of the eigenvalues
    and :math:`G' = Q_L^\top G Q_R` of inputs :math:`m` × outputs :math:`n`,

    .. math::
      M &\leftarrow \beta_1 M + (1 - \beta_1) G', \quad
      V \leftarrow \beta_2 V + (1 - \beta_2) G'^2, \quad
      U = Q_L \left[ M / (\sqrt V + \epsilon) \right] Q_R^\top, \\
      L &\leftarrow \beta L + (1 - \beta) \, G Q_R \operatorname{diag}(\lambda_R)^{-1}
        Q_R^\top G^\top / n, \\
      \lambda_{L,i} &\leftarrow \beta \lambda_{L,i} + (1 - \beta)
        \operatorname{mean}_j \left( G'^2_{ij} / \lambda_{R,j} \right),

    :math:`R` and :math:`\lambda_R` likewise, by the old :math:`\lambda_L`. There is no
    bias correction. The first gradient gives :math:`GG^\top / n` and the bases; the
    first update is **zero**, and the moments do not see that gradient. Every
    ``refresh`` updates both bases take one power step, unsorted; :math:`M` is rotated
    along, :math:`V` and the eigenvalues stay. All this is as in the authors' code.

    Args:
      b1: :math:`\beta_1`, in [0, 1).
      b2: :math:`\beta_2`, in [0, 1).
      factor_b2: :math:`\beta` of :math:`L`, :math:`R` and the eigenvalues, in [0, 1);
        None is ``b2``.
      eps: :math:`\epsilon`, positive, in the unit of the gradient.
      refresh: See `soap_precondition`.
      stagger: See `soap_precondition`.
      initial: What all eigenvalues start from, positive.
      max_scale: The largest :math:`\lambda^{-1/2}` of a side of :math:`m` entries is
        the smaller of this and :math:`m`, but at least 10.
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
      2mn + 2m² + 2n² + m + n numbers.

    Raises:
      ValueError: As `soap_precondition`.
      TypeError: As `soap_precondition`.

    References:
      Lin et al., 2025, `arXiv:2509.03378 <https://arxiv.org/abs/2509.03378>`_ and
      https://github.com/yorkerlin/KL-Methods. Differs: float32 instead of bfloat16.
    """
    return _kl.kl_transformation(
        True,
        {
            "b1": b1,
            "b2": b2,
            "factor_b2": b2 if factor_b2 is None else factor_b2,
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
