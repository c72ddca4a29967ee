"""The chain of record 46 of modded-nanogpt's optimization track (track 3)."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _layout, _linalg, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed
from optax_matrix._transforms import SOAP, _arguments


@_routed.documented("0.15")
def track3(
    learning_rate: optax.ScalarOrSchedule = 0.0375,
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    decays: Sequence[optax.ScalarOrSchedule] | None = None,
    weights: Sequence[optax.ScalarOrSchedule] | None = None,
    b2: ArrayLike = 0.9,
    refresh: ArrayLike = 1,
    preconditioner: SOAP = SOAP(),
    orthogonalize: str | _linalg.PolarMethod | None = _linalg.NewtonSchulz(
        12, coefficients="track3", normalization="schatten4"
    ),
    outward: ArrayLike = 0.5,
    floor: ArrayLike = 0.3825,
    weight_decay: optax.ScalarOrSchedule = 0.025,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    routing: _routing.Routing = None,
    placement: _placement.Placement | None = None,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The chain of modded-nanogpt's track-3 record 46: whitened, floored, retracted.

    With :math:`D` of `whiten_momentum`, :math:`B` of `radial_brake`, :math:`F` of
    `floor_update_ratio` per output, and :math:`\mathcal{R}_W` of `radial_retract`,
    which includes cautious weight decay by :math:`\eta\lambda`,

    .. math::
      O = \sqrt{\max(1, out/in)} \operatorname{NS}_{12}(D), \qquad
      W \leftarrow W + \mathcal{R}_W(-\eta \, F(B(O))).

    The record's ``momentum`` rises from 0.85 to 0.95 in 300 steps, and falls back in
    the last 200 of 2,900; docs/record.md has its schedules and the wrappers around the
    chain, `ema_lookahead` and `tail_average`.

    Args:
      learning_rate: :math:`\eta`, see `muon`.
      momentum: :math:`\beta_1`, in [0, 1), or a schedule.
      decays: The decays of several averages in place of one, see `whiten_momentum`.
      weights: The weights of these averages, see `whiten_momentum`.
      b2: :math:`\beta_2` of the second moment and of the statistics, in [0, 1).
      refresh: Number of updates from one power step of the bases to the next.
      preconditioner: All other settings of `whiten_momentum`, see `SOAP`.
      orthogonalize: See `muon`.
      outward: The factor of what lengthens a matrix, see `radial_brake`.
      floor: The least update-to-weight ratio of an output, see `floor_update_ratio`.
      <common arguments>

    Returns:
      An optimizer that needs ``params``. The state is that of `whiten_momentum` and of
      the auxiliary optimizer.

    Raises:
      ValueError: As `soap_precondition` and `muon`.
      TypeError: As `soap_precondition` and `muon`.

    References:
      https://github.com/KellerJordan/modded-nanogpt, records/track_3_optimization,
      record 46 of 2026-06-19, by its released script. Left out: the gate between
      momentum and whitened momentum in attention outputs, and products in bfloat16. A
      matrix that starts at zero takes a full first step, and one of length 1e-8 there.
    """
    _routed.check(learning_rate, weight_decay, orthogonalize)
    _arguments.mask("weight_decay_mask", weight_decay_mask)
    decay = _routed.product(learning_rate, weight_decay)

    def retract(layout: _layout.Layout) -> optax.GradientTransformation:
        decaying = _transforms.radial_retract(decay, layout=layout)
        if weight_decay_mask is None:
            return decaying

        def others(tree: Any) -> Any:
            mask = weight_decay_mask
            mask = mask(tree) if callable(mask) else mask
            return jax.tree.map(operator.not_, mask)

        return optax.chain(
            optax.masked(decaying, weight_decay_mask),
            optax.masked(_transforms.radial_retract(layout=layout), others),
        )

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            _transforms.whiten_momentum(
                momentum,
                b2,
                decays=decays,
                weights=weights,
                refresh=refresh,
                preconditioner=preconditioner,
                mu_dtype=mu_dtype,
                layout=layout,
                placement=placement,
            ),
            _transforms.orthogonalize(
                orthogonalize, layout=layout, placement=placement
            ),
            _transforms.scale_by_shape("spectral", layout=layout),
            _transforms.radial_brake(outward, layout=layout),
            _transforms.floor_update_ratio(floor, per="output", layout=layout),
            optax.scale_by_learning_rate(learning_rate),
            retract(layout),
        )

    rates = (learning_rate, 0.15, auxiliary_learning_rate)
    return _routed.routed(matrix, routing, auxiliary, *rates)
