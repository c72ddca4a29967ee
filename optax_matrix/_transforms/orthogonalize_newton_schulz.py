"""Orthogonalizes each matrix of an update by a Newton-Schulz iteration."""

from collections.abc import Sequence
from typing import Literal

import optax
from jax.typing import DTypeLike

from optax_matrix import _layout, _linalg, _placement
from optax_matrix._transforms.orthogonalize import orthogonalize


def orthogonalize_newton_schulz(
    steps: int | None = None,
    *,
    coefficients: str | Sequence[tuple[float, float, float]] = "jordan",
    method: Literal["auto", "plain", "gram"] = "auto",
    dtype: DTypeLike | None = None,
    precision: str | None = None,
    layout: _layout.Layout = None,
    placement: _placement.Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Moves all singular values of each matrix of an update towards one, by matmuls.

    Starting from :math:`X` scaled to spectral norm at most one, each step applies one
    row :math:`(a, b, c)` of the coefficient table:

    .. math:: X \leftarrow a X + (b A + c A^2) X, \qquad A = X X^\top.

    The result has the singular vectors of the input, and singular values near one:
    with the default table between about 0.7 and 1.2 for all that were above 1e-2 of
    the norm. One step (Hopper) multiplies nearly all of them by 3.4 and hardly
    orthogonalizes.

    Args:
      steps: See `NewtonSchulz`, which has all settings; pass one to `orthogonalize` for
        the others.
      coefficients: See `NewtonSchulz`.
      method: See `NewtonSchulz`.
      dtype: See `NewtonSchulz`.
      precision: See `NewtonSchulz`.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack is orthogonalized separately.
      placement: Where leaves lie on a mesh with auto axes, see `Placement`.

    Returns:
      A transformation, as `orthogonalize`. Updates keep their shape and dtype, and do
      not depend on the scale of the input. Zero matrices stay zero; NaN or Inf in one
      matrix does not affect the others.

    Raises:
      TypeError, ValueError: At construction, for settings that `NewtonSchulz` refuses,
        a ``steps`` that the table does not have among them; at ``init``, if a leaf does
        not fit ``layout``, with its path.

    Cost:
      3 matmuls per step, about :math:`4 p^2 q + 2 p^3` FLOPs for sides :math:`p \le q`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> gradient = jax.random.normal(jax.random.key(0), (8, 4))  # (in, out)
      >>> tx = orthogonalize_newton_schulz(12, coefficients="track3")
      >>> update, _ = tx.update(gradient, tx.init(gradient))
      >>> print(jnp.linalg.svd(update, compute_uv=False).round(3))
      [1. 1. 1. 1.]

    References:
      Jordan et al., 2024, `Muon <https://kellerjordan.github.io/posts/muon/>`_. Each
      table cites its own source.
    """
    newton_schulz = _linalg.NewtonSchulz(
        steps=steps,
        coefficients=coefficients,
        method=method,
        dtype=dtype,
        precision=precision,
    )
    return orthogonalize(newton_schulz, layout=layout, placement=placement)
