"""Polar Express for five steps, as nanochat and Dion have it."""

from optax_matrix import _linalg


def five_steps(margin: float) -> _linalg.NewtonSchulz:
    """Returns Polar Express for a cushion of 2 and a safety factor of 1.02.

    Args:
      margin: What the matrix is divided by in addition to its norm. It is part of the
        first row.
    """
    first = (8.156554524902461, -22.48329292557795, 15.878769915207462)
    rows = (
        tuple(c / margin**power for c, power in zip(first, (1, 3, 5), strict=True)),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    )
    return _linalg.NewtonSchulz(5, coefficients=rows)
