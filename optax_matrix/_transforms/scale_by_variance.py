"""Divides each entry by a running root mean square of the incoming updates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _check, _layout
from optax_matrix._transforms import _arguments, _moments, _numerics
from optax_matrix._transforms._moments import Moment


class ScaleByVarianceState(NamedTuple):
    """State of `scale_by_variance`."""

    count: jax.Array  # int32, updates seen so far
    variance: Any  # V, with the shape of a leaf, float32 or `nu_dtype`
    inner: optax.OptState  # of the transformation whose updates are divided


def scale_by_variance(
    b2: ArrayLike = 0.95,
    *,
    eps: ArrayLike = 1e-8,
    debias: bool = True,
    inner: optax.GradientTransformation | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides each entry by the running RMS of that entry of the incoming updates.

    With :math:`\beta` = ``b2``, :math:`V_0 = 0` and all operations elementwise,

    .. math::
      V_t = \beta V_{t-1} + (1 - \beta) U_t^2, \qquad
      U_t \leftarrow U_t / (\sqrt{V_t / (1 - \beta^t)} + \epsilon).

    Adam's second moment, but of the incoming updates: after an orthogonalization it is
    AdaMuon's and Hopper's variance. With ``inner``, what is divided are the updates of
    another transformation of the same :math:`U_t`: a momentum before an
    orthogonalization is divided by the variance of the raw gradient in `muon_squared`,
    and Adam is

    >>> import optax_matrix as om
    >>> adam = om.scale_by_variance(
    ...     0.999, inner=om.ema_momentum(0.9, nesterov=False, debias=True)
    ... )

    Without ``inner`` this is ``optax.scale_by_rms(bias_correction=True)``, whose state
    follows the dtype of the parameters.

    Args:
      b2: :math:`\beta`, in [0, 1).
      eps: :math:`\epsilon`, positive, in the unit of the update, outside the root.
      debias: Whether to divide by :math:`1 - \beta^t`. AdaMuon's paper does not.
      inner: The transformation whose updates are divided. None: the incoming updates.
      nu_dtype: The dtype of :math:`V`: bfloat16, float32, float64, or float8_e4m3fn in
        blocks, see ``mu_dtype`` of `ema_momentum`; there its root is kept. None is
        float32, and float64 for float64 updates. In bfloat16 a variance with a ``b2``
        near 1 stops changing.

    Returns:
      A transformation for leaves of any shape. Updates keep their shape and dtype and
      have entries of size about 1; the state is one array per leaf, and that of
      ``inner``.

    Raises:
      ValueError: At construction, for numbers outside these ranges, or another
        ``nu_dtype``.
      TypeError: At construction, for arguments of another type; at ``init``, for leaves
        that are not real floating, with their paths.

    References:
      Kingma and Ba, 2015, `arXiv:1412.6980 <https://arxiv.org/abs/1412.6980>`_; Si et
      al., 2025, AdaMuon, `arXiv:2507.11005 <https://arxiv.org/abs/2507.11005>`_.
    """
    _check.number("b2", b2, 0.0, 1.0)
    _check.number("eps", eps, 0.0, low_open=True)
    _check.boolean("debias", debias)
    nu_dtype = _arguments.nu_dtype(nu_dtype)
    if inner is None:
        inner = optax.identity()
    _check.transformation("inner", inner)
    divided = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> ScaleByVarianceState:
        _layout.check_all_floating(params)
        zeros = _numerics.zero_moments(params, nu_dtype)
        return ScaleByVarianceState(
            jnp.zeros((), jnp.int32), zeros, divided.init(params)
        )

    def update(updates, state, params=None, **extra_args):
        count = _numerics.next_count(state.count)

        def average(u: jax.Array, v: Moment) -> jax.Array:
            square = jnp.square(_numerics.wide(u))
            old = _moments.read(v, square.dtype, square=True)
            return _numerics.moving_average(old, square, b2)

        def rescale(u: jax.Array, v: jax.Array) -> jax.Array:
            if debias:
                v = v / _numerics.bias_correction(b2, count, v)
            rms = jnp.sqrt(v) + _numerics.as_scalar(eps, v)
            return (_numerics.wide(u) / rms).astype(u.dtype)

        variance = _numerics.with_moments(average, updates, state.variance)
        given, inner_state = divided.update(updates, state.inner, params, **extra_args)
        scaled = jax.tree.map(rescale, given, variance)
        kept = _numerics.stored(variance, state.variance, count, square=True)
        return scaled, ScaleByVarianceState(count, kept, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
