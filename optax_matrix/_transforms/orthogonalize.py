"""Replaces each matrix of an update by its orthogonal polar factor, or near it."""

import jax
import optax

from optax_matrix import _layout, _linalg, _placement
from optax_matrix._transforms import _stateless


def orthogonalize(
    method: str | _linalg.PolarMethod = "newton_schulz",
    *,
    layout: _layout.Layout = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each matrix of the update by its polar factor, computed by `method`.

    With the singular value decomposition :math:`X = U S V^\top`,

    .. math:: X \leftarrow \operatorname{polar}(X) = U V^\top.

    Args:
      method: ``"newton_schulz"``, ``"halley"``, ``"exact"``, or one of the objects
        `NewtonSchulz`, `Halley`, `Exact` with settings of its own.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack is taken by itself.

    Returns:
      A transformation without state. Updates keep their shape and dtype; a zero matrix
      stays zero, a non-finite one spoils no other.

    Raises:
      ValueError: At construction, for an unknown method; at ``init``, if a leaf does
        not fit ``layout``, with its path.
    """
    polar = _linalg.as_method(method).polar

    def replace(view: _layout.MatrixView, u: jax.Array) -> jax.Array:
        def on_leaf(whole: jax.Array) -> jax.Array:
            return view.apply(polar, whole)

        return _placement.on_whole_matrices(on_leaf, u)

    return _stateless.per_matrix(replace, layout)
