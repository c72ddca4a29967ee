"""MuonH and AdamH: steps of a given relative length on spheres."""

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _layout, _linalg, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed


@_routed.documented("0.15")
def muonh(
    learning_rate: optax.ScalarOrSchedule = 0.018,
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    orthogonalize: str | _linalg.PolarMethod | None = "newton_schulz",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    routing: _routing.Routing = None,
    placement: _placement.Placement | None = None,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""MuonH: Muon on the sphere of each hidden matrix's initial norm.

    With :math:`\eta` = ``learning_rate``, :math:`U` the momentum of `muon`,
    :math:`O = \operatorname{NS}_5(U)` and :math:`R = \|W_0\|_F` of each matrix,

    .. math::
      S = (1 - \eta\lambda) W - \eta R \, O / \|O\|_F, \qquad
      W \leftarrow R \, S / \|S\|_F.

    Matrices must not be zero at ``init``. On a sphere weight decay only lengthens the
    steps, to about :math:`\eta / (1 - \eta\lambda)`.

    Args:
      learning_rate: :math:`\eta`, not negative: the length of a step relative to the
        norm of the matrix, which is another unit than that of `muon`; or a schedule.
      momentum: See `muon`.
      nesterov: See `muon`.
      orthogonalize: See `muon`.
      <common arguments>

    Returns:
      An optimizer that needs ``params``. The state is one array and one radius
      per hidden matrix, and that of the auxiliary optimizer, whose leaves are not kept
      on spheres.

    Raises:
      ValueError: As `muon`, and at ``init`` for a zero matrix, with its path.
      TypeError: As `muon`.

    References:
      Wen et al., 2026, Hyperball, `arXiv:2606.16899
      <https://arxiv.org/abs/2606.16899>`_.
    """
    _routed.check(learning_rate, weight_decay, orthogonalize)
    _routed.check_pieces(placement)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            _transforms.ema_momentum(momentum, nesterov=nesterov, mu_dtype=mu_dtype),
            _transforms.orthogonalize(
                orthogonalize, layout=layout, placement=placement
            ),
            _transforms.normalize_frobenius("param", layout=layout),
            _routed.decayed(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
            _transforms.hyperball_retract(layout=layout),
        )

    rates = (learning_rate, 0.15, auxiliary_learning_rate)
    return _routed.routed(matrix, routing, auxiliary, *rates)


@_routed.documented("0.15")
def adamh(
    learning_rate: optax.ScalarOrSchedule = 0.018,
    *,
    momentum: optax.ScalarOrSchedule = 0.9,
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
    r"""AdamH: Adam on the sphere of each hidden matrix's initial norm.

    With :math:`U = \hat m / (\sqrt{\hat v} + \epsilon)` of Adam,

    .. math::
      S = (1 - \eta\lambda) W - \eta R \, U / \|U\|_F, \qquad
      W \leftarrow R \, S / \|S\|_F.

    Args:
      learning_rate: :math:`\eta`, the length of a step relative to the norm of the
        matrix, see `muonh`.
      momentum: Decay of the first moment, in [0, 1), or a schedule.
      b2: Decay of the second moment, in [0, 1).
      eps: :math:`\epsilon`, positive, added to the root of the second moment.
      <common arguments>

    Returns:
      An optimizer that needs ``params``. The state is two arrays and one radius
      per hidden matrix, and that of the auxiliary optimizer. No matrix is moved, so
      ``placement`` has no effect.

    Raises:
      ValueError: As `muonh`.
      TypeError: As `muonh`.

    References:
      Wen et al., 2026, Hyperball, `arXiv:2606.16899
      <https://arxiv.org/abs/2606.16899>`_.
    """
    _placement.as_placement(placement)
    _routed.check(learning_rate, weight_decay)
    adam = _routed.adam(momentum, b2, eps, mu_dtype)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            adam,
            _transforms.normalize_frobenius("param", layout=layout),
            _routed.decayed(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
            _transforms.hyperball_retract(layout=layout),
        )

    rates = (learning_rate, 0.15, auxiliary_learning_rate)
    return _routed.routed(matrix, routing, auxiliary, *rates)
