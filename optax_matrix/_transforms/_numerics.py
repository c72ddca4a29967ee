"""Arithmetic that transformations share: dtypes, averages and norms of matrices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_matrix import _linalg, _paths
from optax_matrix._layout import MatrixView
from optax_matrix._transforms import _moments
from optax_matrix._transforms._moments import Moment


def wide(x: jax.Array) -> jax.Array:
    """Returns `x` in the dtype of statistics: float32, or float64 for float64."""
    return x.astype(wide_dtype(x))


def wide_dtype(x: Any) -> Any:
    """Returns the dtype of statistics about `x`."""
    return _linalg.at_least_float32(x.dtype)


def as_scalar(value: ArrayLike, like: jax.Array) -> jax.Array:
    """Returns a hyperparameter, which may be traced, in the dtype of `like`."""
    return jnp.asarray(value, like.dtype)


def value_at(value: optax.ScalarOrSchedule, count: Any) -> ArrayLike:
    """Returns a hyperparameter after `count` updates, which may be a schedule."""
    return value(count) if callable(value) else value


def zero_moments(params: optax.Params, dtype: str | None) -> Any:
    """Returns zeros for a moving average of updates like `params`; see `_moments`."""

    def zeros(node: Any) -> Any:
        if not jax.tree.leaves(node):
            return node
        # Codes and scales get a box each: one of Flax NNX cannot have both.
        moment = _moments.zeros(_paths.unboxed(node), dtype)
        return jax.tree.map(lambda part: jax.tree.map(lambda _: part, node), moment)

    return jax.tree.map(zeros, params, is_leaf=_paths.is_box)


def next_count(count: jax.Array) -> jax.Array:
    """Returns `count + 1`, or `count` at the largest int32."""
    return jnp.asarray(optax.safe_increment(count))


def moving_average(old: jax.Array, new: jax.Array, decay: ArrayLike) -> jax.Array:
    """Returns `decay * old + (1 - decay) * new`."""
    decay = as_scalar(decay, new)
    return decay * old + (1 - decay) * new


def moving_averages(old: Any, updates: Any, decay: ArrayLike) -> Any:
    """Returns the moving average of every leaf, in the dtype of statistics."""

    def average(g: jax.Array, m: Moment) -> jax.Array:
        g = wide(g)
        return moving_average(_moments.read(m, g.dtype), g, decay)

    return with_moments(average, updates, old)


def with_moments(fn: Callable[..., Any], updates: Any, *moments: Any) -> Any:
    """Maps over the leaves of `updates` and their moments, in boxes or not."""
    leaves, structure = jax.tree.flatten(updates)
    rest = [_paths.at_leaves(updates, tree) for tree in moments]
    return structure.unflatten(map(fn, leaves, *rest))


def mixture(
    g: jax.Array,
    averages: Sequence[jax.Array],
    weights: Sequence[ArrayLike],
    share: ArrayLike,
) -> jax.Array:
    """Returns the weighted sum of `averages`, looking ahead by `1 - share` of `g`."""
    total = jnp.zeros_like(g)
    for weight, m in zip(weights, averages, strict=True):
        total += as_scalar(weight, g) * m
    return moving_average(total, g, share)


def stored(new: Any, like: Any, count: jax.Array, *, square: bool = False) -> Any:
    """Returns each moment of `new` in the form of that of `like`; see `_moments`."""

    def one(old: Any, x: jax.Array) -> Any:
        new = _moments.write(x, _paths.unboxed(old), count, square=square)
        return jax.tree.unflatten(jax.tree.structure(old), jax.tree.leaves(new))

    # With the boxes of `like`, because the state keeps its structure.
    moments, structure = jax.tree.flatten(like, is_leaf=_moments.is_blocks)
    pairs = zip(moments, jax.tree.leaves(new), strict=True)
    return structure.unflatten(one(*pair) for pair in pairs)


def bias_correction(decay: ArrayLike, count: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `1 - decay**count`, the sum of the weights of an average from zero."""
    return 1 - as_scalar(decay, like) ** count.astype(like.dtype)


def norm(view: MatrixView, x: jax.Array) -> jax.Array:
    """Returns the Frobenius norm of each matrix of `x`, in the shape of `view.sum`.

    For parameters and orthogonalized updates: squares of entries below 1e-19 or above
    1e19 are lost in float32.
    """
    return jnp.sqrt(view.sum(jnp.square(x)))


def safe_norm(view: MatrixView, x: jax.Array) -> jax.Array:
    """Returns the Frobenius norm of each matrix for entries from 1e-30 to 1e30.

    Divides by the largest entry first, which costs another pass.
    """
    largest = view.max(jnp.abs(x))
    unit = jnp.where(largest > 0, largest, 1)
    return unit * norm(view, x / view.expand(unit))


def output_norms(view: MatrixView, x: jax.Array) -> jax.Array:
    """Returns the norm of the weights of each output, with the precision of `norm`."""
    return jnp.sqrt(view.sum(jnp.square(x), outputs=False))


def divide_or_zero(x: jax.Array, by: jax.Array) -> jax.Array:
    """Returns `x / by`, and 0 where `by` is 0."""
    return jnp.where(by == 0, 0, x / jnp.where(by == 0, 1, by))
