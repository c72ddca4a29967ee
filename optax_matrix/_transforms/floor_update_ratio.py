"""Lengthens updates that are short relative to their parameter."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout
from optax_matrix._transforms import _numerics, _stateless


def floor_update_ratio(
    floor: ArrayLike = 0.35,
    *,
    per: Literal["matrix", "output"] = "matrix",
    layout: _layout.Layout = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales up matrices of an update that are short relative to their parameter.

    With :math:`\rho` = ``floor``, the update-to-weight ratio is kept from falling:

    .. math:: U \leftarrow U \, \max(1, \rho \|W\|_F / \|U\|_F),

    or the same for the weights of each output neuron, with ``per="output"``. Put it
    before the learning rate (0.0375 in the record that introduced it). It takes the
    place of weight decay there: a growing weight takes longer steps instead.

    Args:
      floor: :math:`\rho`, not negative; 0 changes nothing.
      per: What has a ratio of its own: each ``"matrix"``, or each ``"output"`` neuron.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack has its own ratio.

    Returns:
      A transformation without state that needs ``params``. Updates keep their shape and
      dtype. What is zero stays zero.

    Raises:
      ValueError: At construction, if ``floor`` is a negative number, or for another
        ``per``; at ``init``, if a leaf does not fit ``layout``, with its path; in
        ``update`` without ``params``.

    References:
      The update/weight floor of the modded-nanogpt optimization track, `record 9
      <https://github.com/KellerJordan/modded-nanogpt>`_, 2026; per output in record 46.
    """
    _check.number("floor", floor, 0.0)
    _check.one_of("per", per, ("matrix", "output"))

    def norm(view: _layout.MatrixView, x: jax.Array) -> jax.Array:
        if per == "matrix":
            return _numerics.safe_norm(view, x)
        return _numerics.output_norms(view, x)

    def rescale(view: _layout.MatrixView, u: jax.Array, p: jax.Array) -> jax.Array:
        wide = _numerics.wide(u)
        least = _numerics.as_scalar(floor, wide) * norm(view, p.astype(wide.dtype))
        ratio = _numerics.divide_or_zero(least, norm(view, wide))
        return (wide * view.expand(jnp.maximum(1, ratio))).astype(u.dtype)

    return _stateless.per_matrix_and_param(rescale, layout, "floor_update_ratio")
