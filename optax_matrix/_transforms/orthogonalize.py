"""Replaces each matrix of an update by its orthogonal polar factor, or near it."""

import jax
import optax

from optax_matrix import _layout, _linalg, _placement


def orthogonalize(
    method: str | _linalg.PolarMethod = "newton_schulz",
    *,
    layout: _layout.Layout = None,
    placement: _placement.Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each matrix of the update by its polar factor, computed by `method`.

    With the singular value decomposition :math:`X = U S V^\top`,

    .. math:: X \leftarrow \operatorname{polar}(X) = U V^\top.

    Args:
      method: ``"newton_schulz"``, ``"halley"``, ``"exact"``, or one of the objects
        `NewtonSchulz`, `Halley`, `Exact` with settings of its own.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack is taken by itself.
      placement: Where leaves lie on a mesh with auto axes, and the size of stacks, see
        `Placement`. None: what explicit axes say, and the rule for stacks.

    Returns:
      A transformation without state. Updates keep their shape and dtype; a zero matrix
      stays zero, a non-finite one spoils no other.

    Raises:
      ValueError: At construction, for an unknown method; at ``init``, if a leaf does
        not fit ``layout``, or its sharding does not divide it, with its path.

    Sharding:
      Any. Matrices are brought together whole, each on one device, in one exchange for
      all of a shape, and go back in another; those that do not go round the devices
      are shared by several. See docs/sharding.md.
    """
    polar = _linalg.as_method(method)
    place = placement or _placement.Placement()

    def fitted(tree: optax.Params) -> tuple:
        pairs = _layout.tree_views(layout, tree)
        views, leaves = [view for view, _ in pairs], [leaf for _, leaf in pairs]
        return polar, views, leaves, place.of(tree), place.strategy

    def init(params: optax.Params) -> optax.EmptyState:
        # A leaf that does not fit its layout or its sharding raises here.
        _placement.check(*fitted(params))
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        done = _placement.polar(*fitted(updates))
        return jax.tree.unflatten(jax.tree.structure(updates), done), state

    return optax.GradientTransformationExtraArgs(init, update)
