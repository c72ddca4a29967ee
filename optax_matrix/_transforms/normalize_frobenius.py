"""Scales each matrix of an update to a Frobenius norm."""

from typing import Literal

import jax
import numpy as np
import optax

from optax_matrix import _check, _layout
from optax_matrix._transforms import _numerics, _stateless


def normalize_frobenius(
    to: Literal["one", "param", "orthogonal"] = "one",
    *,
    layout: _layout.Layout = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each matrix of an update to a Frobenius norm.

    .. math::
      U \leftarrow U \, \frac{\rho}{\|U\|_F}, \qquad
      \rho = 1 \; (\text{"one"}), \quad
      \|W\|_F \; (\text{"param"}), \quad
      \sqrt{\min(in, out)} \; (\text{"orthogonal"}).

    After ``"param"`` the learning rate is the relative length of the step, as in MuonH
    and AdamH. ``"orthogonal"`` is the norm of a semi-orthogonal matrix: after
    `orthogonalize` it corrects what too few iterations left, as nanochat's Muon+ does.

    Args:
      to: The norm; ``"param"`` is that of the parameter :math:`W`.
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
    _check.one_of("to", to, ("one", "param", "orthogonal"))

    def unit(view: _layout.MatrixView, u: jax.Array) -> jax.Array:
        wide = _numerics.wide(u)
        norm = view.expand(_numerics.safe_norm(view, wide))
        return _numerics.divide_or_zero(wide, norm)

    def to_constant(view: _layout.MatrixView, u: jax.Array) -> jax.Array:
        norm = 1.0
        if to == "orthogonal":
            norm = np.sqrt(np.minimum(view.fan_in(), view.fan_out()))
        return (unit(view, u) * view.expand(norm)).astype(u.dtype)

    def to_param(view: _layout.MatrixView, u: jax.Array, p: jax.Array) -> jax.Array:
        norm = _numerics.norm(view, p.astype(_numerics.wide_dtype(u)))
        return (unit(view, u) * view.expand(norm)).astype(u.dtype)

    if to == "param":
        return _stateless.per_matrix_and_param(to_param, layout, "normalize_frobenius")
    return _stateless.per_matrix(to_constant, layout)
