"""Mano: momentum projected off the weights and normalized per output or input."""

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _layout, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed


@_routed.documented("1")
def mano(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = False,
    rms: ArrayLike = 0.2,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    routing: _routing.Routing = None,
    placement: _placement.Placement | None = None,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Mano: normalized momentum in the tangent space of the oblique manifold.

    With :math:`U` the momentum of `muon`, without look-ahead, and :math:`w_k`,
    :math:`u_k` the vectors of :math:`W` and :math:`U` that belong to each input
    (:math:`n = out`) in the first, third, ... update, and to each output neuron
    (:math:`n = in`) in the others,

    .. math::
      v_k = u_k - \frac{\langle u_k, w_k \rangle}{\|w_k\|^2} w_k, \qquad
      w_k \leftarrow (1 - \eta\lambda) w_k - \eta \rho \sqrt{n} \; v_k / \|v_k\|.

    There are no matrix products.

    Args:
      learning_rate: :math:`\eta`, not negative, or a schedule; with ``rms=0.2``,
        AdamW's learning rates fit.
      momentum: See `muon`.
      nesterov: See `muon`.
      rms: :math:`\rho`, positive: the RMS of the entries of each matrix's update before
        the learning rate.
      <common arguments>

    Returns:
      An optimizer that needs ``params``. The state is one array per hidden
      matrix, and that of the auxiliary optimizer. No matrix is moved, so ``placement``
      has no effect.

    Raises:
      ValueError: As `muon`.
      TypeError: As `muon`.

    References:
      Gu and Xie, 2026, `arXiv:2601.23000 <https://arxiv.org/abs/2601.23000>`_; the
      defaults are those of the authors' ``mano.py``
      (https://github.com/xie-lab-ml/Mano-Restriking-Manifold-Optimization-for-LLM-Training).
      Their momentum is a sum, of which this is a multiple as long as ``momentum`` is
      constant. Their ``mano_v2.py``, which looks ahead and does not divide by
      :math:`\|w_k\|^2`, is another rule.
    """
    _placement.as_placement(placement)
    _routed.check(learning_rate, weight_decay)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            _transforms.ema_momentum(momentum, nesterov=nesterov, mu_dtype=mu_dtype),
            _transforms.oblique_tangent(rms, layout=layout),
            _routed.decayed(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )

    rates = (learning_rate, 1.0, auxiliary_learning_rate)
    return _routed.routed(matrix, routing, auxiliary, *rates)
