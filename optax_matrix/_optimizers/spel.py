"""SPEL: Muon on the manifold of orthonormal matrices."""

from typing import Any

import optax
from jax.typing import DTypeLike

from optax_matrix import _layout, _linalg, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed


@_routed.documented("0.15")
def spel(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = False,
    orthogonalize: str | _linalg.PolarMethod | None = _linalg.NewtonSchulz(
        coefficients="quintic"
    ),
    weight_decay: optax.ScalarOrSchedule = 0.1,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    routing: _routing.Routing = None,
    placement: _placement.Placement | None = None,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SPEL: Muon whose hidden matrices stay orthonormal.

    With :math:`\eta` = ``learning_rate``, :math:`\lambda` = ``weight_decay``, :math:`M`
    the momentum of `muon`, and five quintic steps of Newton-Schulz,

    .. math::
      W \leftarrow \operatorname{polar}((1 - \eta\lambda) W
        - \eta \operatorname{NS}_5(M)).

    All singular values of :math:`W` are 1 from the first update on, whatever they were
    before. Weight decay makes the steps longer, by :math:`1 / (1 - \eta\lambda)`.

    Args:
      learning_rate: :math:`\eta`, see `muon`: the spectral norm of a step, relative to
        weights of spectral norm 1.
      momentum: See `muon`.
      nesterov: See `muon`.
      orthogonalize: See `muon`. It is for the momentum only; the weights are
        orthonormal to rounding, see `stiefel_retract`.
      <common arguments>

    Returns:
      An optimizer that needs ``params``. The state is one array per hidden
      matrix, and that of the auxiliary optimizer.

    Raises:
      ValueError: As `muon`.
      TypeError: As `muon`.

    References:
      Manifold Constrained Steepest Descent, 2026, `arXiv:2601.21487
      <https://arxiv.org/abs/2601.21487>`_; with the defaults of NVIDIA
      Emerging-Optimizers, ``spel.py``. Differs from that code: the weights are
      orthonormal to rounding, where five quintic steps leave singular values from 0.98
      to 1.15; and the default learning rate is that of `muon`, not 3e-4.
    """
    _routed.check(learning_rate, weight_decay, orthogonalize)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            _transforms.ema_momentum(momentum, nesterov=nesterov, mu_dtype=mu_dtype),
            _transforms.orthogonalize(
                orthogonalize, layout=layout, placement=placement
            ),
            _routed.decayed(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
            _transforms.stiefel_retract(layout=layout, placement=placement),
        )

    rates = (learning_rate, 0.15, auxiliary_learning_rate)
    return _routed.routed(matrix, routing, auxiliary, *rates)
