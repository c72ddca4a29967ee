"""Newton-Schulz rows that are optimal for a given interval (Polar Express)."""

import numpy as np

from optax_matrix import _check
from optax_matrix._linalg.coefficients import Row, Rows

# The odd quintic of highest order at 1, for intervals so narrow that the exchange
# below would subtract nearly equal numbers, and might not converge. This quintic is off
# by 5/16 (width)³ at most.
_NARROW = 1e-3
# It converges quadratically: this is many more than it takes.
_EXCHANGES = 20
_PADE: Row = (15 / 8, -10 / 8, 3 / 8)


def polar_express_rows(lower_bound: float, steps: int) -> Rows:
    r"""Computes the Newton-Schulz rows that take [ℓ, 1] closest to 1.

    Each row is the odd quintic of least maximal error on the interval that the rows
    before it leave,

    .. math::
      p_k = \operatorname{argmin}_p \max_{\sigma \in [\ell_k, u_k]} |1 - p(\sigma)|,
      \qquad [\ell_{k+1}, u_{k+1}] = [p_k(\ell_k), 2 - p_k(\ell_k)], \quad u_0 = 1,

    and so is their composition among all compositions of that many odd quintics. Values
    below :math:`\ell_0` are mapped to between 0 and :math:`\ell_k`.

    The table ``"polar_express"`` is for any matrix; rows from a bound are for matrices
    whose singular values below :math:`\ell` need not reach 1. Three rows for 0.03 on
    the Gram side, with only two products with the long side, are

    >>> import optax_matrix as om
    >>> method = om.NewtonSchulz(
    ...     coefficients=om.polar_express_rows(0.03, 3),
    ...     method="gram",
    ...     normalization="schatten4",
    ...     precision="highest",
    ... )

    At lower precision, GPUs and TPUs restart the Gram form, with two more products with
    the long side per restart.

    Args:
      lower_bound: :math:`\ell = \ell_0`, in (0, 1]: the smallest singular value that
        matters, relative to the norm of `NewtonSchulz`'s ``normalization``.
      steps: The number of rows, at least 1.

    Returns:
      The rows (a, b, c), first applied first.

    Raises:
      ValueError: If an argument is out of range.
      TypeError: If ``steps`` is not an int, or ``lower_bound`` not a number.

    References:
      Amsel et al., 2025, Polar Express, `arXiv:2505.16932
      <https://arxiv.org/abs/2505.16932>`_, theorem 3.1. Differs: no row is weakened for
      products in half precision.
    """
    _check.static_number("lower_bound", lower_bound)
    _check.in_range(
        "lower_bound", lower_bound, 0.0, 1.0, low_open=True, high_open=False
    )
    _check.static_int("steps", steps, 1)
    rows, low, high = [], float(lower_bound), 1.0
    for _ in range(steps):
        row, error = _best_quintic(low, high)
        rows.append(row)
        low, high = 1.0 - error, 1.0 + error
    return tuple(rows)


def _best_quintic(low: float, high: float) -> tuple[Row, float]:
    """Returns the odd quintic of least maximal error on an interval, and the error.

    By Remez's exchange: it is the one that is 1 - E, 1 + E, 1 - E, 1 + E at the ends
    and at its own extrema between them.

    Raises:
      RuntimeError: If the exchange does not converge.
    """
    if high - low < _NARROW * high:
        centre = (low + high) / 2
        a, b, c = _PADE[0] / centre, _PADE[1] / centre**3, _PADE[2] / centre**5
        return (a, b, c), abs(1.0 - low * (a + low**2 * (b + low**2 * c)))
    inner = low + (high - low) * np.array([0.25, 0.75])
    for _ in range(_EXCHANGES):
        points = np.array([low, *inner, high])
        system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        # p' = a + 3bσ² + 5cσ⁴
        found = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a]).real))
        moved = np.max(np.abs(found - inner))
        inner = found
        if moved <= 1e-10 * high:
            return (float(a), float(b), float(c)), float(abs(error))
    raise RuntimeError(
        f"No best quintic found for [{low}, {high}] in {_EXCHANGES} exchanges. Please "
        "report this interval."
    )
