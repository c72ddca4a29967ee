"""Replaces each entry of an update by its sign."""

import jax
import jax.numpy as jnp
import optax

from optax_matrix import _layout


def scale_by_sign() -> optax.GradientTransformationExtraArgs:
    r"""Replaces each entry by its sign, and each Inf by NaN.

    .. math:: U \leftarrow \operatorname{sign}(U).

    `optax.scale_by_sign` maps Inf to 1, which hides an overflow for good: momentum that
    is infinite once stays so, and its sign never changes again.

    Returns:
      A transformation without state for leaves of any shape. Updates keep their shape
      and dtype.

    Raises:
      TypeError: At ``init``, for leaves that are not real floating, with their paths.

    References:
      Si et al., 2025, AdaMuon, `arXiv:2507.11005 <https://arxiv.org/abs/2507.11005>`_.
    """

    def init(params: optax.Params) -> optax.EmptyState:
        _layout.check_all_floating(params)
        return optax.EmptyState()

    def sign(u: jax.Array) -> jax.Array:
        return jnp.where(jnp.isinf(u), jnp.nan, jnp.sign(u)).astype(u.dtype)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        return jax.tree.map(sign, updates), state

    return optax.GradientTransformationExtraArgs(init, update)
