"""NorMuon: Muon with evened-out neurons."""

import optax
from jax.typing import ArrayLike

from optax_matrix import _layout, _linalg, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed


def normuon(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    *,
    momentum: ArrayLike = 0.95,
    nesterov: bool = True,
    orthogonalize: str | _linalg.PolarMethod = "newton_schulz",
    placement: _placement.Placement | None = None,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-10,
    shape_scale: _transforms.ShapeScale | None = "spectral",
    weight_decay: ArrayLike = 0.0,
    routing: _routing.Routing = None,
    auxiliary: _routed.Auxiliary = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon whose output neurons are evened out by a running second moment.

    With :math:`U` the momentum of `muon`, :math:`O = \operatorname{NS}_5(U)`,
    :math:`\beta_2` = ``b2`` and the mean over the inputs of each output neuron,

    .. math::
      v \leftarrow \beta_2 v + (1 - \beta_2) \operatorname{mean}_{in}(O^2), \quad
      \hat O = O / (\sqrt v + \epsilon), \quad
      W \leftarrow (1 - \eta\lambda) W
        - \eta \sqrt{\max(1, out/in)} \, \hat O \, \|O\|_F / \|\hat O\|_F.

    Args:
      learning_rate: :math:`\eta`, as of `muon`; a schedule is a function of the step.
      momentum: See `muon`.
      nesterov: See `muon`.
      orthogonalize: See `muon`.
      placement: See `muon`.
      b2: :math:`\beta_2`, in [0, 1).
      eps: :math:`\epsilon`, positive.
      shape_scale: The factor of the shape, see `scale_by_shape`; None for 1.
      weight_decay: :math:`\lambda`, not negative, decoupled, on the hidden matrices.
      routing: See `muon`.
      auxiliary: See `muon`.
      auxiliary_learning_rate: See `muon`.

    Returns:
      An optimizer. Its state is one float32 array a hidden matrix and one number a
      neuron.

    Raises:
      ValueError: As `muon`.

    References:
      Li et al., 2025, `arXiv:2510.05491 <https://arxiv.org/abs/2510.05491>`_. The mean
      runs over the inputs always, as in the authors' code; some ports take the shorter
      axis.
    """

    _routed.check_second_moment(b2, eps)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            _routed.momentum_average(momentum, nesterov=nesterov),
            _routed.orthogonalized(orthogonalize, layout, placement),
            _transforms.scale_by_neuron_variance(b2, eps=eps, layout=layout),
            _routed.shaped(shape_scale, layout),
            _routed.decayed(weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        )

    return _routed.routed(
        matrix,
        learning_rate=learning_rate,
        routing=routing,
        auxiliary=auxiliary,
        auxiliary_learning_rate=auxiliary_learning_rate,
    )
