"""Answers claims about optimizers from the runs of claims.py.

    python -m benchmarks.convergence.claims_report DYNAMICS.jsonl [RATES.jsonl]
    python -m benchmarks.convergence.claims_report DYNAMICS.jsonl --plot PLOT.png

Every claim is put as a range for a number that each seed has. It is answered "yes" if
the 95 % interval of the mean over the seeds (Student's t) is inside the range, "no" if
it is outside, and "undecided" otherwise.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.convergence.evidence import interval
from benchmarks.convergence.run import Run, loss_of, read

CONFIDENCE = 0.95


class Answer(NamedTuple):
    """A claim, the number that decides it, its range, and the answer."""

    claim: str
    number: str
    measured: str
    range: str
    answer: str


def judge(
    claim: str,
    number: str,
    values: Sequence[float],
    low: float = -math.inf,
    high: float = math.inf,
) -> Answer:
    """Answers whether a number lies in a range, given its values for several seeds."""
    mean, half = interval(values, CONFIDENCE)
    answer = "undecided"
    if low <= mean - half and mean + half <= high:
        answer = "yes"
    elif mean + half < low or mean - half > high:
        answer = "no"
    wanted = f"{low:g} to {high:g}"
    if math.isinf(low):
        wanted = f"below {high:g}"
    elif math.isinf(high):
        wanted = f"above {low:g}"
    return Answer(claim, number, f"{mean:.3g} ± {half:.2g}", wanted, answer)


def growth(run: Run) -> float:
    """Returns p of ‖W(t)‖² − ‖W(0)‖² ∝ t^2p, by least squares of logarithms."""
    steps = np.array([point["step"] for point in run["points"]][1:])
    norms = np.array([point["norm"] for point in run["points"]])
    slope, _ = np.polyfit(np.log(steps), np.log(norms[1:] ** 2 - norms[0] ** 2), 1)
    return float(slope) / 2


def change(run: Run, *path: str) -> float:
    """Returns how much a measure changes from the first to the last point."""

    def at(point: Any) -> float:
        for name in path:
            point = point[name]
        return point

    return at(run["points"][-1]) - at(run["points"][0])


def slowing(run: Run) -> float:
    """Returns the last relative step over that at the second point."""
    points = run["points"]
    return points[-1]["relative_step"] / points[1]["relative_step"]


def answers_of(runs: Sequence[Run]) -> list[Answer]:
    """Returns the answers from the runs of `dynamics`."""
    runs = sorted(runs, key=lambda run: run["seed"])

    def each(arm: str, measure: Any, *arguments: str) -> list[float]:
        return [measure(run, *arguments) for run in runs if run["arm"] == arm]

    def between(first: str, second: str, *path: str) -> list[float]:
        pairs = zip(
            each(first, change, *path), each(second, change, *path), strict=True
        )
        return [a - b for a, b in pairs]

    def top(run: Run) -> float:
        """The share of five directions in a gradient's energy, over all points."""
        return statistics.mean(point["gradient"]["top_5"] for point in run["points"])

    grow = "Without weight decay, weight norms grow like √t"
    anneal = "A fixed norm removes the implicit annealing"
    squeeze = (
        "The spectrum of the weights is squeezed under MuonH, more than under MuonW"
    )
    sphere = "The spectral sphere avoids the squeeze of MuonH"
    few = "Gradient matrices have a few dominant directions"
    entropy, ratio = ("weights", "entropy"), ("weights", "participation")
    return [
        judge(grow, "exponent, Muon", each("muon", growth), 0.4, 0.6),
        judge(grow, "exponent, AdamW", each("adamw", growth), 0.4, 0.6),
        judge(
            anneal,
            "last over early relative step, MuonW",
            each("muonw", slowing),
            high=0.95,
        ),
        judge(anneal, "the same, MuonH", each("muonh", slowing), 0.95, 1.05),
        judge(
            squeeze,
            "change of entropy, MuonH",
            each("muonh", change, *entropy),
            high=0.0,
        ),
        judge(
            squeeze,
            "the same less MuonW's",
            between("muonh", "muonw", *entropy),
            high=0.0,
        ),
        judge(
            squeeze,
            "change of participation, MuonH",
            each("muonh", change, *ratio),
            high=0.0,
        ),
        judge(
            squeeze,
            "the same less MuonW's",
            between("muonh", "muonw", *ratio),
            high=0.0,
        ),
        judge(
            sphere,
            "change of entropy less MuonH's",
            between("spectral_sphere", "muonh", *entropy),
            0.0,
        ),
        judge(few, "energy of five of 128 directions, Muon", each("muon", top), 0.5),
        judge(few, "the same, AdamW", each("adamw", top), 0.5),
    ]


