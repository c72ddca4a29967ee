"""The largest singular value of each matrix, and weights scaled by it."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_matrix import _check, _layout, _mesh
from optax_matrix._transforms import _numerics

# Products with W and with Wᵀ per update. Sixteen give the largest singular value of
# matrices with a side of at most 16 to rounding, from any start.
STEPS = 16
# The part of the search that starts anew, so that a singular vector is found even if it
# was orthogonal to the former one. Its square bounds what it costs in accuracy.
FRESH = 1e-3


class TopVectorState(NamedTuple):
    """State of the transformations that need the largest singular value."""

    right: Any  # v₁, float32; like a leaf, but input axes have size 1


class Triplet(NamedTuple):
    """The largest singular value of each matrix, with its vectors."""

    value: jax.Array  # in the shape of `view.sum(x)`
    left: jax.Array  # in the shape of `view.sum(x, inputs=False)`
    right: jax.Array  # in the shape of `view.sum(x, outputs=False)`


def first_vector(view: _layout.MatrixView, p: jax.Array) -> jax.Array:
    """Returns a random unit vector over the outputs of each matrix."""
    like = jnp.zeros_like(p, dtype=_numerics.wide_dtype(p))
    zeros = view.sum(like, outputs=False)
    shape = [size if i in view.outputs else 1 for i, size in enumerate(view.shape)]
    random = np.random.default_rng(0).standard_normal(shape).astype(zeros.dtype)
    return _unit(view, zeros + random)


@partial(jax.jit, static_argnums=0)
def top_singular(view: _layout.MatrixView, w: jax.Array, right: jax.Array) -> Triplet:
    """Returns the largest singular value of each matrix and its vectors.

    Lanczos iterations from `right`, by products that any sharding allows. To rounding,
    the value is never too large, and exact where a side has at most `STEPS` entries.
    Otherwise it is at least that of `STEPS - 1` power iterations, and far better if
    `right` is near the vector.

    Args:
      view: The matrices of the leaf.
      w: The leaf, in float32 or float64.
      right: The vectors to start from. Those of matrices that are zero or not finite
        are returned as they are.
    """
    former = right
    if len(view.input_widths) + len(view.output_widths) > 2:
        # `view.sum` gathers where a side is split: once, and not for every product.
        w, right = _mesh.gathered(w), _mesh.gathered(right)
    # By its largest entry, so that products of several weights do not underflow.
    unit = view.max(jnp.abs(w))
    unit = jnp.where(unit > jnp.finfo(w.dtype).tiny, unit, 1)
    w = w / view.expand(unit)
    v = _unit(view, right + FRESH * first_vector(view, w))
    u = _times(view, w, v)
    basis, images = (jnp.stack([jnp.zeros_like(x)] * STEPS) for x in (v, u))

    def step(i: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        basis, images, v = carry
        u = _times(view, w, v)
        basis = jax.lax.dynamic_update_index_in_dim(basis, v, i, 0)
        images = jax.lax.dynamic_update_index_in_dim(images, u, i, 0)
        ahead = view.sum(w * view.expand(u), outputs=False)
        # Twice: the first time leaves rounding errors of the size of `ahead`.
        rest = _without(view, _without(view, ahead, basis), basis)
        # What is left of a space that is exhausted is rounding.
        noise = 10 * jnp.finfo(w.dtype).eps * _length(view, ahead)
        new = _length(view, rest) > noise
        rest = jnp.where(over_outputs(view).expand(new), rest, 0)
        return basis, images, _unit(view, rest)

    basis, images, _ = jax.lax.fori_loop(0, STEPS, step, (basis, images, v))
    # Rayleigh-Ritz: the best vector in the space that the basis spans.
    gram = jax.vmap(
        lambda a: jax.vmap(lambda b: view.sum(a * b, outputs=False))(images)
    )(images)
    gram = jnp.moveaxis(gram, (0, 1), (-2, -1))
    finite = jnp.all(jnp.isfinite(gram), axis=(-2, -1), keepdims=True)
    _, vectors = jnp.linalg.eigh(jnp.where(finite, gram, 0))
    weights = jnp.moveaxis(vectors[..., -1], -1, 0)
    v = _combined(over_outputs(view), weights, basis)
    u = _combined(over_inputs(view), weights, images)
    length = _length(view, v)
    stretched = jnp.sqrt(view.sum(jnp.square(u), outputs=False))
    left = _numerics.divide_or_zero(u, over_inputs(view).expand(stretched))
    finite = finite[..., 0, 0]
    value = jnp.where(finite, _numerics.divide_or_zero(stretched, length), jnp.nan)
    kept = jnp.where(over_outputs(view).expand(value > 0), _unit(view, v), right)
    return Triplet(value * unit, left, _mesh.like(kept, former))


def init(layout: _layout.Layout, params: optax.Params) -> TopVectorState:
    """Returns the state before the first search."""
    right = _layout.tree_map(first_vector, layout, params, keep_boxes=False)
    return TopVectorState(right)


def scaled_weights(
    factor: Callable[[_layout.MatrixView, jax.Array], jax.Array],
    layout: _layout.Layout,
    user: str,
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that scales the weights that each step leads to.

    Args:
      factor: Returns the factor of each matrix, given the view of its leaf and its
        largest singular value.
      layout: Which axes of a leaf are the matrix.
      user: The name of the transformation, for errors.
    """

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _check.params_given(params, user)

        def retract(
            view: _layout.MatrixView, u: jax.Array, p: jax.Array, right: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            p = _numerics.wide(p)
            end = p + u.astype(p.dtype)
            top = top_singular(view, end, right)
            by = view.expand(factor(view, top.value))
            # Without the rounding of p + u - p where nothing is scaled.
            step = jnp.where(by == 1, u.astype(p.dtype), by * end - p)
            return step.astype(u.dtype), top.right

        pairs = _layout.tree_map(
            retract, layout, updates, params, state.right, keep_boxes=False
        )
        done, right = (
            _layout.tree_map(
                lambda view, u, pair, i=i: pair[i],
                layout,
                updates,
                pairs,
                keep_boxes=i == 0,
            )
            for i in range(2)
        )
        return done, TopVectorState(right)

    return optax.GradientTransformationExtraArgs(partial(init, layout), update)


def over_outputs(view: _layout.MatrixView) -> _layout.MatrixView:
    """Returns a view whose `expand` repeats over blocks of outputs only."""
    return dataclasses.replace(view, input_widths=(sum(view.input_widths),))


def over_inputs(view: _layout.MatrixView) -> _layout.MatrixView:
    """Returns a view whose `expand` repeats over blocks of inputs only."""
    return dataclasses.replace(view, output_widths=(sum(view.output_widths),))


def _times(view: _layout.MatrixView, w: jax.Array, v: jax.Array) -> jax.Array:
    """Returns W v of each matrix."""
    return view.sum(w * view.expand(v), inputs=False)


def _length(view: _layout.MatrixView, v: jax.Array) -> jax.Array:
    """Returns the norm of a vector over the outputs of each matrix."""
    return jnp.sqrt(view.sum(jnp.square(v), inputs=False))


def _unit(view: _layout.MatrixView, v: jax.Array) -> jax.Array:
    """Returns a vector over the outputs of each matrix with norm 1, or 0."""
    length = over_outputs(view).expand(_length(view, v))
    return _numerics.divide_or_zero(v, length)


def _combined(
    side: _layout.MatrixView, weights: jax.Array, vectors: jax.Array
) -> jax.Array:
    """Returns the sum of vectors with a weight for each of them and each matrix."""
    return jnp.sum(jax.vmap(lambda c, x: side.expand(c) * x)(weights, vectors), axis=0)


def _without(view: _layout.MatrixView, v: jax.Array, basis: jax.Array) -> jax.Array:
    """Returns what is orthogonal to an orthonormal basis."""
    parts = jax.vmap(lambda b: view.sum(b * v, inputs=False))(basis)
    return v - _combined(over_outputs(view), parts, basis)
