"""Muon and MuonW."""

import optax
from jax.typing import ArrayLike

from optax_matrix import _layout, _linalg, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed


def muon(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    *,
    momentum: ArrayLike = 0.95,
    nesterov: bool = True,
    debias: bool = False,
    orthogonalize: str | _linalg.PolarMethod = "newton_schulz",
    placement: _placement.Placement | None = None,
    shape_scale: _transforms.ShapeScale | None = "spectral",
    weight_decay: ArrayLike = 0.0,
    routing: _routing.Routing = None,
    auxiliary: _routed.Auxiliary = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon: momentum, orthogonalized, for the hidden matrices of a network.

    With :math:`\eta` = ``learning_rate``, :math:`\beta` = ``momentum``,
    :math:`\lambda` = ``weight_decay``, for each matrix :math:`W` of
    :math:`in \times out` with gradient :math:`G`,

    .. math::
      M \leftarrow \beta M + (1 - \beta) G, \quad
      U = \beta M + (1 - \beta) G, \quad
      O = \sqrt{\max(1, out/in)} \operatorname{NS}_5(U), \quad
      W \leftarrow (1 - \eta\lambda) W - \eta O.

    There is no bias correction: orthogonalization forgets the scale. The defaults are
    those of KellerJordan/Muon. ``optax.contrib.muon(lr)`` bias-corrects both terms and
    trains every 2-D leaf by Muon and the rest by Nesterov Adam; this reproduces it to
    rounding::

        muon(
            lr,
            debias=True,
            routing=lambda path, leaf: leaf.ndim == 2,
            auxiliary=optax.nadam(lr),
        )

    Args:
      learning_rate: :math:`\eta`, in units of spectral norm per update; a schedule is a
        function of the step.
      momentum: :math:`\beta`, in [0, 1).
      nesterov: Whether to look ahead; without, :math:`U = M`.
      debias: Whether to bias-correct :math:`M` and :math:`G`, see `ema_momentum`.
      orthogonalize: The stage that orthogonalizes: ``"newton_schulz"`` (five steps of
        the ``"jordan"`` table), ``"halley"``, ``"exact"``, or one of the objects
        `NewtonSchulz`, `Halley`, `Exact` with settings of its own.
      placement: Where parameters lie on a mesh with auto axes, and the size of
        stacks, see `Placement`. None: what explicit axes say, and the rule for stacks.
      shape_scale: The factor of the shape, see `scale_by_shape`; None for 1.
      weight_decay: :math:`\lambda`, not negative, decoupled, on the hidden matrices.
      routing: Which leaves are hidden matrices, and in which layout: None for the rules
        of Flax trees, a predicate on (path, leaf), or a tree; see `describe`. Under
        `optax.inject_hyperparams` name a predicate in ``static_args``, as functions
        are taken for schedules there.
      auxiliary: What trains the other leaves: a transformation, or settings of
        `optax.adamw` as a dict. None: ``b1=0.9, b2=0.95, weight_decay=0``.
      auxiliary_learning_rate: Of that AdamW. None: the same as ``learning_rate``.

    Returns:
      An optimizer. Its state is one float32 array a hidden matrix.

    Raises:
      ValueError: At construction, for numbers out of range and unknown names; at
        ``init``, for leaves that routing cannot place or a layout does not fit, with
        their paths.

    References:
      Jordan et al., 2024, `Muon <https://kellerjordan.github.io/posts/muon/>`_ and
      `code <https://github.com/KellerJordan/Muon>`_.
    """

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            _routed.momentum_average(momentum, nesterov=nesterov, debias=debias),
            _routed.orthogonalized(orthogonalize, layout, placement),
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


def muonw(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    *,
    momentum: ArrayLike = 0.95,
    nesterov: bool = True,
    orthogonalize: str | _linalg.PolarMethod = "newton_schulz",
    placement: _placement.Placement | None = None,
    shape_scale: _transforms.ShapeScale | None = "spectral",
    weight_decay: ArrayLike = 0.01,
    routing: _routing.Routing = None,
    auxiliary: _routed.Auxiliary = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon with decoupled weight decay on the hidden matrices.

    `muon` with :math:`\lambda` = ``weight_decay`` of 0.01 by default:

    .. math:: W \leftarrow (1 - \eta\lambda) W - \eta O.

    Args:
      learning_rate: :math:`\eta`, see `muon`.
      momentum: See `muon`.
      nesterov: See `muon`.
      orthogonalize: See `muon`.
      placement: See `muon`.
      shape_scale: See `muon`; ``"rms"`` is Moonlight's, for which 0.1 is the usual
        ``weight_decay`` and AdamW's learning rates fit.
      weight_decay: :math:`\lambda`, not negative, per unit of learning rate.
      routing: See `muon`.
      auxiliary: See `muon`; its own weight decay is one of its settings.
      auxiliary_learning_rate: See `muon`.

    Returns:
      An optimizer. Its state is one float32 array a hidden matrix.

    Raises:
      ValueError: As `muon`.

    References:
      Liu et al., 2025, `arXiv:2502.16982 <https://arxiv.org/abs/2502.16982>`_.
    """
    return muon(
        learning_rate,
        momentum=momentum,
        nesterov=nesterov,
        orthogonalize=orthogonalize,
        placement=placement,
        shape_scale=shape_scale,
        weight_decay=weight_decay,
        routing=routing,
        auxiliary=auxiliary,
        auxiliary_learning_rate=auxiliary_learning_rate,
    )
