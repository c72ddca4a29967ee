"""Projects updates off the weights and normalizes them, per input or per output."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout, _mesh
from optax_matrix._transforms import _numerics


class ObliqueTangentState(NamedTuple):
    """State of `oblique_tangent`."""

    count: jax.Array  # int32, updates seen so far


def oblique_tangent(
    rms: ArrayLike = 0.2, *, layout: _layout.Layout = None
) -> optax.GradientTransformationExtraArgs:
    r"""Projects updates off the weights and normalizes them, per input or per output.

    A matrix :math:`U` is a set of vectors :math:`u_k` of :math:`n` entries: in the
    first, third, ... update those of the inputs (:math:`n = out`), in the others those
    of the output neurons (:math:`n = in`). With :math:`\rho` = ``rms`` and
    the vectors :math:`w_k` of the parameter,

    .. math::
      v_k = u_k - \frac{\langle u_k, w_k \rangle}{\|w_k\|^2} w_k, \qquad
      u_k \leftarrow \rho \sqrt{n} \; v_k / \|v_k\|.

    :math:`v` is the projection onto the tangent space of the oblique manifold, the
    matrices whose vectors have unit norm, at the normalized parameter. The parameter
    itself keeps its norms. No matrix products are needed.

    Args:
      rms: :math:`\rho`, positive: the RMS of the entries of each vector. 0.2 is about
        that of AdamW's updates.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Blocks of a split leaf have their own vectors.

    Returns:
      A transformation that needs ``params``. Updates keep their shape and dtype. Zero
      vectors stay zero, and vectors that are parallel to those of the parameter
      become zero (vectors of one entry always are). The state is the number of updates.

    Raises:
      ValueError: At construction, if ``rms`` is not positive; at ``init``, if a leaf
        does not fit ``layout``, with its path; in ``update`` without ``params``.
      TypeError: At construction, if ``rms`` is not a number; at ``init``, for leaves
        that are not real floating, with their paths.

    Precision:
      Squares are added in float32: entries below 1e-19 or above 1e19 are lost.

    References:
      Gu and Xie, 2026, Mano, `arXiv:2601.23000 <https://arxiv.org/abs/2601.23000>`_,
      algorithm 1, which starts with the vectors of the inputs for weights of PyTorch.
      Differs: norms have no lower bound of 1e-8; instead, the rounding residue of a
      parallel vector is set to zero.
    """
    _check.number("rms", rms, 0.0, low_open=True)

    def init(params: optax.Params) -> ObliqueTangentState:
        _layout.tree_views(layout, params)  # A leaf that does not fit raises here.
        return ObliqueTangentState(jnp.zeros((), jnp.int32))

    def project(
        over: str, view: _layout.MatrixView, u: jax.Array, p: jax.Array
    ) -> jax.Array:
        sides = {"inputs": over == "inputs", "outputs": over == "outputs"}

        def inner(x: jax.Array, y: jax.Array) -> jax.Array:
            return view.sum(x * y, **sides)

        wide = _numerics.wide(view.gathered(u, **sides))
        p = view.gathered(p, **sides).astype(wide.dtype)
        unit = _numerics.divide_or_zero(p, view.expand(jnp.sqrt(inner(p, p))))
        tangent = wide - view.expand(inner(wide, unit)) * unit
        norm = jnp.sqrt(inner(tangent, tangent))
        # Rounding leaves a few units in the last place of a parallel vector, which
        # must not become a step of full length.
        rounding = 8 * jnp.finfo(wide.dtype).eps * jnp.sqrt(inner(wide, wide))
        norm = jnp.where(norm <= rounding, 0, norm)
        direction = _numerics.divide_or_zero(tangent, view.expand(norm))
        size = view.expand(view.size(**sides))
        length = jnp.sqrt(jnp.asarray(size, wide.dtype))
        step = direction * (length * _numerics.as_scalar(rms, wide))
        return _mesh.like(step.astype(u.dtype), u)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _check.params_given(params, "oblique_tangent")

        def over(side: str) -> optax.Updates:
            step = functools.partial(project, side)
            return _layout.tree_map(step, layout, updates, params)

        tangents = jax.lax.cond(
            state.count % 2 == 0, lambda: over("outputs"), lambda: over("inputs")
        )
        return tangents, ObliqueTangentState(_numerics.next_count(state.count))

    return optax.GradientTransformationExtraArgs(init, update)
