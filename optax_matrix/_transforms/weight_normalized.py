"""Trains the direction and the norm of the weights of each output separately."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from optax_matrix import _check, _layout
from optax_matrix._transforms import _numerics

View = _layout.MatrixView
# The least norm of an output; an output that is zero is taken for one of this norm.
TINY = 1e-12


class WeightNormalizedState(NamedTuple):
    """State of `weight_normalized`."""

    # ‖v‖ with the sign of g, float32: like a leaf, but input axes have size 1.
    length: Any
    direction: optax.OptState
    magnitude: optax.OptState


def weight_normalized(
    direction: optax.GradientTransformation,
    magnitude: optax.GradientTransformation,
    *,
    layout: _layout.Layout = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes :math:`W = g v / \|v\|` of each output, for ordinary parameters.

    For the weights :math:`w` of one output with gradient :math:`d` and the unit vector
    :math:`u = w / g`, the gradients of weight normalization are

    .. math::
      d_g = \langle d, u \rangle, \qquad
      d_v = \frac{g}{\|v\|} \left( d - d_g u \right).

    ``direction`` and ``magnitude`` turn them into steps, including learning rates and
    signs, and

    .. math::
      v \leftarrow v + \Delta v, \qquad
      g \leftarrow g + \Delta g, \qquad
      w \leftarrow g v / \|v\|.

    At first :math:`v = w`. Its norm is never reset. Gradients are orthogonal to
    :math:`v`, so its norm tends to grow, and steps of a given size turn it less.

    Args:
      direction: An optimizer of :math:`V`, the directions of all outputs, which it gets
        as ``params``. They have the shapes of the parameters and, like all that both
        optimizers get, are float32 (float64 for float64).
      magnitude: An optimizer of :math:`g`, with the shapes of the parameters but input
        axes of size 1, or one entry per input block of a fused leaf.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs).

    Returns:
      A transformation that needs ``params`` and returns the step of :math:`W`. The
      state is one number per output, and those of the two optimizers. The size of
      :math:`g` is read from the parameters, so that stages after this one may change
      the step, as weight decay does. An output that is zero has
      :math:`g = \|v\| = 10^{-12}`: the first step gives it a direction of that norm,
      and ``magnitude`` its size from then on.

    Raises:
      ValueError: At ``init``, if a leaf does not fit ``layout``, with its path; in
        ``update`` without ``params``.
      TypeError: At construction, if either is not a transformation; at ``init``, for
        leaves that are not real floating, with their paths.

    Precision:
      The step is rounded to the dtype of the updates: in bfloat16, turns and changes of
      the norm by less than a few thousandths are lost.

    References:
      Salimans and Kingma, 2016, `arXiv:1602.07868 <https://arxiv.org/abs/1602.07868>`_;
      Lion et al., 2026, Muown, `arXiv:2605.10797 <https://arxiv.org/abs/2605.10797>`_.
    """
    _check.transformation("direction", direction)
    _check.transformation("magnitude", magnitude)
    ways = optax.with_extra_args_support(direction)
    sizes = optax.with_extra_args_support(magnitude)

    def lengths(tree: Any) -> Any:
        def length(view: View, x: Array) -> Array:
            norm = _numerics.output_norms(view, _numerics.wide(x))
            return jnp.maximum(norm, TINY)

        return _layout.tree_map(length, layout, tree, keep_boxes=False)

    def init(params: optax.Params) -> WeightNormalizedState:
        norms, v = lengths(params), jax.tree.map(_numerics.wide, params)
        return WeightNormalizedState(norms, ways.init(v), sizes.init(norms))

    def update(updates, state, params=None, **extra_args):
        _check.params_given(params, "weight_normalized")
        norms = lengths(params)
        g = jax.tree.map(jnp.copysign, norms, state.length)

        def stretch(view: View, w: Array, norm: Array, length: Array) -> Array:
            return _numerics.wide(w) * view.expand(length / norm)

        def along(view: View, d: Array, w: Array, g: Array) -> Array:
            u = _numerics.wide(w) / view.expand(g)
            return view.sum(d.astype(u.dtype) * u, outputs=False)

        def across(
            view: View, d: Array, w: Array, g: Array, d_g: Array, length: Array
        ) -> Array:
            u = _numerics.wide(w) / view.expand(g)
            rest = d.astype(u.dtype) - view.expand(d_g) * u
            return rest * view.expand(g / jnp.abs(length))

        def compose(
            view: View, d: Array, w: Array, v: Array, g: Array, length: Array
        ) -> Array:
            end = v * view.expand(g / length)
            return (end - w.astype(end.dtype)).astype(d.dtype)

        v = _layout.tree_map(stretch, layout, params, norms, state.length)
        d_g = _layout.tree_map(along, layout, updates, params, g, keep_boxes=False)
        d_v = _layout.tree_map(across, layout, updates, params, g, d_g, state.length)
        v_step, direction_state = ways.update(d_v, state.direction, v, **extra_args)
        g_step, magnitude_state = sizes.update(d_g, state.magnitude, g, **extra_args)
        v, g = optax.apply_updates(v, v_step), optax.apply_updates(g, g_step)
        norms = lengths(v)
        step = _layout.tree_map(compose, layout, updates, params, v, g, norms)
        length = jax.tree.map(jnp.copysign, norms, g)
        return step, WeightNormalizedState(length, direction_state, magnitude_state)

    return optax.GradientTransformationExtraArgs(init, update)
