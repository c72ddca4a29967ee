"""Muown: Muon on directions and Adam on norms, by weight normalization."""

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _layout, _linalg, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed


@_routed.documented("1")
def muown(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    orthogonalize: str | _linalg.PolarMethod | None = "newton_schulz",
    shape_scale: _transforms.ShapeScale | None = "rms",
    magnitude_momentum: optax.ScalarOrSchedule = 0.9,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    routing: _routing.Routing = None,
    placement: _placement.Placement | None = None,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muown: Muon on the directions of the outputs and Adam on their norms.

    Each output is :math:`w = g v / \|v\|`, see `weight_normalized`, with the gradients
    :math:`d_v` and :math:`d_g`. With :math:`U` the momentum of `muon`, of
    :math:`d_v`,

    .. math::
      V \leftarrow V - \eta \, 0.2 \sqrt{\max(in, out)} \operatorname{NS}_5(U), \quad
      g \leftarrow g - \eta \operatorname{Adam}(d_g), \quad
      w \leftarrow g v / \|v\| - \eta \lambda w.

    Args:
      learning_rate: :math:`\eta`, not negative, in the unit of AdamW's; or a schedule.
      momentum: Decay of the momentum of the directions, in [0, 1), or a schedule.
      nesterov: See `muon`.
      orthogonalize: See `muon`.
      shape_scale: The factor of the shape, see `scale_by_shape`; None is 1.
      magnitude_momentum: Decay of Adam's first moment of the norms, in [0, 1), or a
        schedule.
      b2: Decay of its second moment, in [0, 1).
      eps: Positive, added to the root of the second moment.
      <common arguments>

    Returns:
      An optimizer that needs ``params``. The state is one array per hidden
      matrix and three numbers per output, and that of the auxiliary optimizer.

    Raises:
      ValueError: As `muon`.
      TypeError: As `muon`.

    References:
      Lion et al., 2026, `arXiv:2605.10797 <https://arxiv.org/abs/2605.10797>`_ and
      `code <https://github.com/kcc-lion/muown>`_, with the learning rate of its
      experiments. Weight decay is that of its ``Muown``; its ``MuownDP`` decays twice,
      and NVIDIA's Emerging-Optimizers decay :math:`g` after Adam's step. Differs: with
      weight decay the code sets :math:`g` to the norm of :math:`w`, which loses a
      negative sign, and it returns NaN for an output that is zero at the start. The
      record of the modded-nanogpt optimization track also schedules :math:`\|v\|`.
    """
    _routed.check(learning_rate, weight_decay, orthogonalize)
    adam = _routed.adam(magnitude_momentum, b2, eps, None, "magnitude_momentum")
    decay = _routed.product(_routed.product(learning_rate, weight_decay), -1.0)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        direction = optax.chain(
            _transforms.ema_momentum(momentum, nesterov=nesterov, mu_dtype=mu_dtype),
            _transforms.orthogonalize(
                orthogonalize, layout=layout, placement=placement
            ),
            _transforms.scale_by_shape(shape_scale, layout=layout),
            optax.scale_by_learning_rate(learning_rate),
        )
        magnitude = optax.chain(adam, optax.scale_by_learning_rate(learning_rate))
        return optax.chain(
            _transforms.weight_normalized(direction, magnitude, layout=layout),
            # The step is final, so the decay has the learning rate and the sign.
            _routed.decayed(decay, weight_decay_mask),
        )

    rates = (learning_rate, 1.0, auxiliary_learning_rate)
    return _routed.routed(matrix, routing, auxiliary, *rates)
