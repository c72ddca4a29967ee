"""Muon and MuonW."""

from typing import Any

import optax
from jax.typing import DTypeLike

from optax_matrix import _layout, _linalg, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed
from optax_matrix._presets import preset


@_routed.documented(_routed.FACTOR)
def muon(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    debias: bool = False,
    orthogonalize: str | _linalg.PolarMethod | None = "newton_schulz",
    shape_scale: _transforms.ShapeScale | None = "spectral",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    routing: _routing.Routing = None,
    placement: _placement.Placement | None = None,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon: orthogonalized momentum for the hidden matrices of a network.

    With :math:`\eta` = ``learning_rate``, :math:`\beta` = ``momentum``,
    :math:`\lambda` = ``weight_decay``, for each matrix :math:`W` of
    :math:`in \times out` with gradient :math:`G`,

    .. math::
      M \leftarrow \beta M + (1 - \beta) G, \quad
      U = \beta M + (1 - \beta) G, \quad
      O = \sqrt{\max(1, out/in)} \operatorname{NS}_5(U), \quad
      W \leftarrow (1 - \eta\lambda) W - \eta O.

    There is no bias correction, because orthogonalization removes the scale. The
    defaults are those of KellerJordan/Muon. ``optax.contrib.muon(lr)`` bias-corrects
    both terms and trains every 2-D leaf by Muon and the rest by Nesterov Adam; this
    reproduces it to rounding::

        muon(
            lr,
            debias=True,
            routing=lambda path, leaf: leaf.ndim == 2,
            auxiliary=optax.nadam(lr),
        )

    Args:
      learning_rate: :math:`\eta`, not negative, in units of spectral norm per update;
        or a schedule, which is a function of the step.
      momentum: :math:`\beta`, in [0, 1), or a schedule.
      nesterov: Whether to look ahead; without it, :math:`U = M`.
      debias: Whether to bias-correct :math:`M` and :math:`G`, see `ema_momentum`.
      orthogonalize: How to orthogonalize: ``"newton_schulz"`` (five steps of the
        ``"jordan"`` table), ``"halley"``, ``"zolotarev"``, ``"mud"``, ``"exact"``, an
        object with settings such as ``NewtonSchulz(12, coefficients="track3")``, or
        None for :math:`O = U`.
      shape_scale: The factor of the shape, see `scale_by_shape`. None is 1. ``"rms"``
        is Moonlight's, with which AdamW's learning rates fit.
      <common arguments>

    Returns:
      An optimizer. The state is one array per hidden matrix, and that of the
      auxiliary optimizer.

    Raises:
      ValueError: At construction, for numbers out of range and unknown names; at
        ``init``, for leaves that cannot be routed or that a layout does not fit, with
        their paths.
      TypeError: At construction, for arguments of another type; at ``init``, for leaves
        that are not real floating, with their paths.

    References:
      Jordan et al., 2024, `Muon <https://kellerjordan.github.io/posts/muon/>`_ and
      `code <https://github.com/KellerJordan/Muon>`_.
    """
    _routed.check(learning_rate, weight_decay, orthogonalize)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            _transforms.ema_momentum(
                momentum, nesterov=nesterov, debias=debias, mu_dtype=mu_dtype
            ),
            _transforms.orthogonalize(
                orthogonalize, layout=layout, placement=placement
            ),
            _transforms.scale_by_shape(shape_scale, layout=layout),
            _routed.decayed(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )

    rates = (learning_rate, _routed.factor(shape_scale), auxiliary_learning_rate)
    return _routed.routed(matrix, routing, auxiliary, *rates)


@preset(muon, weight_decay=0.01)
def muonw() -> None:
    r"""Muon with decoupled weight decay: `muon` with ``weight_decay=0.01``.

    .. math:: W \leftarrow (1 - \eta\lambda) W - \eta O.

    Args:
      learning_rate: As every other argument, see `muon`.

    Returns:
      An optimizer, as `muon`.

    Raises:
      ValueError: As `muon`.
      TypeError: As `muon`.

    References:
      Liu et al., 2025, `arXiv:2502.16982 <https://arxiv.org/abs/2502.16982>`_.
    """
