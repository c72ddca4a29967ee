"""Hopper and AdaMuon: orthogonalization together with Adam's second moment."""

from typing import Any, Literal

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _check, _layout, _linalg, _placement, _routing, _transforms
from optax_matrix._linalg import NewtonSchulz
from optax_matrix._optimizers import _routed


@_routed.documented("1")
def hopper(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    momentum: optax.ScalarOrSchedule | None = None,
    nesterov: bool = True,
    orthogonalize: str | _linalg.PolarMethod | None = NewtonSchulz(1),
    variance: Literal["post", "pre"] = "post",
    b2: ArrayLike | None = None,
    eps: ArrayLike = 1e-8,
    rms: ArrayLike | None = 0.2,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    routing: _routing.Routing = None,
    placement: _placement.Placement | None = None,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Hopper: a single Newton-Schulz step and variance normalization.

    With :math:`\operatorname{NS}_k` = ``orthogonalize``, one Newton-Schulz step by
    default, and :math:`U` the momentum of `muon`, ``variance="post"`` takes the second
    moment of the orthogonalized update,

    .. math::
      O = \operatorname{NS}_k(U), \quad V \leftarrow \beta_2 V + (1 - \beta_2) O^2,
      \quad D = O / (\sqrt{\hat V} + \epsilon),

    and ``"pre"`` orthogonalizes Adam's update,
    :math:`D = \operatorname{NS}_k(\hat m / (\sqrt{\hat v} + \epsilon))`. Then

    .. math::
      W \leftarrow (1 - \eta\lambda) W - \eta \, \rho \sqrt{mn} \; D / \|D\|_F.

    What was published of Hopper is "variance and ``ns_steps=1``"; the betas, the scale
    and the order were not, so this is an interpretation with both orders. ``"post"``
    with `NewtonSchulz` of five steps is `adamuon` without its sign; ``"pre"`` with
    ``orthogonalize=None`` and ``rms=None`` is `optax.adam`. One Newton-Schulz step
    returns a norm near 3.4 for every size of matrix, five steps return one that grows
    with the root of the smaller side. Matching the RMS removes this difference; without
    it, a comparison over the number of steps compares step sizes. In reinforcement
    learning of word problems by a small model, with tuned learning rates, one step and
    five could not be told apart, and Hopper was as fast as Adam (docs/hopper.md).

    Args:
      learning_rate: :math:`\eta`, not negative, or a schedule; with ``rms=0.2``,
        AdamW's learning rates fit.
      momentum: Decay of the momentum, in [0, 1), or a schedule. None: 0.95 for
        ``"post"`` (Muon's), 0.9 for ``"pre"`` (Adam's).
      nesterov: Whether the momentum of ``"post"`` looks ahead; ``"pre"`` uses Adam's,
        which does not.
      orthogonalize: See `muon`; ``NewtonSchulz(k)`` for k steps, None for none.
      variance: The order, ``"post"`` or ``"pre"``.
      b2: :math:`\beta_2`, in [0, 1). None: 0.95 for ``"post"`` (AdaMuon's), 0.999 for
        ``"pre"`` (Adam's).
      eps: :math:`\epsilon`, positive.
      rms: :math:`\rho`, positive: the RMS of the entries of each matrix's update before
        the learning rate. None disables RMS matching.
      <common arguments>

    Returns:
      An optimizer. The state is two arrays per hidden matrix, and that of the
      auxiliary optimizer.

    Raises:
      ValueError: As `muon`.
      TypeError: As `muon`.

    References:
      Wei, 2026, "Hopper: the optimizer that learns parallelism 2x faster than Adam"
      (article). Si et al., 2025, `arXiv:2507.11005
      <https://arxiv.org/abs/2507.11005>`_.
    """
    _check.one_of("variance", variance, ("post", "pre"))
    if variance == "post":
        momentum = 0.95 if momentum is None else momentum
        b2 = 0.95 if b2 is None else b2
    else:
        momentum = 0.9 if momentum is None else momentum
        b2 = 0.999 if b2 is None else b2
    _routed.check(learning_rate, weight_decay, orthogonalize)
    _routed.check_pieces(placement)

    def direction(layout: _layout.Layout) -> optax.GradientTransformation:
        polar = _transforms.orthogonalize(
            orthogonalize, layout=layout, placement=placement
        )
        if variance == "pre":
            return optax.chain(_routed.adam(momentum, b2, eps, mu_dtype), polar)
        return optax.chain(
            _transforms.ema_momentum(momentum, nesterov=nesterov, mu_dtype=mu_dtype),
            polar,
            _transforms.scale_by_variance(
                b2, eps=eps, nu_dtype=_routed.nu_dtype(mu_dtype)
            ),
        )

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            direction(layout),
            _transforms.match_rms(rms, layout=layout),
            _routed.decayed(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )

    rates = (learning_rate, 1.0, auxiliary_learning_rate)
    return _routed.routed(matrix, routing, auxiliary, *rates)


@_routed.documented("1")
def adamuon(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    orthogonalize: str | _linalg.PolarMethod | None = "newton_schulz",
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    rms: ArrayLike | None = 0.2,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    routing: _routing.Routing = None,
    placement: _placement.Placement | None = None,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaMuon: the orthogonalized sign of momentum with Adam's second moment.

    With :math:`U` the momentum of `muon`, :math:`\beta_2` = ``b2``,
    :math:`\rho` = ``rms`` and an :math:`m \times n` matrix,

    .. math::
      O = \operatorname{NS}_5(\operatorname{sign} U), \quad
      V \leftarrow \beta_2 V + (1 - \beta_2) O^2, \quad
      D = O / (\sqrt V + \epsilon), \quad
      W \leftarrow (1 - \eta\lambda) W - \eta \, \rho \sqrt{mn} \; D / \|D\|_F.

    Args:
      learning_rate: :math:`\eta`, not negative, or a schedule; with ``rms=0.2``,
        AdamW's learning rates fit.
      momentum: See `muon`.
      nesterov: See `muon`.
      orthogonalize: See `muon`.
      b2: :math:`\beta_2`, in [0, 1).
      eps: :math:`\epsilon`, positive.
      rms: :math:`\rho`, positive: the RMS of the entries of each matrix's update before
        the learning rate. None disables RMS matching.
      <common arguments>

    Returns:
      An optimizer. The state is two arrays per hidden matrix, and that of the
      auxiliary optimizer.

    Raises:
      ValueError: As `muon`.
      TypeError: As `muon`.

    References:
      Si et al., 2025, `arXiv:2507.11005 <https://arxiv.org/abs/2507.11005>`_. There is
      no bias correction of :math:`V`, as in the paper: with the RMS matched it would
      act through :math:`\epsilon` alone.
    """
    _routed.check(learning_rate, weight_decay, orthogonalize)
    _routed.check_pieces(placement)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            _transforms.ema_momentum(momentum, nesterov=nesterov, mu_dtype=mu_dtype),
            _transforms.scale_by_sign(),
            _transforms.orthogonalize(
                orthogonalize, layout=layout, placement=placement
            ),
            _transforms.scale_by_variance(
                b2, eps=eps, debias=False, nu_dtype=_routed.nu_dtype(mu_dtype)
            ),
            _transforms.match_rms(rms, layout=layout),
            _routed.decayed(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )

    rates = (learning_rate, 1.0, auxiliary_learning_rate)
    return _routed.routed(matrix, routing, auxiliary, *rates)
