"""Gives the inputs or outputs of each matrix equal norms."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from optax_matrix import _check, _layout
from optax_matrix._transforms import _numerics, _stateless


def equalize_norms(
    of: Literal["outputs", "inputs", "both"] = "outputs",
    *,
    layout: _layout.Layout = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides the weights of each output or input by their norm; keeps the total norm.

    With :math:`r_i` the norm of input :math:`i` and :math:`c_j` that of output
    :math:`j` in the update of one matrix,

    .. math::
      \hat U_{ij} = U_{ij} / c_j \; (\text{"outputs"}), \quad
      U_{ij} / r_i \; (\text{"inputs"}), \quad
      U_{ij} / (r_i c_j) \; (\text{"both"}); \qquad
      U \leftarrow \hat U \, \|U\|_F / \|\hat U\|_F.

    Before `orthogonalize` this is MuonEq, whose default "R" is ``"outputs"``, the rows
    of a PyTorch weight. After it, it is Muon+.

    Args:
      of: What has equal norms afterwards; with ``"both"``, approximately.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs).

    Returns:
      A transformation without state for leaves with at least two axes. Updates keep
      their shape, dtype and Frobenius norm per matrix; an input or output that is zero
      stays zero.

    Raises:
      ValueError: At construction, for another ``of``; at ``init``, if a leaf does not
        fit ``layout``, with its path.

    Precision:
      Squares are added in float32: entries below 1e-19 or above 1e19 are lost.

    References:
      MuonEq: Chang et al., 2026, `arXiv:2603.28254 <https://arxiv.org/abs/2603.28254>`_.
      Muon+: 2026, `arXiv:2602.21545 <https://arxiv.org/abs/2602.21545>`_; nanochat's
      Muon+ fixes the norm of the matrix alone, see `normalize_frobenius`.
    """
    _check.one_of("of", of, ("outputs", "inputs", "both"))

    def equalize(view: _layout.MatrixView, u: jax.Array) -> jax.Array:
        wide = _numerics.wide(u)
        squares, even = jnp.square(wide), wide
        if of != "inputs":
            norms = view.expand(jnp.sqrt(view.sum(squares, outputs=False)))
            even = _numerics.divide_or_zero(even, norms)
        if of != "outputs":
            norms = view.expand(jnp.sqrt(view.sum(squares, inputs=False)))
            even = _numerics.divide_or_zero(even, norms)
        restore = _numerics.divide_or_zero(
            jnp.sqrt(view.sum(squares)), _numerics.norm(view, even)
        )
        return (even * view.expand(restore)).astype(u.dtype)

    return _stateless.per_matrix(equalize, layout)
