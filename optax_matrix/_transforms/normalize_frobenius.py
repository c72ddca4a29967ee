"""Scales each matrix of an update to Frobenius norm one, or that of its parameter."""

from typing import Literal

import jax
import optax

from optax_matrix import _check, _layout
from optax_matrix._transforms import _numerics, _stateless


def normalize_frobenius(
    to: Literal["one", "param"] = "one", *, layout: _layout.Layout = None
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each matrix of an update to Frobenius norm one, or that of its parameter.

    .. math::
      U \leftarrow U / \|U\|_F \quad (\text{"one"}), \qquad
      U \leftarrow U \, \|W\|_F / \|U\|_F \quad (\text{"param"}).

    After ``"param"`` the learning rate is the relative length of the step, as in MuonH
    and AdamH.

    Args:
      to: The norm: ``"one"``, or ``"param"`` for that of the parameter :math:`W`.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack is scaled separately.

    Returns:
      A transformation without state. Updates keep their shape and dtype. Zero matrices
      stay zero; NaN or Inf in one matrix does not affect the others.

    Raises:
      ValueError: At construction, for another ``to``; at ``init``, if a leaf does not
        fit ``layout``, with its path; in ``update``, if ``to="param"`` and ``params``
        is missing.
    """
    _check.one_of("to", to, ("one", "param"))

    def unit(view: _layout.MatrixView, u: jax.Array) -> jax.Array:
        wide = _numerics.wide(u)
        norm = view.expand(_numerics.safe_norm(view, wide))
        return _numerics.divide_or_zero(wide, norm)

    def to_one(view: _layout.MatrixView, u: jax.Array) -> jax.Array:
        return unit(view, u).astype(u.dtype)

    def to_param(view: _layout.MatrixView, u: jax.Array, p: jax.Array) -> jax.Array:
        norm = _numerics.norm(view, p.astype(_numerics.wide_dtype(u)))
        return (unit(view, u) * view.expand(norm)).astype(u.dtype)

    if to == "one":
        return _stateless.per_matrix(to_one, layout)
    return _stateless.per_matrix_and_param(to_param, layout, "normalize_frobenius")
