"""Runs a transformation on float32 updates, whatever the dtype of the parameters."""

import jax
import optax

from optax_matrix import _check, _layout
from optax_matrix._transforms import _numerics


def float32_statistics(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Runs ``inner``, and keeps its state, in float32 (float64 for float64 leaves).

    The second moments of Optax have the dtype of the parameters. In bfloat16 a moment
    with ``b2=0.999`` soon stops changing: what a step adds is below half a unit in the
    last place.

    Args:
      inner: A transformation, such as `optax.scale_by_adam`.

    Returns:
      The transformation. Updates keep their shape and dtype.

    Raises:
      TypeError: At construction, if ``inner`` is not a transformation; at ``init``, for
        leaves that are not real floating, with their paths.
    """
    _check.transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> optax.OptState:
        _layout.check_all_floating(params)
        return inner.init(jax.tree.map(_numerics.wide, params))

    def update(updates, state, params=None, **extra_args):
        wide = jax.tree.map(_numerics.wide, updates)
        out, state = inner.update(wide, state, params, **extra_args)
        return jax.tree.map(lambda o, u: o.astype(u.dtype), out, updates), state

    return optax.GradientTransformationExtraArgs(init, update)
