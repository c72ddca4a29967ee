"""Adam in the eigenbasis of statistics that minimize a KL divergence (KL-SOAP)."""

from optax_matrix._presets import preset
from optax_matrix._transforms._kl import KL
from optax_matrix._transforms.soap_precondition import soap_precondition


@preset(soap_precondition, preconditioner=KL())
def kl_soap_precondition() -> None:
    r"""Takes Adam's step in the eigenbasis of KL-Shampoo's statistics (KL-SOAP).

    As `soap_precondition`, but the statistic of each side is of gradients that the
    other side has whitened. With :math:`\lambda_L, \lambda_R` running estimates of the
    eigenvalues and :math:`G' = Q_L^\top G Q_R` of inputs :math:`m` × outputs :math:`n`,

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
      momentum: As every other argument, see `soap_precondition`.

    Returns:
      A transformation, as `soap_precondition`. The state of an m×n matrix is
      2mn + 3(m² + m + n² + n)/2 numbers.

    Raises:
      ValueError: As `soap_precondition`.
      TypeError: As `soap_precondition`.

    References:
      Lin et al., 2025, `arXiv:2509.03378 <https://arxiv.org/abs/2509.03378>`_ and
      https://github.com/yorkerlin/KL-Methods. Differs: float32 instead of bfloat16.
    """
