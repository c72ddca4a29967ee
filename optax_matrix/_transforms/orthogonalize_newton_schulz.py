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
    r"""Moves all singular values of each matrix of the update towards one, by matmuls.

    From :math:`X` scaled to spectral norm at most one, each step with its row
    :math:`(a, b, c)` of the coefficient table does

    .. math:: X \leftarrow a X + (b A + c A^2) X, \qquad A = X X^\top.

    The result has the singular vectors of the input, and singular values near one:
    with the default table between about 0.7 and 1.2 for all that were above 1e-2 of
    the norm. One step (Hopper) multiplies nearly all of them by the same 3.4 and hardly
    orthogonalizes.

    Args:
      steps: How many, at least 1; None takes the table's own number, 5 for the default.
        A number that the table does not define raises.
      coefficients: The name of a table (``"jordan"``, ``"quintic"``,
        ``"polar_express"``, ``"cans"``, ``"aol"``, ``"track3"``, ``"cubic"``,
        ``"cubic5"``) or rows of your own. `NewtonSchulz` has its safety factor and
        normalization too: pass one to `orthogonalize`.
      method: ``"plain"`` as above; ``"gram"`` iterates on the small Gram matrix
        instead, equal to rounding; ``"auto"`` takes the one with fewer FLOPs.
      dtype: In which to compute; None is float32, float64 for float64 updates.
      precision: Of the matmuls, as in `jax.numpy.matmul`; None is the backend's own.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack is taken by itself.
      placement: Where leaves lie and how many are worked on at once, see `Placement`.

    Returns:
      A transformation without state. Updates keep their shape and dtype; a zero matrix
      stays zero, a non-finite one spoils no other; the scale of the input does not
      matter.

    Raises:
      TypeError, ValueError: At construction, for settings that `NewtonSchulz` refuses,
        a ``steps`` that the table does not have among them; at ``init``, if a leaf does
        not fit ``layout``, with its path.

    Cost:
      3 matmuls a step, about :math:`4 p^2 q + 2 p^3` FLOPs for sides :math:`p \le q`.

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
    rows = coefficients if isinstance(coefficients, str) else tuple(coefficients)
    newton_schulz = _linalg.NewtonSchulz(
        steps=steps,
        coefficients=rows,
        method=method,
        dtype=dtype,
        precision=precision,
    )
    return orthogonalize(newton_schulz, layout=layout, placement=placement)
