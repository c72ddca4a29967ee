"""Adam in the eigenbasis of Shampoo's statistics (SOAP)."""

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _check, _layout, _placement
from optax_matrix._transforms import _arguments, _eigenbases
from optax_matrix._transforms._eigenbases import SOAP
from optax_matrix._transforms._kl import KL
from optax_matrix._transforms._rule_of import rule_of


def soap_precondition(
    momentum: optax.ScalarOrSchedule = 0.95,
    b2: ArrayLike = 0.95,
    *,
    eps: ArrayLike = 1e-8,
    refresh: ArrayLike = 10,
    preconditioner: SOAP | KL = SOAP(),
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
      momentum: :math:`\beta_1`, in [0, 1), or a schedule.
      b2: :math:`\beta_2`, in [0, 1).
      eps: :math:`\epsilon`, positive, in the unit of the gradient.
      refresh: Number of updates from one power step of the bases to the next, at
        least 1.
      preconditioner: All other settings, see `SOAP`; with those of `KL` this is
        `kl_soap_precondition`.
      mu_dtype: The dtype of :math:`M` and :math:`V` in the state, see `ema_momentum`;
        not int8, whose error would be divided by a small root of :math:`V`.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack has its own state.
      placement: Where leaves lie on a mesh with auto axes, see `Placement`.

    Returns:
      A transformation for leaves with at least two axes. Updates keep their shape and
      dtype; all arithmetic is in float32, or float64 for float64. The state of an m×n
      matrix is 2mn + (3m² + m + 3n² + n)/2 numbers: of a symmetric statistic it has one
      triangle.

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
    _check.instance("preconditioner", preconditioner, SOAP, KL)
    mu_dtype = _arguments.mu_dtype(mu_dtype, divided=True)
    return _eigenbases.transformation(
        rule_of(preconditioner, mu_dtype),
        preconditioner,
        momentum,
        b2,
        eps=eps,
        refresh=refresh,
        layout=layout,
        placement=placement,
    )
