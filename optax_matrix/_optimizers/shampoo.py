"""Shampoo and Distributed Shampoo: roots of two statistics a matrix, grafted."""

from collections.abc import Mapping
from typing import Any

import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed

Graft = str | optax.GradientTransformation | None


def shampoo(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    *,
    b1: ArrayLike | None = 0.9,
    b2: ArrayLike | None = 0.95,
    damping: ArrayLike = 1e-6,
    start: int = 0,
    refresh: int = 10,
    graft: Graft = "adam",
    preconditioner: Mapping[str, Any] | None = None,
    placement: _placement.Placement | None = None,
    weight_decay: ArrayLike = 0.0,
    routing: _routing.Routing = None,
    auxiliary: _routed.Auxiliary = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions both sides of each hidden matrix, by the size of Adam's step.

    With :math:`\hat M, \hat L, \hat R` of `shampoo_precondition` and :math:`A` the
    update of the transformation that is grafted,

    .. math::
      D = \hat L_\epsilon^{-1/4} \hat M \hat R_\epsilon^{-1/4}, \quad
      W \leftarrow (1 - \eta\lambda) W - \eta \|A\| \, D / \|D\|.

    Args:
      learning_rate: :math:`\eta`; a schedule is a function of the step. In the units
        of what is grafted.
      b1: :math:`\beta_1` of :math:`M`, in [0, 1); None for no momentum.
      b2: :math:`\beta_2` of :math:`L` and :math:`R`, in [0, 1); None for sums.
      damping: :math:`\epsilon`, relative to the largest eigenvalue.
      start: The first update, from 0, that is preconditioned.
      refresh: Updates from one computation of the roots to the next.
      graft: Whose norm each matrix's update takes: ``"adam"`` (with ``b1``, or 0.9, and
        0.95), ``"rmsprop"`` (0.95), ``"adagrad"``, ``"sgd"`` (the gradient's), any
        transformation, or None for Shampoo's own.
      preconditioner: Further settings of `shampoo_precondition`, such as
        ``{"exponents": (-0.5, None), "root": "newton", "stagger": True}``.
      placement: See `muon`.
      weight_decay: :math:`\lambda`, not negative, decoupled, on the hidden matrices.
      routing: See `muon`.
      auxiliary: See `muon`.
      auxiliary_learning_rate: See `muon`.

    Returns:
      An optimizer. Its state is that of `shampoo_precondition` and of ``graft``.

    Raises:
      ValueError: As `shampoo_precondition` and `muon`.
      TypeError: As `shampoo_precondition` and `muon`.

    References:
      Gupta, Koren and Singer, 2018, `arXiv:1802.09568
      <https://arxiv.org/abs/1802.09568>`_; Anil et al., 2020, `arXiv:2002.09018
      <https://arxiv.org/abs/2002.09018>`_.
    """
    return _grafted_shampoo(
        learning_rate,
        {
            "b1": b1,
            "b2": b2,
            "damping": damping,
            "start": start,
            "refresh": refresh,
            "placement": placement,
        },
        preconditioner,
        graft,
        None,
        weight_decay=weight_decay,
        routing=routing,
        auxiliary=auxiliary,
        auxiliary_learning_rate=auxiliary_learning_rate,
    )


def distributed_shampoo(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    *,
    b1: ArrayLike | None = 0.9,
    b2: ArrayLike | None = 0.95,
    damping: ArrayLike = 1e-6,
    start: int = 0,
    refresh: int = 10,
    stagger: bool = True,
    block_size: int = 1024,
    graft: Graft = "adam",
    preconditioner: Mapping[str, Any] | None = None,
    placement: _placement.Placement | None = None,
    weight_decay: ArrayLike = 0.0,
    routing: _routing.Routing = None,
    auxiliary: _routed.Auxiliary = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""`shampoo` on blocks of each matrix, each grafted by itself, roots staggered.

    Blocks keep the roots cheap and are spread over the devices like matrices.

    Args:
      learning_rate: See `shampoo`.
      b1: See `shampoo`.
      b2: See `shampoo`.
      damping: See `shampoo`.
      start: See `shampoo`.
      refresh: See `shampoo`.
      stagger: Whether each block has an update of its own for its roots.
      block_size: Longer sides are cut into blocks of this size, the last one smaller.
      graft: See `shampoo`; the norm is of each block.
      preconditioner: See `shampoo`.
      placement: See `muon`.
      weight_decay: See `shampoo`.
      routing: See `muon`.
      auxiliary: See `muon`.
      auxiliary_learning_rate: See `muon`.

    Returns:
      An optimizer, as `shampoo`.

    Raises:
      ValueError: As `shampoo`.
      TypeError: As `shampoo`.

    References:
      Shi et al., 2023, `arXiv:2309.06497 <https://arxiv.org/abs/2309.06497>`_. Differs:
      damping is relative, averages instead of sums by default, refreshed less often.
    """
    return _grafted_shampoo(
        learning_rate,
        {
            "b1": b1,
            "b2": b2,
            "damping": damping,
            "start": start,
            "refresh": refresh,
            "stagger": stagger,
            "block_size": block_size,
            "placement": placement,
        },
        preconditioner,
        graft,
        block_size,
        weight_decay=weight_decay,
        routing=routing,
        auxiliary=auxiliary,
        auxiliary_learning_rate=auxiliary_learning_rate,
    )


def _grafted_shampoo(
    learning_rate: optax.ScalarOrSchedule,
    named: dict[str, Any],
    preconditioner: Mapping[str, Any] | None,
    graft: Graft,
    block_size: int | None,
    *,
    weight_decay: ArrayLike,
    routing: _routing.Routing,
    auxiliary: _routed.Auxiliary,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None,
) -> optax.GradientTransformationExtraArgs:
    settings = named | _routed.settings_of(
        _transforms.shampoo_precondition, preconditioner, named
    )
    magnitude = _magnitude(graft, named["b1"])

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        direction = _transforms.shampoo_precondition(**settings, layout=layout)
        if magnitude is not None:
            direction = _transforms.graft_to(
                magnitude, direction, block_size=block_size, layout=layout
            )
        return optax.chain(
            direction,
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


def _magnitude(graft: Graft, b1: Any) -> optax.GradientTransformation | None:
    """The transformation of that name; statistics are in float32."""
    if graft is None or isinstance(graft, optax.GradientTransformation):
        return graft
    _check.one_of("graft", graft, ("adam", "rmsprop", "adagrad", "sgd"))
    if graft == "adam":
        return _routed.adam_direction(0.9 if b1 is None else b1, 0.95, 1e-8)
    if graft == "rmsprop":
        inner = optax.scale_by_rms(decay=0.95)
    elif graft == "adagrad":
        inner = optax.scale_by_rss()
    else:
        inner = optax.identity()
    return _transforms.wide_statistics(inner)
