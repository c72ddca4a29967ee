"""Halley-Muon: Muon with few products, between variances of entries and outputs."""

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _check, _layout, _linalg, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed


@_routed.documented("1")
def halley_muon(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    orthogonalize: str | _linalg.PolarMethod | None = "halley",
    svd_every: ArrayLike | None = None,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    rms: ArrayLike | None = 0.2,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    routing: _routing.Routing = None,
    placement: _placement.Placement | None = None,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Halley-Muon: one Halley step between two normalizations by running variances.

    With :math:`U` the momentum of `muon`, :math:`h` Halley's step, :math:`\beta_2` =
    ``b2`` and the mean over the inputs of each output neuron,

    .. math::
      V \leftarrow \beta_2 V + (1 - \beta_2) U^2, \quad
      O = h(U / (\sqrt{\hat V} + \epsilon)), \quad
      v \leftarrow \beta_2 v + (1 - \beta_2) \operatorname{mean}_{in}(O^2), \quad
      D = O / \sqrt v,

      W \leftarrow (1 - \eta\lambda) W - \eta \, \rho \sqrt{mn} \; D / \|D\|_F.

    One step costs 2.2 (square matrices) to 2.4 products :math:`X X^\top`, five
    Newton-Schulz steps up to 15. docs/convergence.md compares the losses.

    Args:
      learning_rate: :math:`\eta`, not negative, or a schedule; with ``rms=0.2``,
        AdamW's learning rates fit.
      momentum: See `muon`.
      nesterov: See `muon`.
      orthogonalize: What takes the place of :math:`h`, see `muon`.
      svd_every: Take the exact polar factor in one of so many updates, at least 1, see
        `svd_supplement`; None is never.
      b2: :math:`\beta_2`, in [0, 1).
      eps: :math:`\epsilon`, positive.
      rms: :math:`\rho`, see `adamuon`.
      <common arguments>

    Returns:
      An optimizer. The state is two arrays per hidden matrix and one number per
      output neuron, and that of the auxiliary optimizer.

    Raises:
      ValueError: As `muon`; at construction, for ``svd_every`` below 1.
      TypeError: As `muon`; at construction, if ``svd_every`` is not an int.

    References:
      Our reading of "Optimizer Research & Progress" (article, 2026), which reports an
      optimizer of about three products per update, and that an SVD on top helps, but
      not its stages. Halley's step: Nakatsukasa, Bai and Gygi, 2010,
      `doi:10.1137/090774999 <https://doi.org/10.1137/090774999>`_. The normalization of
      outputs: Li et al., 2025, `arXiv:2510.05491 <https://arxiv.org/abs/2510.05491>`_.
    """
    _routed.check(learning_rate, weight_decay, orthogonalize)
    _routed.check_pieces(placement)
    if svd_every is not None:
        _check.whole_number("svd_every", svd_every, 1)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        where = {"layout": layout, "placement": placement}
        polar = _transforms.orthogonalize(orthogonalize, **where)
        if svd_every is not None:
            exact = _transforms.svd_supplement(svd_every, **where)
            polar = optax.chain(polar, exact)
        return optax.chain(
            _transforms.ema_momentum(momentum, nesterov=nesterov, mu_dtype=mu_dtype),
            _transforms.scale_by_variance(
                b2, eps=eps, nu_dtype=_routed.nu_dtype(mu_dtype)
            ),
            polar,
            _transforms.scale_by_neuron_variance(b2, layout=layout),
            _transforms.match_rms(rms, layout=layout),
            _routed.decayed(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )

    return _routed.routed(
        matrix, routing, auxiliary, learning_rate, 1.0, auxiliary_learning_rate
    )
