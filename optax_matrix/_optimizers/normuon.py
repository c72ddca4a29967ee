"""NorMuon: Muon with a running second moment per output neuron."""

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _layout, _linalg, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed


@_routed.documented(_routed.FACTOR)
def normuon(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    orthogonalize: str | _linalg.PolarMethod | None = "newton_schulz",
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-10,
    shape_scale: _transforms.ShapeScale | None = "spectral",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    routing: _routing.Routing = None,
    placement: _placement.Placement | None = None,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""NorMuon: Muon whose output neurons are divided by a running RMS.

    With :math:`U` the momentum of `muon`, :math:`O = \operatorname{NS}_5(U)`,
    :math:`\beta_2` = ``b2`` and the mean over the inputs of each output neuron,

    .. math::
      v \leftarrow \beta_2 v + (1 - \beta_2) \operatorname{mean}_{in}(O^2), \quad
      \hat O = O / (\sqrt v + \epsilon), \quad
      W \leftarrow (1 - \eta\lambda) W
        - \eta \sqrt{\max(1, out/in)} \, \hat O \, \|O\|_F / \|\hat O\|_F.

    Args:
      learning_rate: :math:`\eta`, see `muon`.
      momentum: See `muon`.
      nesterov: See `muon`.
      orthogonalize: See `muon`.
      b2: :math:`\beta_2`, in [0, 1).
      eps: :math:`\epsilon`, positive.
      shape_scale: The factor of the shape, see `scale_by_shape`; None is 1.
      <common arguments>

    Returns:
      An optimizer. The state is one array per hidden matrix and one number per
      output neuron, and that of the auxiliary optimizer.

    Raises:
      ValueError: As `muon`.
      TypeError: As `muon`.

    References:
      Li et al., 2025, `arXiv:2510.05491 <https://arxiv.org/abs/2510.05491>`_. The mean
      is always over the inputs, as in the authors' code; some ports use the shorter
      axis.
    """
    _routed.check(learning_rate, weight_decay, orthogonalize)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            _transforms.ema_momentum(momentum, nesterov=nesterov, mu_dtype=mu_dtype),
            _transforms.orthogonalize(
                orthogonalize, layout=layout, placement=placement
            ),
            _transforms.scale_by_neuron_variance(b2, eps=eps, layout=layout),
            _transforms.scale_by_shape(shape_scale, layout=layout),
            _routed.decayed(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )

    rates = (learning_rate, _routed.factor(shape_scale), auxiliary_learning_rate)
    return _routed.routed(matrix, routing, auxiliary, *rates)
