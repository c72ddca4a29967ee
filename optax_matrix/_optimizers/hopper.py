"""Hopper and AdaMuon: orthogonalization together with Adam's second moment."""

from typing import Literal

import optax
from jax.typing import ArrayLike

from optax_matrix import (
    _check,
    _layout,
    _linalg,
    _placement,
    _routing,
    _transforms,
)
from optax_matrix._optimizers import _routed


def hopper(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    ns_steps: int = 1,
    placement: _placement.Placement | None = None,
    variance: Literal["post", "pre"] = "post",
    b1: ArrayLike | None = None,
    b2: ArrayLike | None = None,
    eps: ArrayLike = 1e-8,
    nesterov: bool = True,
    rms: ArrayLike | None = 0.2,
    weight_decay: ArrayLike = 0.0,
    routing: _routing.Routing = None,
    auxiliary: _routed.Auxiliary = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Hopper: variance normalization and a single Newton-Schulz step.

    With :math:`k` = ``ns_steps`` and :math:`U` the momentum of `muon`, the order
    ``"post"`` takes the second moment of what Newton-Schulz returns,

    .. math::
      O = \operatorname{NS}_k(U), \quad V \leftarrow \beta_2 V + (1 - \beta_2) O^2,
      \quad D = O / (\sqrt{\hat V} + \epsilon),

    and ``"pre"`` orthogonalizes Adam's update,
    :math:`D = \operatorname{NS}_k(\hat m / (\sqrt{\hat v} + \epsilon))`. Then

    .. math::
      W \leftarrow (1 - \eta\lambda) W - \eta \, \rho \sqrt{mn} \; D / \|D\|_F.

    What was published of Hopper is "variance and ``ns_steps=1``"; the betas, the scale
    and the order were not, so this is an interpretation with both orders. ``"post"``
    with 5 steps is `adamuon` without its sign; ``"pre"`` with 0 steps and ``rms=None``
    is `optax.adam`. One Newton-Schulz step returns a norm near 3.4 whatever the size
    of the matrix, five one that grows with the root of its smaller side; matching the
    RMS evens that out: without it a comparison over ``ns_steps`` compares step sizes.

    Args:
      learning_rate: :math:`\eta`; with ``rms=0.2`` those of AdamW fit.
      ns_steps: :math:`k`, at least 0 (which leaves the stage out), of the ``"jordan"``
        table. It fixes the program: under `optax.inject_hyperparams` name it in
        ``static_args``.
      placement: See `muon`.
      variance: The order, ``"post"`` or ``"pre"``.
      b1: Decay of the momentum, in [0, 1). None: 0.95 for ``"post"`` (Muon's), 0.9 for
        ``"pre"`` (Adam's).
      b2: :math:`\beta_2`, in [0, 1). None: 0.95 for ``"post"`` (AdaMuon's), 0.999 for
        ``"pre"`` (Adam's).
      eps: :math:`\epsilon`, positive.
      nesterov: Whether the momentum of ``"post"`` looks ahead; ``"pre"`` is Adam, which
        does not.
      rms: :math:`\rho`, the RMS of the entries of each matrix's update before the
        learning rate; None leaves its size as it comes.
      weight_decay: :math:`\lambda`, not negative, decoupled, on the hidden matrices.
      routing: See `muon`.
      auxiliary: See `muon`.
      auxiliary_learning_rate: See `muon`.

    Returns:
      An optimizer. Its state is two float32 arrays a hidden matrix.

    Raises:
      TypeError: At construction, for a traced ``ns_steps``.
      ValueError: As `muon`.

    References:
      Wei, 2026, "Hopper: the optimizer that learns parallelism 2x faster than Adam"
      (article). Si et al., 2025, `arXiv:2507.11005
      <https://arxiv.org/abs/2507.11005>`_.
    """
    _check.static_int("ns_steps", ns_steps, 0)
    _check.one_of("variance", variance, ("post", "pre"))
    post = variance == "post"
    b1 = (0.95 if post else 0.9) if b1 is None else b1
    b2 = (0.95 if post else 0.999) if b2 is None else b2
    _check.in_range("b1", b1, 0.0, 1.0)
    _routed.check_second_moment(b2, eps)

    def orthogonalized(layout: _layout.Layout) -> optax.GradientTransformation:
        if ns_steps == 0:
            return optax.identity()
        return _transforms.orthogonalize_newton_schulz(
            ns_steps, layout=layout, placement=placement
        )

    def direction(layout: _layout.Layout) -> optax.GradientTransformation:
        if post:
            return optax.chain(
                _transforms.ema_momentum(b1, nesterov=nesterov),
                orthogonalized(layout),
                _transforms.scale_by_variance(b2, eps=eps),
            )
        return optax.chain(_routed.adam_direction(b1, b2, eps), orthogonalized(layout))

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            direction(layout), _step(learning_rate, rms, weight_decay, layout)
        )

    return _routed.routed(
        matrix,
        learning_rate=learning_rate,
        routing=routing,
        auxiliary=auxiliary,
        auxiliary_learning_rate=auxiliary_learning_rate,
    )


def adamuon(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    momentum: ArrayLike = 0.95,
    nesterov: bool = True,
    orthogonalize: str | _linalg.PolarMethod = "newton_schulz",
    placement: _placement.Placement | None = None,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    rms: ArrayLike = 0.2,
    weight_decay: ArrayLike = 0.0,
    routing: _routing.Routing = None,
    auxiliary: _routed.Auxiliary = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaMuon: the sign of momentum, orthogonalized, with Adam's second moment.

    With :math:`U` the momentum of `muon`, :math:`\beta_2` = ``b2``,
    :math:`\rho` = ``rms`` and an :math:`m \times n` matrix,

    .. math::
      O = \operatorname{NS}_5(\operatorname{sign} U), \quad
      V \leftarrow \beta_2 V + (1 - \beta_2) O^2, \quad
      D = O / (\sqrt V + \epsilon), \quad
      W \leftarrow (1 - \eta\lambda) W - \eta \, \rho \sqrt{mn} \; D / \|D\|_F.

    Args:
      learning_rate: :math:`\eta`; with ``rms=0.2`` those of AdamW fit.
      momentum: See `muon`.
      nesterov: See `muon`.
      orthogonalize: See `muon`.
      placement: See `muon`.
      b2: :math:`\beta_2`, in [0, 1).
      eps: :math:`\epsilon`, positive.
      rms: :math:`\rho`, the RMS of the entries of each matrix's update before the
        learning rate.
      weight_decay: :math:`\lambda`, not negative, decoupled, on the hidden matrices.
      routing: See `muon`.
      auxiliary: See `muon`.
      auxiliary_learning_rate: See `muon`.

    Returns:
      An optimizer. Its state is two float32 arrays a hidden matrix.

    Raises:
      ValueError: As `muon`.

    References:
      Si et al., 2025, `arXiv:2507.11005 <https://arxiv.org/abs/2507.11005>`_. No bias
      correction of :math:`V`, as in the paper: with the RMS matched it would act
      through :math:`\epsilon` alone.
    """

    _routed.check_second_moment(b2, eps)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            _routed.momentum_average(momentum, nesterov=nesterov),
            optax.scale_by_sign(),
            _routed.orthogonalized(orthogonalize, layout, placement),
            _transforms.scale_by_variance(b2, eps=eps, debias=False),
            _step(learning_rate, rms, weight_decay, layout),
        )

    return _routed.routed(
        matrix,
        learning_rate=learning_rate,
        routing=routing,
        auxiliary=auxiliary,
        auxiliary_learning_rate=auxiliary_learning_rate,
    )


def _step(
    learning_rate: optax.ScalarOrSchedule,
    rms: ArrayLike | None,
    weight_decay: ArrayLike,
    layout: _layout.Layout,
) -> optax.GradientTransformation:
    return optax.chain(
        _routed.rms_matched(rms, layout),
        _routed.decayed(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
