"""Chooses the next values to try: a compass search in factors of a fourth root of 2."""

import math
from collections.abc import Callable, Mapping, Sequence

Values = Mapping[str, float]
Point = tuple[
    int, ...
]  # For each value, how many quarters of an octave from the start.

# Decays of moving averages: what is scaled is one less the decay.
DECAYS = ("momentum", "b1", "b2")
SMALLEST_DECAY = 0.1


class _Untried(Exception):  # noqa: N818 (not an error)
    """Raised to ask for the loss at a point that was not tried."""


def values_at(start: Values, point: Point) -> Values | None:
    """Returns the values at a point, or None if one of them is out of its range."""
    values = {}
    for (name, value), quarters in zip(start.items(), point, strict=True):
        factor = 2 ** (quarters / 4)
        moved = 1 - (1 - value) * factor if name in DECAYS else value * factor
        if name in DECAYS and moved < SMALLEST_DECAY:
            return None
        values[name] = float(f"{moved:.4g}")
    return values


def compass(dimensions: int, loss: Callable[[Point], float]) -> Point:
    """Returns the point with the lowest loss that a compass search finds.

    From the best point so far, one value at a time is doubled or halved, and what is
    better is accepted at once. When nothing is, factors of √2 take the place of 2, and
    then those of its square root.

    Args:
      dimensions: The number of values.
      loss: The loss at a point, called more than once for the same one.
    """
    best = (0,) * dimensions
    least = loss(best)
    for step in (4, 2, 1):
        moved = True
        while moved:
            moved = False
            for i in range(dimensions):
                for by in (step, -step):
                    point = (*best[:i], best[i] + by, *best[i + 1 :])
                    if (found := loss(point)) < least:
                        best, least, moved = point, found, True
                        break
    return best


def next_values(start: Values, tried: Sequence[tuple[Values, float]]) -> Values | None:
    """Returns the next values to try, or None when the search has converged.

    They depend on nothing but the arguments, so a search continues where it stopped.

    Args:
      start: The first values to try.
      tried: Values that were tried, with their losses; infinity if training diverged.
    """
    losses = {tuple(values.items()): loss for values, loss in tried}
    wanted: Values = start

    def loss(point: Point) -> float:
        nonlocal wanted
        values = values_at(start, point)
        if values is None:
            return math.inf
        if tuple(values.items()) not in losses:
            wanted = values
            raise _Untried
        return losses[tuple(values.items())]

    try:
        compass(len(start), loss)
    except _Untried:
        return wanted
    return None
