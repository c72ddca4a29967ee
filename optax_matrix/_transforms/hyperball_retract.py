"""Keeps every matrix of the parameters at its initial Frobenius norm."""

import math
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from optax_matrix import _check, _layout
from optax_matrix._transforms import _numerics


class HyperballRetractState(NamedTuple):
    """State of `hyperball_retract`."""

    radius: Any  # R, float32, one per matrix: the rank of a leaf, matrix axes of size 1


def hyperball_retract(
    *, layout: _layout.Layout = None
) -> optax.GradientTransformationExtraArgs:
    r"""Retracts each step onto the sphere of the matrix's initial Frobenius norm.

    With :math:`R = \|W_0\|_F` of each matrix, taken at ``init``,

    .. math:: U \leftarrow R \, \frac{W + U}{\|W + U\|_F} - W.

    Put it last in the chain: its input must be the final step, including learning rate
    and sign, and its output must be added to the parameters unchanged. MuonH is

    >>> import optax_matrix as om
    >>> tx = optax.chain(
    ...     om.ema_momentum(),
    ...     om.orthogonalize_newton_schulz(),
    ...     om.normalize_frobenius("param"),
    ...     optax.scale_by_learning_rate(0.018),
    ...     om.hyperball_retract(),
    ... )

    Weight decay has no effect on a sphere but to lengthen the step.

    Args:
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack (each expert) has its own
        radius.

    Returns:
      A transformation that needs ``params``. Updates keep their shape and dtype. The
      norm is kept to the rounding of the parameters and of the updates: float32 to
      about 1e-7, while rounding the entries of a bfloat16 matrix of 64 × 64 changes its
      norm by about 4e-5. The error does not grow, because the radius is stored. NaN or
      Inf in one matrix does not affect the others.

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
            norm = _numerics.norm(view, _numerics.wide(p))
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
            scale = _numerics.divide_or_zero(radius, _numerics.norm(view, end))
            scale = view.expand(scale)
            # A step to the centre has no direction: stay.
            on_sphere = jnp.where(scale == 0, wide_p, end * scale)
            return (on_sphere - wide_p).astype(u.dtype)

        return _layout.tree_map(retract, layout, updates, params, state.radius), state

    return optax.GradientTransformationExtraArgs(init, update)


def _raise_if_zero(norm: jax.Array, view: _layout.MatrixView) -> None:
    if isinstance(norm, jax.core.Tracer) or not norm.is_fully_addressable:
        return
    if not math.prod(view.shape):
        return
    if not bool(jnp.all(norm > 0)):
        raise ValueError(
            f"`hyperball_retract` needs matrices with a positive finite norm, got "
            f"one of norm 0 (or NaN) at {view.path!r} (shape {view.shape}). "
            "Initialize it with other values, or route it to another optimizer."
        )
