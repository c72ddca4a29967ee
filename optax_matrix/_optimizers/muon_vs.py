"""Muon-VS and Muon-NSR: Muon of a momentum divided by its noise."""

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _layout, _linalg, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed
from optax_matrix._presets import preset


@_routed.documented(_routed.FACTOR)
def muon_vs(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    gamma: ArrayLike | None = None,
    eps: ArrayLike = 1e-8,
    orthogonalize: str | _linalg.PolarMethod | None = "newton_schulz",
    shape_scale: _transforms.ShapeScale | None = "rms",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    routing: _routing.Routing = None,
    placement: _placement.Placement | None = None,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon-VS: Muon of a momentum that is divided by the noise of the gradient.

    With :math:`S` the momentum and :math:`\hat V` the variance of `scale_by_noise`,

    .. math::
      O = \operatorname{NS}_5\!\left(S / (\sqrt{\hat V} + \epsilon)\right), \qquad
      W \leftarrow (1 - \eta\lambda) W - \eta \, 0.2 \sqrt{\max(in, out)} \, O.

    Args:
      learning_rate: :math:`\eta`, not negative, or a schedule; with
        ``shape_scale="rms"``, AdamW's learning rates fit.
      momentum: Decay of the momentum and of the variance, in [0, 1), or a schedule.
      gamma: None for Muon-VS; the weight of the noise makes it `muon_nsr`, see
        `scale_by_noise`.
      eps: :math:`\epsilon`, positive, see `scale_by_noise`.
      orthogonalize: See `muon`.
      shape_scale: The factor of the shape, see `scale_by_shape`; None is 1.
      <common arguments>

    Returns:
      An optimizer. The state is two arrays per hidden matrix, and that of the
      auxiliary optimizer.

    Raises:
      ValueError: As `muon`.
      TypeError: As `muon`.

    References:
      Li, Fan and Li, 2026, Variance-adaptive Muon, `arXiv:2601.14603
      <https://arxiv.org/abs/2601.14603>`_ and `code
      <https://github.com/jingru-lee/Variance-Adaptive-Muon>`_, which has the same
      ``momentum`` and ``eps``; ``gamma`` is its ``alpha``.
    """
    _routed.check(learning_rate, weight_decay, orthogonalize)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            _transforms.scale_by_noise(
                momentum,
                gamma=gamma,
                eps=eps,
                mu_dtype=mu_dtype,
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


@preset(muon_vs, gamma=10.0)
def muon_nsr() -> None:
    r"""Muon-NSR: Muon of a momentum scaled by its ratio of noise to signal.

    `muon_vs` with ``gamma=10``: with :math:`S` and :math:`\hat V` of `scale_by_noise`,

    .. math::
      O = \operatorname{NS}_5\!\left(
        S / \big(\sqrt{S^2 + \gamma \hat V} + \epsilon\big)\right), \qquad
      W \leftarrow (1 - \eta\lambda) W - \eta \, 0.2 \sqrt{\max(in, out)} \, O.

    Args:
      learning_rate: As every other argument, see `muon_vs`.

    Returns:
      An optimizer, as `muon_vs`.

    Raises:
      ValueError: As `muon`.
      TypeError: As `muon`.

    References:
      Li, Fan and Li, 2026, Variance-adaptive Muon, `arXiv:2601.14603
      <https://arxiv.org/abs/2601.14603>`_ and `code
      <https://github.com/jingru-lee/Variance-Adaptive-Muon>`_. ``gamma`` is their
      ``alpha``, of which their files have 10 or 1000 as the default.
    """
