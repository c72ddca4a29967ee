"""SOAP, KL-SOAP and SOAP-Muon: Adam in a slowly turning basis."""

from collections.abc import Callable, Mapping
from typing import Any

import optax
from jax.typing import ArrayLike

from optax_matrix import _layout, _linalg, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed


def soap(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    *,
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    refresh: int = 10,
    preconditioner: Mapping[str, Any] | None = None,
    placement: _placement.Placement | None = None,
    weight_decay: ArrayLike = 0.01,
    routing: _routing.Routing = None,
    auxiliary: _routed.Auxiliary = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes Adam's step in the eigenbasis of Shampoo's statistics.

    With :math:`U` of `soap_precondition`, whose first one is zero,

    .. math:: W \leftarrow (1 - \eta\lambda) W - \eta U.


    Args:
      learning_rate: :math:`\eta`, in Adam's units, or a schedule of them.
      b1: :math:`\beta_1` of the momentum, in [0, 1).
      b2: :math:`\beta_2` of the second moment, in [0, 1), and of the statistics unless
        ``preconditioner`` says another.
      eps: :math:`\epsilon`, positive.
      refresh: Updates from one power step of the bases to the next.
      preconditioner: Further settings of `soap_precondition`, such as
        ``{"stagger": True, "block_size": 1024}``.
      placement: See `muon`.
      weight_decay: :math:`\lambda`, not negative, decoupled, on the hidden matrices.
      routing: See `muon`.
      auxiliary: See `muon`.
      auxiliary_learning_rate: See `muon`.

    Returns:
      An optimizer. Its state is that of `soap_precondition`.

    Raises:
      ValueError: As `soap_precondition` and `muon`.
      TypeError: As `soap_precondition` and `muon`.

    References:
      Vyas et al., 2024, `arXiv:2409.11321 <https://arxiv.org/abs/2409.11321>`_.
    """
    return _in_a_basis(
        _transforms.soap_precondition,
        {"b1": b1, "b2": b2, "eps": eps, "refresh": refresh, "placement": placement},
        preconditioner,
        None,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        routing=routing,
        auxiliary=auxiliary,
        auxiliary_learning_rate=auxiliary_learning_rate,
    )


def kl_soap(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    *,
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    refresh: int = 10,
    preconditioner: Mapping[str, Any] | None = None,
    placement: _placement.Placement | None = None,
    weight_decay: ArrayLike = 0.01,
    routing: _routing.Routing = None,
    auxiliary: _routed.Auxiliary = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes Adam's step in the eigenbasis of KL-Shampoo's statistics.

    With :math:`U` of `kl_soap_precondition`, whose first one is zero,

    .. math:: W \leftarrow (1 - \eta\lambda) W - \eta U.


    Args:
      learning_rate: See `soap`.
      b1: :math:`\beta_1` of the momentum, in [0, 1).
      b2: :math:`\beta_2` of the second moment, in [0, 1), and of the statistics unless
        ``preconditioner`` says another.
      eps: :math:`\epsilon`, positive.
      refresh: Updates from one power step of the bases to the next.
      preconditioner: Further settings of `kl_soap_precondition`, such as
        ``{"stagger": True, "block_size": 1024}``.
      placement: See `muon`.
      weight_decay: See `soap`.
      routing: See `muon`.
      auxiliary: See `muon`.
      auxiliary_learning_rate: See `muon`.

    Returns:
      An optimizer. Its state is that of `kl_soap_precondition`.

    Raises:
      ValueError: As `kl_soap_precondition` and `muon`.
      TypeError: As `kl_soap_precondition` and `muon`.

    References:
      Lin et al., 2025, `arXiv:2509.03378 <https://arxiv.org/abs/2509.03378>`_. Differs:
      the defaults are those of `soap`; theirs are 1e-4, 0.9 and 0.98.
    """
    return _in_a_basis(
        _transforms.kl_soap_precondition,
        {"b1": b1, "b2": b2, "eps": eps, "refresh": refresh, "placement": placement},
        preconditioner,
        None,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        routing=routing,
        auxiliary=auxiliary,
        auxiliary_learning_rate=auxiliary_learning_rate,
    )


def soap_muon(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    *,
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    refresh: int = 10,
    preconditioner: Mapping[str, Any] | None = None,
    orthogonalize: str | _linalg.PolarMethod = "newton_schulz",
    shape_scale: _transforms.ShapeScale | None = "spectral",
    placement: _placement.Placement | None = None,
    weight_decay: ArrayLike = 0.0,
    routing: _routing.Routing = None,
    auxiliary: _routed.Auxiliary = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Orthogonalizes SOAP's step.

    With :math:`U` of `soap_precondition`, whose first one is zero,

    .. math::
      W \leftarrow (1 - \eta\lambda) W
        - \eta \sqrt{\max(1, out/in)} \operatorname{NS}_5(U).


    Args:
      learning_rate: :math:`\eta`, as of `muon`; a schedule is a function of the step.
      b1: :math:`\beta_1` of the momentum, in [0, 1).
      b2: :math:`\beta_2` of the second moment, in [0, 1), and of the statistics unless
        ``preconditioner`` says another.
      eps: :math:`\epsilon`, positive.
      refresh: Updates from one power step of the bases to the next.
      preconditioner: Further settings of `soap_precondition`, such as
        ``{"stagger": True, "block_size": 1024}``.
      orthogonalize: See `muon`.
      shape_scale: The factor of the shape, see `scale_by_shape`; None for 1.
      placement: See `muon`.
      weight_decay: See `soap`.
      routing: See `muon`.
      auxiliary: See `muon`.
      auxiliary_learning_rate: See `muon`.

    Returns:
      An optimizer. Its state is that of `soap_precondition`.

    Raises:
      ValueError: As `soap_precondition` and `muon`.
      TypeError: As `soap_precondition` and `muon`.

    References:
      Vyas et al., 2024, `arXiv:2409.11321 <https://arxiv.org/abs/2409.11321>`_; Jordan
      et al., 2024, `Muon <https://kellerjordan.github.io/posts/muon/>`_.
    """

    def shaped(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            _routed.orthogonalized(orthogonalize, layout, placement),
            _routed.shaped(shape_scale, layout),
        )

    return _in_a_basis(
        _transforms.soap_precondition,
        {"b1": b1, "b2": b2, "eps": eps, "refresh": refresh, "placement": placement},
        preconditioner,
        shaped,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        routing=routing,
        auxiliary=auxiliary,
        auxiliary_learning_rate=auxiliary_learning_rate,
    )


def _in_a_basis(
    transform: Callable[..., optax.GradientTransformation],
    named: dict[str, Any],
    preconditioner: Mapping[str, Any] | None,
    then: Callable[[_layout.Layout], optax.GradientTransformation] | None,
    *,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: ArrayLike,
    routing: _routing.Routing,
    auxiliary: _routed.Auxiliary,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None,
) -> optax.GradientTransformationExtraArgs:
    """The preconditioner, what follows it, weight decay and learning rate; routed."""
    settings = named | _routed.settings_of(transform, preconditioner, named)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            transform(**settings, layout=layout),
            then(layout) if then else optax.identity(),
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
