"""Frames for transformations without state: one function per leaf."""

from collections.abc import Callable

import jax
import optax

from optax_matrix import _check, _layout

PerMatrix = Callable[[_layout.MatrixView, jax.Array], jax.Array]
PerMatrixAndParam = Callable[[_layout.MatrixView, jax.Array, jax.Array], jax.Array]


def unchanged() -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that returns updates unchanged."""
    return optax.with_extra_args_support(optax.identity())


def per_matrix(
    rescale: PerMatrix, layout: _layout.Layout
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that maps `rescale(view, update)` over the leaves."""

    def init(params: optax.Params) -> optax.EmptyState:
        _layout.tree_views(layout, params)  # Raises for a leaf that does not fit.
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        return _layout.tree_map(rescale, layout, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def per_matrix_and_param(
    rescale: PerMatrixAndParam, layout: _layout.Layout, user: str
) -> optax.GradientTransformationExtraArgs:
    """Returns the same for `rescale(view, update, param)`; `user` is for errors."""

    def init(params: optax.Params) -> optax.EmptyState:
        _layout.tree_views(layout, params)
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _check.params_given(params, user)
        return _layout.tree_map(rescale, layout, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)
