"""SOAP, KL-SOAP and SOAP-Muon: Adam in an eigenbasis."""

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _layout, _linalg, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed
from optax_matrix._presets import preset
from optax_matrix._transforms import KL, SOAP


@_routed.documented("1")
def soap(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    refresh: ArrayLike = 10,
    preconditioner: SOAP | KL = SOAP(),
    weight_decay: optax.ScalarOrSchedule = 0.01,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    routing: _routing.Routing = None,
    placement: _placement.Placement | None = None,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SOAP: Adam in the eigenbasis of Shampoo's statistics.

    With :math:`U` of `soap_precondition`, which is zero in the first update,

    .. math:: W \leftarrow (1 - \eta\lambda) W - \eta U.

    Args:
      learning_rate: :math:`\eta`, not negative, in Adam's units, or a schedule.
      momentum: :math:`\beta_1` of the momentum, in [0, 1), or a schedule.
      b2: :math:`\beta_2` of the second moment, in [0, 1), and of the statistics unless
        ``preconditioner`` has ``factor_b2``.
      eps: :math:`\epsilon`, positive.
      refresh: Number of updates from one power step of the bases to the next.
      preconditioner: All other settings, see `SOAP`; those of `KL` make it KL-SOAP.
      <common arguments>

    Returns:
      An optimizer. The state is that of `soap_precondition` and of the auxiliary
      optimizer.

    Raises:
      ValueError: As `soap_precondition` and `muon`.
      TypeError: As `soap_precondition` and `muon`.

    References:
      Vyas et al., 2024, `arXiv:2409.11321 <https://arxiv.org/abs/2409.11321>`_.
    """
    _routed.check(learning_rate, weight_decay)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            _transforms.soap_precondition(
                momentum,
                b2,
                eps=eps,
                refresh=refresh,
                preconditioner=preconditioner,
                mu_dtype=mu_dtype,
                layout=layout,
                placement=placement,
            ),
            _routed.decayed(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )

    rates = (learning_rate, 1.0, auxiliary_learning_rate)
    return _routed.routed(matrix, routing, auxiliary, *rates)


@preset(soap, preconditioner=KL())
def kl_soap() -> None:
    r"""KL-SOAP: Adam in the eigenbasis of KL-Shampoo's statistics.

    ``soap(preconditioner=KL())``, see `kl_soap_precondition`.

    Args:
      learning_rate: As every other argument, see `soap`.

    Returns:
      An optimizer, as `soap`.

    Raises:
      ValueError: As `soap`.
      TypeError: As `soap`.

    References:
      Lin et al., 2025, `arXiv:2509.03378 <https://arxiv.org/abs/2509.03378>`_. Differs:
      the defaults are those of `soap`; theirs are 1e-4, 0.9 and 0.98.
    """


@_routed.documented(_routed.FACTOR)
def soap_muon(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    refresh: ArrayLike = 10,
    preconditioner: SOAP | KL = SOAP(),
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
    r"""SOAP-Muon: SOAP's step, orthogonalized.

    With :math:`U` of `soap_precondition`, which is zero in the first update,

    .. math::
      W \leftarrow (1 - \eta\lambda) W
        - \eta \sqrt{\max(1, out/in)} \operatorname{NS}_5(U).

    Args:
      learning_rate: :math:`\eta`, see `muon`.
      momentum: See `soap`.
      b2: See `soap`.
      eps: :math:`\epsilon`, positive.
      refresh: See `soap`.
      preconditioner: See `soap`.
      orthogonalize: See `muon`.
      shape_scale: The factor of the shape, see `scale_by_shape`; None is 1.
      <common arguments>

    Returns:
      An optimizer. The state is that of `soap_precondition` and of the auxiliary
      optimizer.

    Raises:
      ValueError: As `soap_precondition` and `muon`.
      TypeError: As `soap_precondition` and `muon`.

    References:
      Vyas et al., 2024, `arXiv:2409.11321 <https://arxiv.org/abs/2409.11321>`_; Jordan
      et al., 2024, `Muon <https://kellerjordan.github.io/posts/muon/>`_.
    """
    _routed.check(learning_rate, weight_decay, orthogonalize)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            _transforms.soap_precondition(
                momentum,
                b2,
                eps=eps,
                refresh=refresh,
                preconditioner=preconditioner,
                mu_dtype=mu_dtype,
                layout=layout,
                placement=placement,
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
