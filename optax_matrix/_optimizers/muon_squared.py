"""Muon²: Muon of a momentum divided by Adam's second moment."""

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _layout, _linalg, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed
from optax_matrix._transforms import _arguments


@_routed.documented(_routed.FACTOR)
def muon_squared(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-10,
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
    r"""Muon²: Muon of a momentum that is divided by Adam's second moment.

    With :math:`U` the momentum of `muon`, :math:`G` the raw gradient and
    :math:`\beta_2` = ``b2``,

    .. math::
      v \leftarrow \beta_2 v + (1 - \beta_2) G^2, \quad
      O = \operatorname{NS}_5\!\left(U / (\sqrt v + \epsilon)\right), \quad
      W \leftarrow (1 - \eta\lambda) W - \eta \sqrt{\max(1, out/in)} \, O.

    There is no bias correction, because orthogonalization removes the scale.
    modded-nanogpt's run of it on its optimization track is::

        muon_squared(
            0.1,
            weight_decay=0.0125,
            orthogonalize=NewtonSchulz(12, coefficients="track3"),
        )

    Args:
      learning_rate: :math:`\eta`, see `muon`.
      momentum: See `muon`.
      nesterov: See `muon`.
      b2: :math:`\beta_2`, in [0, 1).
      eps: :math:`\epsilon`, positive, in the unit of the gradient.
      orthogonalize: See `muon`. The paper claims that fewer steps suffice than in Muon.
      shape_scale: The factor of the shape, see `scale_by_shape`; None is 1.
      <common arguments>

    Returns:
      An optimizer. The state is two arrays per hidden matrix, and that of the
      auxiliary optimizer.

    Raises:
      ValueError: As `muon`.
      TypeError: As `muon`.

    References:
      Muon², 2026, `arXiv:2604.09967 <https://arxiv.org/abs/2604.09967>`_; the rule is
      that of the modded-nanogpt optimization track, ``20260501_muonsq``.
    """
    mu_dtype = _arguments.mu_dtype(mu_dtype, divided=True)
    average = _transforms.ema_momentum(momentum, nesterov=nesterov, mu_dtype=mu_dtype)
    _routed.check(learning_rate, weight_decay, orthogonalize)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            _transforms.scale_by_variance(
                b2,
                eps=eps,
                debias=False,
                inner=average,
                nu_dtype=_routed.nu_dtype(mu_dtype),
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
