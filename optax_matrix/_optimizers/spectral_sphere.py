"""The Spectral Sphere Optimizer: Muon within a sphere of the spectral norm."""

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _check, _layout, _linalg, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed


@_routed.documented("0.15")
def spectral_sphere(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    *,
    momentum: optax.ScalarOrSchedule = 0.9,
    nesterov: bool = True,
    orthogonalize: str | _linalg.PolarMethod = _linalg.NewtonSchulz(
        coefficients="polar_express"
    ),
    tangent: bool = True,
    radius: ArrayLike = 1.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    routing: _routing.Routing = None,
    placement: _placement.Placement | None = None,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SSO: keeps each hidden matrix at a given spectral norm, by tangent steps.

    With :math:`\eta` = ``learning_rate``, :math:`c` = ``radius``, :math:`M` the
    momentum of `muon`, :math:`u_1, v_1` the leading singular vectors of :math:`W`, and
    :math:`\operatorname{PE}_8` eight steps of Polar Express,

    .. math::
      R = c \sqrt{out/in}, \quad
      D = \operatorname{PE}_8(M + \lambda u_1 v_1^\top)
        \text{ with } \langle u_1 v_1^\top, D \rangle = 0, \quad
      S = (1 - \eta\lambda') W - \eta R \, D, \quad
      W \leftarrow R \, S / \sigma_1(S),

    where :math:`\lambda'` is ``weight_decay``, which on a sphere only lengthens the
    steps. The first update brings :math:`W` onto the sphere.

    Args:
      learning_rate: :math:`\eta`, not negative: the spectral norm of a step relative to
        that of the matrix; or a schedule.
      momentum: See `muon`.
      nesterov: See `muon`.
      orthogonalize: How to orthogonalize, see `muon`; it must not be None. With
        ``tangent`` it is done 25 times per update.
      tangent: Whether to search for :math:`\lambda`, see `tangent_orthogonalize`. False
        is :math:`\lambda = 0`: MuonSphere, at the cost of `muon`.
      radius: :math:`c`, positive.
      <common arguments>

    Returns:
      An optimizer that needs ``params``. The state is one array per hidden
      matrix and two vectors over its outputs (one without ``tangent``), and that of the
      auxiliary optimizer.

    Raises:
      ValueError: As `muon`.
      TypeError: As `muon`.

    References:
      Controlled LLM Training on Spectral Sphere, 2026, `arXiv:2601.08393
      <https://arxiv.org/abs/2601.08393>`_ and `code
      <https://github.com/Unakar/Spectral-Sphere-Optimizer>`_. Differs: see
      `tangent_orthogonalize` and `spectral_sphere_retract`. The default learning rate
      is that of `muon`.
    """
    _routed.check(learning_rate, weight_decay)
    _linalg.as_method(orthogonalize, "orthogonalize")  # None raises.
    _check.boolean("tangent", tangent)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        stage = (
            _transforms.tangent_orthogonalize if tangent else _transforms.orthogonalize
        )
        return optax.chain(
            _transforms.ema_momentum(momentum, nesterov=nesterov, mu_dtype=mu_dtype),
            stage(orthogonalize, layout=layout, placement=placement),
            _transforms.scale_by_shape("mup", layout=layout),
            _transforms.float32_statistics(optax.scale(radius)),
            _routed.decayed(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
            _transforms.spectral_sphere_retract(radius, layout=layout),
        )

    rates = (learning_rate, 0.15, auxiliary_learning_rate)
    return _routed.routed(matrix, routing, auxiliary, *rates)
