"""Gives each matrix of an update the norm of another transformation's (grafting)."""

from typing import NamedTuple

import jax
import optax

from optax_matrix import _check, _layout
from optax_matrix._transforms import _numerics


class GraftToState(NamedTuple):
    """State of `graft_to`."""

    magnitude: optax.OptState
    direction: optax.OptState


def graft_to(
    magnitude: optax.GradientTransformation,
    direction: optax.GradientTransformation,
    *,
    block_size: int | None = None,
    layout: _layout.Layout = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives each matrix of one transformation's update the norm of another's.

    Both receive the same gradient. With :math:`A` the update of ``magnitude`` and
    :math:`D` that of ``direction``,

    .. math:: U = \|A\|_F \, D / \|D\|_F .

    Shampoo's updates have no natural scale; grafted to Adam they take Adam's learning
    rates. Each argument may be a chain: ``graft_to(optax.scale_by_adam(),
    shampoo_precondition())``, or `optax.identity` for SGD, ``optax.scale_by_rss()`` for
    AdaGrad, ``optax.scale_by_rms()`` for RMSProp.

    Args:
      magnitude: The transformation that gives the norm.
      direction: The transformation that gives the direction.
      block_size: Graft blocks of at most this size separately, as the preconditioners'
        setting of this name cuts them. None: whole matrices.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack is grafted separately.

    Returns:
      A transformation. Updates have the dtype of ``direction``'s. Where a matrix of
      those is zero, the update is zero.

    Raises:
      TypeError: At construction, if either is not a transformation.
      ValueError: At construction, if ``block_size`` is below 1; at ``init``, if a leaf
        does not fit ``layout``, with its path.

    Sharding:
      Norms are sums over the mesh. On explicit axes blocks of a sharded side gather
      the leaf.

    References:
      Agarwal et al., 2020, `arXiv:2002.11803 <https://arxiv.org/abs/2002.11803>`_.
    """
    _check.transformation("magnitude", magnitude)
    _check.transformation("direction", direction)
    if block_size is not None:
        _check.static_int("block_size", block_size, 1)
    sizes = optax.with_extra_args_support(magnitude)
    ways = optax.with_extra_args_support(direction)

    def init(params: optax.Params) -> GraftToState:
        _layout.tree_views(layout, params)  # A leaf that does not fit raises here.
        return GraftToState(sizes.init(params), ways.init(params))

    def update(updates, state, params=None, **extra_args):
        a, magnitude_state = sizes.update(
            updates, state.magnitude, params, **extra_args
        )
        d, direction_state = ways.update(updates, state.direction, params, **extra_args)

        def graft(view: _layout.MatrixView, d: jax.Array, a: jax.Array) -> jax.Array:
            if block_size is not None:
                view = _layout.blocked(view, block_size)
            wide = _numerics.wide(d)
            factor = _numerics.divide_or_zero(
                _numerics.safe_norm(view, _numerics.wide(a)),
                _numerics.safe_norm(view, wide),
            )
            return (wide * view.expand(factor)).astype(d.dtype)

        grafted = _layout.tree_map(graft, layout, d, a)
        return grafted, GraftToState(magnitude_state, direction_state)

    return optax.GradientTransformationExtraArgs(init, update)