def rates_of(runs: Sequence[Run]) -> tuple[str, list[Answer]]:
    """Returns a table of losses by rate, and the answers, from the runs of `rates`."""

    def losses_of(arm: str, rate: float) -> dict[int, float]:
        mine = [r for r in runs if (r["arm"], r["learning_rate"]) == (arm, rate)]
        return {run["seed"]: loss_of(run) for run in mine}

    def rates(arm: str) -> list[float]:
        return sorted({run["learning_rate"] for run in runs if run["arm"] == arm})

    heads = ["rate of MuonW", "of MuonH", "loss of MuonW", "of MuonH", "difference"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    pairs = list(zip(rates("muonw"), rates("muonh"), strict=True))
    answers, middle = [], len(pairs) // 2
    for place, (first, second) in enumerate(pairs):
        wide, hyper = losses_of("muonw", first), losses_of("muonh", second)
        gaps = [hyper[seed] - wide[seed] for seed in sorted(wide)]
        number = f"loss of MuonH at {second:g} less MuonW's at {first:g}"
        if place < middle:
            answers.append(judge("MuonH wins at low rates", number, gaps, high=0.0))
        elif place > middle:
            answers.append(judge("MuonW wins at high rates", number, gaps, low=0.0))
        means = [statistics.mean(losses.values()) for losses in (wide, hyper)]
        cells = [f"{first:g}", f"{second:g}", *(f"{mean:.3f}" for mean in means)]
        lines.append(f"| {' | '.join(cells)} | {statistics.mean(gaps):+.3f} |")
    return "\n".join(lines), answers


def table(answers: Sequence[Answer]) -> str:
    """Returns answers as Markdown."""
    heads = ["claim", "number", "measured", "claimed", "answer"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(answer)} |" for answer in answers)])


def plot(runs: Sequence[Run], path: Path) -> None:
    """Plots norm, relative step, entropy and participation ratio over the steps."""
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    measures = {
        "Frobenius norm of the weights": lambda point: point["norm"],
        "relative step": lambda point: point["relative_step"],
        "spectral entropy over its maximum": lambda point: point["weights"]["entropy"],
        "participation ratio over its maximum": lambda point: point["weights"][
            "participation"
        ],
    }
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    for axes, (title, of) in zip(figure.subplots(1, 4), measures.items(), strict=True):
        for run in runs:
            first = next(r for r in runs if r["arm"] == run["arm"]) is run
            axes.plot(
                [point["step"] for point in run["points"]],
                [of(point) for point in run["points"]],
                color=f"C{arms.index(run['arm'])}",
                label=run["arm"] if first else None,
                linewidth=1,
            )
        axes.set(title=title, xlabel="step")
        axes.title.set_fontsize(9)
    figure.axes[0].legend(fontsize=7)
    figure.axes[1].set_yscale("log")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dynamics", type=Path)
    parser.add_argument("rates", type=Path, nargs="?")
    parser.add_argument("--plot", type=Path, help="write a plot instead")
    given = parser.parse_args()
    runs = read(given.dynamics)
    if given.plot:
        plot(runs, given.plot)
        return
    answers = answers_of(runs)
    if given.rates:
        losses, more = rates_of(read(given.rates))
        print(losses, end="\n\n")
        answers = more + answers
    print(table(answers))


if __name__ == "__main__":
    main()
