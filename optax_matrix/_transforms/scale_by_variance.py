"""Divides each entry by a running root mean square of the incoming updates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout
from optax_matrix._transforms import _arguments, _numerics


class ScaleByVarianceState(NamedTuple):
    """State of `scale_by_variance`."""

    count: jax.Array  # int32, updates seen so far
    variance: Any  # V, with the shape of a leaf, float32


def scale_by_variance(
    b2: ArrayLike = 0.95,
    *,
    eps: ArrayLike = 1e-8,
    debias: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides each entry by the running RMS of that entry of the incoming updates.

    With :math:`\beta` = ``b2``, :math:`V_0 = 0` and all operations elementwise,

    .. math::
      V_t = \beta V_{t-1} + (1 - \beta) U_t^2, \qquad
      U_t \leftarrow U_t / (\sqrt{V_t / (1 - \beta^t)} + \epsilon).

    Adam's second moment, but of the incoming updates: after an orthogonalization it is
    AdaMuon's and Hopper's variance, before one it is that of Muon with a second
    moment. (Adam itself divides the first moment by the variance of the gradient:
    that is `optax.scale_by_adam`. With raw gradients this is
    ``optax.scale_by_rms(bias_correction=True)``, whose state follows the dtype of the
    parameters.)

    Args:
      b2: :math:`\beta`, in [0, 1).
      eps: :math:`\epsilon`, positive, in the unit of the update, outside the root.
      debias: Whether to divide by :math:`1 - \beta^t`. AdaMuon's paper does not.

    Returns:
      A transformation for leaves of any shape. Updates keep their shape and dtype and
      have entries of size about 1; the state is one float32 array per leaf (float64 for
      float64 leaves).

    Raises:
      ValueError: At construction, for numbers outside these ranges.
      TypeError: At construction, for arguments of another type; at ``init``, for leaves
        that are not real floating, with their paths.

    References:
      Kingma and Ba, 2015, `arXiv:1412.6980 <https://arxiv.org/abs/1412.6980>`_; Si et
      al., 2025, AdaMuon, `arXiv:2507.11005 <https://arxiv.org/abs/2507.11005>`_.
    """
    _arguments.number("b2", b2, 0.0, 1.0)
    _arguments.number("eps", eps, 0.0, low_open=True)
    _check.boolean("debias", debias)

    def init(params: optax.Params) -> ScaleByVarianceState:
        _layout.check_all_floating(params)

        def zeros(p: jax.Array) -> jax.Array:
            return jnp.zeros_like(p, dtype=_numerics.wide_dtype(p))

        return ScaleByVarianceState(
            jnp.zeros((), jnp.int32), jax.tree.map(zeros, params)
        )

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        count = _numerics.next_count(state.count)

        def average(u: jax.Array, v: jax.Array) -> jax.Array:
            return _numerics.moving_average(v, jnp.square(_numerics.wide(u)), b2)

        def rescale(u: jax.Array, v: jax.Array) -> jax.Array:
            if debias:
                v = v / _numerics.bias_correction(b2, count, v)
            rms = jnp.sqrt(v) + _numerics.as_scalar(eps, v)
            return (_numerics.wide(u) / rms).astype(u.dtype)

        variance = jax.tree.map(average, updates, state.variance)
        scaled = jax.tree.map(rescale, updates, variance)
        return scaled, ScaleByVarianceState(count, variance)

    return optax.GradientTransformationExtraArgs(init, update)
