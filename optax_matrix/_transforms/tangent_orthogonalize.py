"""Orthogonalizes each matrix of an update within the tangent space of a sphere."""

import jax
import jax.numpy as jnp
import optax

from optax_matrix import _check, _layout, _linalg, _placement
from optax_matrix._transforms import _numerics, _top_singular
from optax_matrix._transforms._top_singular import TopVectorState, Triplet
from optax_matrix._transforms.orthogonalize import orthogonalize


def tangent_orthogonalize(
    method: str | _linalg.PolarMethod = _linalg.NewtonSchulz(
        coefficients="polar_express"
    ),
    *,
    bisections: int = 24,
    layout: _layout.Layout = None,
    placement: _placement.Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Orthogonalizes updates so that they keep the parameters' spectral norm.

    With the leading singular vectors :math:`u_1, v_1` of each matrix of the parameters,

    .. math::
      U \leftarrow \operatorname{polar}(U + \lambda u_1 v_1^\top), \qquad
      \langle u_1 v_1^\top, \operatorname{polar}(U + \lambda u_1 v_1^\top) \rangle = 0,

    which is the steepest direction of spectral norm 1 that keeps the spectral norm to
    first order; `spectral_sphere_retract` keeps it exactly. :math:`\lambda` is found
    by bisection. For exact polar factors, the inner product does not decrease with
    :math:`\lambda`, and the bracket always contains a zero; approximate methods, such
    as the default, follow this up to their error. A multiple of
    :math:`u_1 v_1^\top` has no tangent part: rounding errors are orthogonalized, and
    the result is an arbitrary direction of full norm.

    Args:
      method: How to orthogonalize, see `orthogonalize`. The default is eight steps of
        Polar Express. With an exact method there may be no such :math:`\lambda` for a
        square matrix; Newton-Schulz is continuous.
      bisections: Number of bisections, at least 1; each orthogonalizes once more.
        :math:`\lambda` is found to :math:`3 \cdot 2^{-b} \|U\|_F`.
      layout: See `orthogonalize`.
      placement: See `orthogonalize`.

    Returns:
      A transformation that needs ``params``. Updates keep their shape and dtype. Zero
      matrices stay zero; NaN or Inf in one matrix does not affect the others. The state
      is one float32 vector over the outputs per matrix.

    Raises:
      ValueError: As `orthogonalize`, at construction if ``bisections`` is below 1, and
        in ``update`` without ``params``.
      TypeError: As `orthogonalize`, and if ``bisections`` is not an int.

    Sharding:
      As `orthogonalize`, with the same exchanges. The vectors come from products of
      sharded matrices, see `spectral_sphere_retract`. Two reflections turn them into
      vectors with equal entries, so that owners of updates need not know them; the
      same reflections turn the result back.

    References:
      Controlled LLM Training on Spectral Sphere, 2026, `arXiv:2601.08393
      <https://arxiv.org/abs/2601.08393>`_. Differs: the bracket is known; the
      authors' code starts from the previous :math:`\lambda`, searches by doubling, and
      falls back to the previous :math:`\lambda` if that fails. There is no tolerance,
      but always as many bisections.
    """
    _check.static_int("bisections", bisections, 1)
    _placement.as_placement(placement)  # Refuses a period.
    balanced = orthogonalize(
        _linalg.Balanced(_linalg.as_method(method), bisections),
        layout=layout,
        placement=placement,
    )

    def init(params: optax.Params) -> TopVectorState:
        balanced.init(params)  # Raises what `update` would raise.
        return _top_singular.init(layout, params)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _check.params_given(params, "tangent_orthogonalize")

        def find(
            view: _layout.MatrixView, u: jax.Array, p: jax.Array, right: jax.Array
        ) -> Triplet:
            del u
            return _top_singular.top_singular(view, _numerics.wide(p), right)

        def turn(view: _layout.MatrixView, u: jax.Array, top: Triplet) -> jax.Array:
            return _reflected(view, _numerics.wide(u), top)

        def turn_back(
            view: _layout.MatrixView, u: jax.Array, x: jax.Array, top: Triplet
        ) -> jax.Array:
            return _reflected(view, x, top).astype(u.dtype)

        def right(view: _layout.MatrixView, u: jax.Array, top: Triplet) -> jax.Array:
            del view, u
            return top.right

        tops = _layout.tree_map(
            find, layout, updates, params, state.right, keep_boxes=False
        )
        turned = _layout.tree_map(turn, layout, updates, tops)
        done, _ = balanced.update(turned, optax.EmptyState())
        kept = _layout.tree_map(right, layout, updates, tops, keep_boxes=False)
        back = _layout.tree_map(turn_back, layout, updates, done, tops)
        return back, TopVectorState(kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _reflected(view: _layout.MatrixView, x: jax.Array, top: Triplet) -> jax.Array:
    """Reflects both sides of each matrix: singular vectors become constant vectors."""
    over_inputs = _top_singular.over_inputs(view)
    over_outputs = _top_singular.over_outputs(view)
    # The signs avoid cancellation. They may turn `top` into a negative multiple of the
    # constant matrix, for which λ has the other sign.
    left = _normal(over_inputs, top.left, inputs=True)
    right = _normal(over_outputs, top.right, inputs=False)
    left, right = view.expand(left), view.expand(right)
    x = x - 2 * view.expand(view.sum(x * right, inputs=False)) * right
    return x - 2 * left * view.expand(view.sum(x * left, outputs=False))


def _normal(side: _layout.MatrixView, v: jax.Array, inputs: bool) -> jax.Array:
    """Returns the normal of a mirror between a unit vector and a constant one."""
    over = {"inputs": inputs, "outputs": not inputs}
    constant = jnp.asarray(side.size(**over), v.dtype) ** -0.5
    sign = jnp.where(side.sum(v, **over) < 0, -1, 1)
    w = v + side.expand(sign * constant)
    return w / side.expand(jnp.sqrt(side.sum(jnp.square(w), **over)))
