"""Shampoo and Distributed Shampoo: roots of two statistics per matrix, grafted."""

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _check, _layout, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed
from optax_matrix._presets import preset
from optax_matrix._transforms import Shampoo, _arguments


@_routed.documented("1")
def shampoo(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    *,
    momentum: optax.ScalarOrSchedule | None = 0.9,
    b2: ArrayLike | None = 0.95,
    damping: ArrayLike = 1e-6,
    start: ArrayLike = 0,
    refresh: ArrayLike = 10,
    graft: str | optax.GradientTransformation | None = "adam",
    preconditioner: Shampoo = Shampoo(),
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    routing: _routing.Routing = None,
    placement: _placement.Placement | None = None,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shampoo: preconditions both sides of each hidden matrix, grafted to Adam's norm.

    With :math:`\hat M, \hat L, \hat R` of `shampoo_precondition` and :math:`A` the
    update of the grafted transformation,

    .. math::
      D = \hat L_\epsilon^{-1/4} \hat M \hat R_\epsilon^{-1/4}, \quad
      W \leftarrow (1 - \eta\lambda) W - \eta \|A\| \, D / \|D\|.

    Args:
      learning_rate: :math:`\eta`, not negative, or a schedule, in the units of the
        grafted transformation.
      momentum: :math:`\beta_1` of :math:`M`, in [0, 1), or a schedule; None disables
        momentum.
      b2: :math:`\beta_2` of :math:`L` and :math:`R`, in [0, 1); None for sums.
      damping: :math:`\epsilon`, relative to the largest eigenvalue.
      start: The first update, counted from 0, that is preconditioned.
      refresh: Number of updates from one computation of the roots to the next.
      graft: Whose norm each matrix's update takes. ``"adam"`` is Adam with ``momentum``
        (0.9 for None) and 0.95; ``"sgd"`` is the bias-corrected momentum, as in
        Distributed Shampoo. ``"rmsprop"`` (0.95) and ``"adagrad"`` divide the gradient,
        where Distributed Shampoo divides the momentum, so that steps can differ by a
        factor of 2 to 4. Or any transformation, or None for Shampoo's own norm.
      preconditioner: All other settings, see `Shampoo`. With its ``block_size`` the
        norm of each block is grafted.
      <common arguments>

    Returns:
      An optimizer. The state is that of `shampoo_precondition`, of ``graft``, and of
      the auxiliary optimizer.

    Raises:
      ValueError: As `shampoo_precondition` and `muon`.
      TypeError: As `shampoo_precondition` and `muon`.

    References:
      Gupta, Koren and Singer, 2018, `arXiv:1802.09568
      <https://arxiv.org/abs/1802.09568>`_; Anil et al., 2020, `arXiv:2002.09018
      <https://arxiv.org/abs/2002.09018>`_.
    """
    _routed.check(learning_rate, weight_decay)
    mu_dtype = _arguments.mu_dtype(mu_dtype)
    magnitude = _magnitude(graft, momentum, mu_dtype)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        direction = _transforms.shampoo_precondition(
            momentum,
            b2,
            damping=damping,
            start=start,
            refresh=refresh,
            preconditioner=preconditioner,
            mu_dtype=mu_dtype,
            layout=layout,
            placement=placement,
        )
        if magnitude is not None:
            block_size = preconditioner.block_size
            direction = _transforms.graft_to(
                magnitude, direction, block_size=block_size, layout=layout
            )
        return optax.chain(
            direction,
            _routed.decayed(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )

    rates = (learning_rate, 1.0, auxiliary_learning_rate)
    return _routed.routed(matrix, routing, auxiliary, *rates)


@preset(shampoo, preconditioner=Shampoo(stagger=True, block_size=1024))
def distributed_shampoo() -> None:
    r"""Distributed Shampoo: `shampoo` on blocks of 1024, with staggered roots.

    ``shampoo(preconditioner=Shampoo(stagger=True, block_size=1024))``. Blocks keep the
    roots cheap, and each has an owner of its own, like a matrix.

    Args:
      learning_rate: As every other argument, see `shampoo`.

    Returns:
      An optimizer, as `shampoo`.

    Raises:
      ValueError: As `shampoo`.
      TypeError: As `shampoo`.

    References:
      Shi et al., 2023, `arXiv:2309.06497 <https://arxiv.org/abs/2309.06497>`_. Differs:
      damping is relative, averages instead of sums by default, refreshed less often.
    """


def _magnitude(
    graft: Any, momentum: Any, mu_dtype: Any
) -> optax.GradientTransformation | None:
    """Returns the transformation that `graft` names, with statistics in float32."""
    if graft is None or isinstance(graft, optax.GradientTransformation):
        return graft
    _check.one_of("graft", graft, ("adam", "rmsprop", "adagrad", "sgd"))
    if graft == "adam":
        b1 = 0.9 if momentum is None else momentum
        return _routed.adam(b1, 0.95, 1e-8, mu_dtype)
    if graft == "rmsprop":
        inner = optax.scale_by_rms(decay=0.95)
    elif graft == "adagrad":
        inner = optax.scale_by_rss()
    elif momentum is None:
        inner = optax.identity()
    else:
        return _transforms.ema_momentum(
            momentum, nesterov=False, debias=True, mu_dtype=mu_dtype
        )
    return _transforms.float32_statistics(inner)
