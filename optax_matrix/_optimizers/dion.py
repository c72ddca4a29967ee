"""Dion2: Muon of the largest inputs or outputs, with error feedback."""

from typing import Any

import optax
from jax.typing import DTypeLike

from optax_matrix import _layout, _linalg, _placement, _routing, _transforms
from optax_matrix._optimizers import _routed


@_routed.documented(_routed.FACTOR)
def dion(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    *,
    momentum: optax.ScalarOrSchedule = 0.95,
    orthogonalize: str | _linalg.PolarMethod | None = _linalg.LargestSlices(),
    shape_scale: _transforms.ShapeScale | None = "mup",
    weight_decay: optax.ScalarOrSchedule = 0.01,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    routing: _routing.Routing = None,
    placement: _placement.Placement | None = None,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Dion2: orthogonalizes a quarter of each matrix per update, with error feedback.

    With :math:`\mu` = ``momentum`` and :math:`S` the slices of :math:`M` that have the
    largest sums of absolute values (inputs or outputs, whichever are fewer),

    .. math::
      M \leftarrow M + G, \quad
      O_S = PE_5(M_S), \; O_{\bar S} = 0, \quad
      M_S \leftarrow \mu M_S, \quad
      W \leftarrow (1 - \eta\lambda) W - \eta \sqrt{out/in} \, O.

    Args:
      learning_rate: :math:`\eta`, see `muon`.
      momentum: :math:`\mu`, in [0, 1), or a schedule: the factor applied to the slices
        that were orthogonalized.
      orthogonalize: See `muon`. `LargestSlices` has the fraction, and the method for
        the smaller matrix. Other methods orthogonalize whole matrices.
      shape_scale: The factor of the shape, see `scale_by_shape`; None is 1.
      <common arguments>

    Returns:
      An optimizer. The state is one array per hidden matrix, and that of the
      auxiliary optimizer.

    Raises:
      ValueError: As `muon`.
      TypeError: As `muon`.

    References:
      Ahn et al., 2025, Dion2, `arXiv:2512.16928 <https://arxiv.org/abs/2512.16928>`_
      and `code <https://github.com/microsoft/dion>`_, with its defaults. Differs: see
      `orthogonalize_with_feedback`; the authors multiply in bfloat16.
    """
    _routed.check(learning_rate, weight_decay, orthogonalize)

    def matrix(layout: _layout.Layout) -> optax.GradientTransformation:
        return optax.chain(
            _transforms.orthogonalize_with_feedback(
                orthogonalize,
                momentum,
                mu_dtype=mu_dtype,
                layout=layout,
                placement=placement,
            ),
            _transforms.scale_by_shape(shape_scale, layout=layout),
            _routed.decayed(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )

    rates = (learning_rate, _routed.factor(shape_scale), auxiliary_learning_rate)
    return _routed.routed(matrix, routing, auxiliary, *rates)
