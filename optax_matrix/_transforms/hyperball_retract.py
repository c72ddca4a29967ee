"""Keeps every matrix of the parameters at the Frobenius norm it started with."""

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from optax_matrix import _check, _layout
from optax_matrix._transforms import _low_precision, _numerics


class HyperballRetractState(NamedTuple):
    """State of `hyperball_retract`."""

    radius: Any  # R, float32, one a matrix: a leaf's rank, matrix axes of size 1


def hyperball_retract(
    *, layout: _layout.Layout = None
) -> optax.GradientTransformationExtraArgs:
    r"""Bends each step so that it ends on the sphere the matrix started on.

    With :math:`R = \|W_0\|_F` of each matrix, taken at ``init``,

    .. math:: U \leftarrow R \, \frac{W + U}{\|W + U\|_F} - W.

    It comes last: what arrives must be the step itself, learning rate and sign
    included, and the parameters must take its output unchanged. MuonH is

    >>> import optax_matrix as om
    >>> tx = optax.chain(
    ...     om.ema_momentum(),
    ...     om.orthogonalize_newton_schulz(),
    ...     om.normalize_frobenius("param"),
    ...     optax.scale_by_learning_rate(0.018),
    ...     om.hyperball_retract(),
    ... )

    There is no weight decay on a sphere: it would only lengthen the step.

    Args:
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack (each expert) has its own
        radius.

    Returns:
      A transformation that needs ``params``. Updates keep their shape and dtype. The
      radius is held to float32 rounding, for parameters of 16 bits too: their rounding
      is made up for by moving the smallest entries by one unit in the last place (a
      matrix of a few dozen entries has too few for that and is held to its own
      rounding). Parameters wider than the updates get the radius to the rounding of
      the updates. A non-finite update spoils its own matrix only.

    Raises:
      ValueError: At ``init``, if a leaf does not fit ``layout`` or (outside jit) holds
        a zero matrix, with its path: a radius of 0 would freeze it; in ``update``
        without ``params``.

    References:
      Wen et al., 2026, Hyperball, `arXiv:2606.16899
      <https://arxiv.org/abs/2606.16899>`_. Differs from ports that use the current norm
      in place of the first one (it drifts in bfloat16) or one norm for a whole stack.
    """

    def init(params: optax.Params) -> HyperballRetractState:
        def radius(view: _layout.MatrixView, p: jax.Array) -> jax.Array:
            norm = _numerics.frobenius(view, _numerics.wide(p))
            _raise_if_zero(norm, view)
            return norm

        return HyperballRetractState(
            _layout.tree_map(radius, layout, params, keep_boxes=False)
        )

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _check.params_given(params, "hyperball_retract")

        def retract(
            view: _layout.MatrixView, u: jax.Array, p: jax.Array, radius: jax.Array
        ) -> jax.Array:
            wide_p = _numerics.wide(p)
            end = wide_p + u.astype(wide_p.dtype)
            scale = _numerics.divide_or_zero(radius, _numerics.frobenius(view, end))
            # A step to the very centre has no direction to keep: stay.
            on_sphere = jnp.where(
                view.expand(scale) == 0, wide_p, end * view.expand(scale)
            )
            if jnp.finfo(p.dtype).bits == 16:
                step = _low_precision.step_to_norm(view, p, on_sphere, radius, u.dtype)
            else:
                step = on_sphere - wide_p
            return step.astype(u.dtype)

        return _layout.tree_map(retract, layout, updates, params, state.radius), state

    return optax.GradientTransformationExtraArgs(init, update)


def _raise_if_zero(norm: jax.Array, view: _layout.MatrixView) -> None:
    if isinstance(norm, jax.core.Tracer) or not norm.is_fully_addressable:
        return
    if not bool(jnp.all(norm > 0)):
        raise ValueError(
            f"`hyperball_retract` needs matrices with a positive finite norm, got "
            f"one of norm 0 (or NaN) at {view.path!r} (shape {view.shape}). "
            "Initialize it with other values, or route it to another optimizer."
        )
