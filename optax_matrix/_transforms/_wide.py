"""Statistics in float32 for transformations of optax that follow the parameters."""

import jax
import optax

from optax_matrix._transforms import _numerics


def wide_statistics(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """`inner` on updates and parameters in float32, or float64 where they are that.

    Optax's second moments have the dtype of the parameters. In bfloat16 one with
    ``b2=0.999`` soon stands still: what a step adds is below half a unit in the last
    place.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(jax.tree.map(_numerics.wide, params))

    def update(updates, state, params=None, **extra_args):
        wide = jax.tree.map(_numerics.wide, updates)
        out, state = inner.update(wide, state, params, **extra_args)
        return jax.tree.map(lambda o, u: o.astype(u.dtype), out, updates), state

    return optax.GradientTransformationExtraArgs(init, update)
