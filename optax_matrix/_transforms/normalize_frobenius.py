"""Scales each matrix of an update to Frobenius norm one, or to its parameter's."""

from typing import Literal

import jax
import optax

from optax_matrix import _check, _layout
from optax_matrix._transforms import _numerics, _stateless


def normalize_frobenius(
    to: Literal["one", "param"] = "one", *, layout: _layout.Layout = None
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each matrix of the update to a Frobenius norm that is known.

    .. math::
      U \leftarrow U / \|U\|_F \quad (\text{"one"}), \qquad
      U \leftarrow U \, \|W\|_F / \|U\|_F \quad (\text{"param"}).

    After ``"param"`` a learning rate is the relative length of the step: MuonH and
    AdamH use it so.

    Args:
      to: The norm to have: ``"one"``, or that of the parameter :math:`W`.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack has a norm of its own.

    Returns:
      A transformation without state. Updates keep their shape and dtype; a zero matrix
      stays zero, a non-finite one spoils no other.

    Raises:
      ValueError: At construction, for another ``to``; at ``init``, if a leaf does not
        fit ``layout``, with its path; in ``update``, if ``to="param"`` and ``params``
        is missing.
    """
    _check.one_of("to", to, ("one", "param"))

    def unit(view: _layout.MatrixView, u: jax.Array) -> jax.Array:
        wide = _numerics.wide(u)
        norm = view.expand(_numerics.frobenius(view, wide))
        return _numerics.divide_or_zero(wide, norm)

    def to_one(view: _layout.MatrixView, u: jax.Array) -> jax.Array:
        return unit(view, u).astype(u.dtype)

    def to_param(view: _layout.MatrixView, u: jax.Array, p: jax.Array) -> jax.Array:
        norm = _numerics.frobenius(view, p.astype(_numerics.wide_dtype(u)))
        return (unit(view, u) * view.expand(norm)).astype(u.dtype)

    if to == "one":
        return _stateless.per_matrix(to_one, layout)
    return _stateless.per_matrix_and_param(to_param, layout, "normalize_frobenius")
