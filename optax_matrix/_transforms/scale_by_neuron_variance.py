"""Divides each output neuron's update by its running RMS, keeping the matrix norm."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout
from optax_matrix._transforms import _numerics


class ScaleByNeuronVarianceState(NamedTuple):
    """State of `scale_by_neuron_variance`."""

    count: jax.Array  # int32, updates seen so far
    variance: Any  # v, float32, with the rank of a leaf and input axes of size 1


def scale_by_neuron_variance(
    b2: ArrayLike = 0.95,
    *,
    eps: ArrayLike = 1e-10,
    layout: _layout.Layout = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides each output neuron by a running RMS, keeping the matrix norm (NorMuon).

    For one matrix of the update :math:`O`, with :math:`\beta` = ``b2``,
    :math:`v_0 = 0` and the mean over the inputs of each output neuron,

    .. math::
      v_t = \beta v_{t-1} + (1 - \beta) \operatorname{mean}_{in}(O_t^2), \quad
      \hat O = O_t / (\sqrt{v_t} + \epsilon), \quad
      O_t \leftarrow \hat O \, \|O_t\|_F / \|\hat O\|_F.

    The norm of each matrix is restored, so no bias correction is needed.

    Args:
      b2: :math:`\beta`, in [0, 1).
      eps: :math:`\epsilon`, positive, in the unit of the update.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs).

    Returns:
      A transformation for leaves with at least two axes. Updates keep their shape,
      dtype and Frobenius norm per matrix. Zero matrices stay zero. The state is one
      float32 per neuron.

    Raises:
      ValueError: At construction, for numbers outside these ranges; at ``init``, if a
        leaf does not fit ``layout``, with its path.
      TypeError: At construction, for arguments of another type; at ``init``, for leaves
        that are not real floating, with their paths.

    Precision:
      Squares are averaged in float32: entries below 1e-19 or above 1e19 are lost.

    References:
      Li et al., 2025, NorMuon, `arXiv:2510.05491 <https://arxiv.org/abs/2510.05491>`_.
    """
    _check.number("b2", b2, 0.0, 1.0)
    _check.number("eps", eps, 0.0, low_open=True)

    def init(params: optax.Params) -> ScaleByNeuronVarianceState:
        def zeros(view: _layout.MatrixView, p: jax.Array) -> jax.Array:
            like = jnp.zeros_like(p, dtype=_numerics.wide_dtype(p))
            return view.sum(like, outputs=False)

        variance = _layout.tree_map(zeros, layout, params, keep_boxes=False)
        return ScaleByNeuronVarianceState(jnp.zeros((), jnp.int32), variance)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args

        def average(view: _layout.MatrixView, o: jax.Array, v: jax.Array) -> jax.Array:
            o = _numerics.wide(o)
            squares = view.sum(jnp.square(o), outputs=False)
            mean = squares / np.maximum(view.size(outputs=False), 1)
            return _numerics.moving_average(v, mean.astype(v.dtype), b2)

        def rescale(view: _layout.MatrixView, o: jax.Array, v: jax.Array) -> jax.Array:
            wide = _numerics.wide(o)
            rms = jnp.sqrt(v) + _numerics.as_scalar(eps, v)
            evened = wide / view.expand(rms)
            restore = _numerics.divide_or_zero(
                _numerics.norm(view, wide), _numerics.norm(view, evened)
            )
            return (evened * view.expand(restore)).astype(o.dtype)

        variance = _layout.tree_map(
            average, layout, updates, state.variance, keep_boxes=False
        )
        scaled = _layout.tree_map(rescale, layout, updates, variance)
        count = _numerics.next_count(state.count)
        return scaled, ScaleByNeuronVarianceState(count, variance)

    return optax.GradientTransformationExtraArgs(init, update)
