"""The Muon of nanochat: equalized, orthogonalized, rescaled, with cautious decay."""

import dataclasses
from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _layout, _linalg, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed
from optax_matrix._transforms import _arguments

_TABLE = _linalg.TABLES["polar_express5"]
# nanochat divides the matrix by 1.01 times its norm; the factor is folded into the
# first row.
_ROWS = dataclasses.replace(_TABLE, domain=(_TABLE.domain[0], 1 / 1.01)).take()


@_routed.documented("0.15")
def nanochat_muon(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    orthogonalize: str | _linalg.PolarMethod | None = _linalg.NewtonSchulz(
        coefficients=_ROWS
    ),
    b2: ArrayLike = 0.9,
    eps: ArrayLike = 1e-10,
    weight_decay: optax.ScalarOrSchedule = 0.28,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    routing: _routing.Routing = None,
    placement: _placement.Placement | None = None,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""nanochat's Muon: MuonEq, Polar Express, Muon+, NorMuon and cautious decay.

    With :math:`U` the momentum of `muon`, :math:`E` of `equalize_norms`, :math:`N` of
    `scale_by_neuron_variance`, and :math:`PE_5` five steps of Polar Express,

    .. math::
      O = PE_5(E(U)), \quad
      D = N\!\left(O \sqrt{\min(in, out)} / \|O\|_F\right), \quad
      W \leftarrow W - \eta \sqrt{\max(1, out/in)}
        \left( D + \lambda [D \odot W \ge 0] \odot W \right).

    Args:
      learning_rate: :math:`\eta`, see `muon`.
      momentum: See `muon`.
      orthogonalize: See `muon`.
      b2: :math:`\beta_2` of the running RMS, in [0, 1).
      eps: :math:`\epsilon`, positive, see `scale_by_neuron_variance`.
      <common arguments>

    Returns:
      An optimizer that needs ``params``. The state is one array per hidden
      matrix and one number per output neuron, and that of the auxiliary optimizer.

    Raises:
      ValueError: As `muon`.
      TypeError: As `muon`.

    References:
      https://github.com/karpathy/nanochat, ``nanochat/optim.py`` of 2026-07-03.
      Differs: the running RMS is always that of the outputs, as in NorMuon; nanochat
      takes that of the inputs where there are more of them, and an RMS of at least
      1e-5. It schedules the momentum and decays ``weight_decay`` to 0, and multiplies
      in bfloat16.
    """
    _routed.check(learning_rate, weight_decay, orthogonalize)
    _arguments.mask("weight_decay_mask", weight_decay_mask)
    _routed.check_pieces(placement)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        decay = _transforms.add_cautious_weight_decay(weight_decay)
        if weight_decay_mask is not None:
            decay = optax.masked(decay, weight_decay_mask)
        return optax.chain(
            _transforms.ema_momentum(momentum, mu_dtype=mu_dtype),
            _transforms.equalize_norms("outputs", layout=layout),
            _transforms.orthogonalize(
                orthogonalize, layout=layout, placement=placement
            ),
            _transforms.normalize_frobenius("orthogonal", layout=layout),
            _transforms.scale_by_neuron_variance(b2, eps=eps, layout=layout),
            decay,
            _transforms.scale_by_shape("spectral", layout=layout),
            optax.scale_by_learning_rate(learning_rate),
        )

    rates = (learning_rate, 0.15, auxiliary_learning_rate)
    return _routed.routed(matrix, routing, auxiliary, *rates)
