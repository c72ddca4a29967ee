"""Keeps the matrices of the parameters orthonormal."""

import dataclasses
from typing import Literal

import jax
import optax

from optax_matrix import _check, _layout, _linalg, _placement
from optax_matrix._transforms import _numerics
from optax_matrix._transforms.orthogonalize import orthogonalize

# The last row of Polar Express converges, and repeats.
_POLAR = _linalg.NewtonSchulz(12, coefficients="polar_express", precision="highest")


@dataclasses.dataclass(frozen=True)
class _QFactor:
    """Orthogonalizes the columns of tall matrices, and the rows of wide ones."""

    def polar(self, x: jax.Array) -> jax.Array:
        """Returns Q of the QR factorization in which R has a positive diagonal."""
        return _linalg.positive_q_factor(x)


def stiefel_retract(
    method: Literal["polar", "qr"] = "polar",
    *,
    layout: _layout.Layout = None,
    placement: _placement.Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Retracts each step onto the matrices whose smaller side is orthonormal.

    .. math:: U \leftarrow \operatorname{polar}(W + U) - W,

    or the Q factor of :math:`W + U` (of its transpose, if there are more outputs than
    inputs) for which R has a positive diagonal. Put it last in the chain: its input
    must be the final step, including learning rate and sign, and its output must be
    added to the parameters unchanged.

    Parameters that are not orthonormal become so in the first update, however small
    its step: all singular values become 1. Initialize them as orthonormal matrices to
    start where you want to start.

    Args:
      method: ``"polar"``, the nearest such matrix, by twelve steps of Newton-Schulz
        with the table ``"polar_express"``; or ``"qr"``, which factorizes, and favors
        neurons with a small index.
      layout: See `orthogonalize`.
      placement: See `orthogonalize`.

    Returns:
      A transformation without state that needs ``params``. Updates keep their shape and
      dtype. NaN or Inf in one matrix does not affect the others. By ``"polar"``, a
      matrix that a step makes zero stays zero, and singular values below 1e-4 of the
      norm take another update to become 1.

    Raises:
      ValueError: As `orthogonalize`, for another ``method``, and in ``update`` without
        ``params``.
      TypeError: As `orthogonalize`.

    Precision:
      :math:`W^\top W` (or :math:`W W^\top`) is the identity to a few roundings of the
      parameters' dtype. The error does not grow.

    Sharding:
      As `orthogonalize`.

    References:
      Manifold Constrained Steepest Descent, 2026, `arXiv:2601.21487
      <https://arxiv.org/abs/2601.21487>`_; Absil, Mahony and Sepulchre, 2008,
      Optimization Algorithms on Matrix Manifolds, section 4.1.
    """
    _check.one_of("method", method, ("polar", "qr"))
    _placement.as_placement(placement)  # Refuses a period.
    project = orthogonalize(
        _POLAR if method == "polar" else _QFactor(), layout=layout, placement=placement
    )

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _check.params_given(params, "stiefel_retract")

        def end(view: _layout.MatrixView, u: jax.Array, p: jax.Array) -> jax.Array:
            del view
            return _numerics.wide(p) + u.astype(_numerics.wide_dtype(p))

        def step(
            view: _layout.MatrixView, u: jax.Array, p: jax.Array, end: jax.Array
        ) -> jax.Array:
            del view
            return (end - p.astype(end.dtype)).astype(u.dtype)

        ends = _layout.tree_map(end, layout, updates, params)
        ends, state = project.update(ends, state)
        return _layout.tree_map(step, layout, updates, params, ends), state

    return optax.GradientTransformationExtraArgs(project.init, update)
