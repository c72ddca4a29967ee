"""Judges paired differences of losses, and finds when a loss was reached."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import stats


def interval(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """Returns the mean and half of its confidence interval, by Student's t.

    Args:
      values: One value per seed. Half of the interval is infinite for a single one, and
        if one is not finite.
      confidence: The confidence of the interval, in (0, 1).
    """
    mean, count = statistics.mean(values), len(values)
    if count == 1 or not math.isfinite(mean):
        return mean, math.inf
    quantile = float(stats.t.ppf((1 + confidence) / 2, count - 1))
    return mean, quantile * statistics.stdev(values) / math.sqrt(count)


class Difference(NamedTuple):
    """A mean difference of losses over seeds.

    Attributes:
      mean: The loss of an arm less that of the baseline with the same seed.
      half_width: Half of the confidence interval; infinite for a single seed.
      seeds: The number of seeds.
      verdict: "better" or "worse" if the interval excludes 0; else "no worse" if it
        excludes a loss that is higher by the margin; else "undecided".
    """

    mean: float
    half_width: float
    seeds: int
    verdict: str


def difference(
    losses: Mapping[int, float],
    baseline: Mapping[int, float],
    *,
    confidence: float,
    margin: float,
) -> Difference:
    """Compares losses with those of a baseline, by Student's t interval.

    Args:
      losses: The losses of an arm by seed.
      baseline: Those of the baseline. Seeds that only one of them has do not count.
      confidence: The confidence of the interval, in (0, 1).
      margin: How much higher a loss may be and still be "no worse".

    Raises:
      ValueError: If they have no seed in common.
    """
    seeds = sorted(losses.keys() & baseline.keys())
    if not seeds:
        raise ValueError(
            f"the arm has the seeds {sorted(losses)} and the baseline "
            f"{sorted(baseline)}: train both with the same ones"
        )
    gaps = [losses[seed] - baseline[seed] for seed in seeds]
    mean, half = interval(gaps, confidence)
    return Difference(mean, half, len(seeds), _verdict(mean, half, margin))


def _verdict(mean: float, half: float, margin: float) -> str:
    # A run that diverged has an infinite loss and no interval: it decides nothing.
    if mean + half < 0:
        return "better"
    if mean - half > 0:
        return "worse"
    if mean + half < margin:
        return "no worse"
    return "undecided"


def steps_to(target: float, curve: Sequence[tuple[int, float]]) -> float | None:
    """Returns the step at which a loss was reached, interpolated, or None."""
    before: tuple[int, float] | None = None
    for step, loss in curve:
        if loss <= target:
            if before is None:
                return float(step)
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = step, loss
    return None
