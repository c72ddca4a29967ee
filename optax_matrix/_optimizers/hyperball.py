"""MuonH and AdamH: steps of a given relative length on spheres."""

import optax
from jax.typing import ArrayLike

from optax_matrix import _layout, _linalg, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed


def muonh(
    learning_rate: optax.ScalarOrSchedule = 0.018,
    *,
    momentum: ArrayLike = 0.95,
    nesterov: bool = True,
    orthogonalize: str | _linalg.PolarMethod = "newton_schulz",
    placement: _placement.Placement | None = None,
    routing: _routing.Routing = None,
    auxiliary: _routed.Auxiliary = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon on the hyperball: every hidden matrix keeps the norm it started with.

    With :math:`\eta` = ``learning_rate``, :math:`U` the momentum of `muon`,
    :math:`O = \operatorname{NS}_5(U)` and :math:`R = \|W_0\|_F` of each matrix,

    .. math::
      S = W - \eta R \, O / \|O\|_F, \qquad W \leftarrow R \, S / \|S\|_F.

    Matrices must not start at zero. There is neither weight decay nor a scale of the
    shape: the sphere takes the place of both.

    Args:
      learning_rate: :math:`\eta`, the length of a step relative to the matrix, not in
        the units of `muon`; a schedule is a function of the step.
      momentum: See `muon`.
      nesterov: See `muon`.
      orthogonalize: See `muon`.
      placement: See `muon`.
      routing: See `muon`.
      auxiliary: See `muon`; the other leaves are not kept on spheres.
      auxiliary_learning_rate: See `muon`.

    Returns:
      An optimizer that needs ``params``. Its state is one float32 array and one radius
      a hidden matrix.

    Raises:
      ValueError: As `muon`, and at ``init`` for a zero matrix, with its path.

    References:
      Wen et al., 2026, Hyperball, `arXiv:2606.16899
      <https://arxiv.org/abs/2606.16899>`_.
    """

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            _routed.momentum_average(momentum, nesterov=nesterov),
            _routed.orthogonalized(orthogonalize, layout, placement),
            _on_sphere(learning_rate, layout),
        )

    return _routed.routed(
        matrix,
        learning_rate=learning_rate,
        routing=routing,
        auxiliary=auxiliary,
        auxiliary_learning_rate=auxiliary_learning_rate,
    )


def adamh(
    learning_rate: optax.ScalarOrSchedule = 0.018,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    routing: _routing.Routing = None,
    auxiliary: _routed.Auxiliary = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam on the hyperball: `muonh` with Adam's direction.

    With :math:`U = \hat m / (\sqrt{\hat v} + \epsilon)` of Adam in place of :math:`O`,

    .. math::
      S = W - \eta R \, U / \|U\|_F, \qquad W \leftarrow R \, S / \|S\|_F.

    Args:
      learning_rate: :math:`\eta`, the length of a step relative to the matrix.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root of the second moment, positive.
      routing: See `muon`.
      auxiliary: See `muon`; the other leaves are not kept on spheres.
      auxiliary_learning_rate: See `muon`.

    Returns:
      An optimizer that needs ``params``. Its state is two float32 arrays and one
      radius a hidden matrix.

    Raises:
      ValueError: As `muonh`.

    References:
      Wen et al., 2026, Hyperball, `arXiv:2606.16899
      <https://arxiv.org/abs/2606.16899>`_.
    """

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            _routed.adam_direction(b1, b2, eps),
            _on_sphere(learning_rate, layout),
        )

    return _routed.routed(
        matrix,
        learning_rate=learning_rate,
        routing=routing,
        auxiliary=auxiliary,
        auxiliary_learning_rate=auxiliary_learning_rate,
    )


def _on_sphere(
    learning_rate: optax.ScalarOrSchedule, layout: _layout.Layout
) -> optax.GradientTransformation:
    return optax.chain(
        _transforms.normalize_frobenius("param", layout=layout),
        optax.scale_by_learning_rate(learning_rate),
        _transforms.hyperball_retract(layout=layout),
    )
