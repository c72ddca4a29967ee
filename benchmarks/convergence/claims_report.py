"""Answers claims about optimizers from the runs of claims.py.

    python -m benchmarks.convergence.claims_report RUNS.jsonl ... [--plots FOLDER]

The files may be those of any studies. Every claim is put as a range for a number that
each seed has. It is answered "yes" if the 95 % interval of the mean over the seeds
(Student's t) is inside the range, "no" if it is outside, and "undecided" otherwise.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.convergence import claims_plots, scaling
from benchmarks.convergence.evidence import interval
from benchmarks.convergence.run import Run, loss_of
from benchmarks.jobs import read

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
    if low < mean - half and mean + half < high:
        answer = "yes"
    elif mean + half < low or mean - half > high:
        answer = "no"
    wanted = f"{low:g} to {high:g}"
    if math.isinf(low):
        wanted = f"below {high:g}"
    elif math.isinf(high):
        wanted = f"above {low:g}"
    measured = "not defined" if math.isnan(mean) else f"{mean:.3g} ± {half:.2g}"
    return Answer(claim, number, measured, wanted, answer)


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


def dynamics_of(runs: Sequence[Run]) -> list[Answer]:
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


def flattening_of(runs: Sequence[Run]) -> list[Answer]:
    """Returns the answers from the runs of `flattening`."""

    def share(of: str, steps: int, first: int = 0) -> list[float]:
        """The share of singular values near 1, over all points of a run."""
        points = [run["points"][first:] for run in runs]
        return [statistics.mean(point[of][steps] for point in each) for each in points]

    five, three = "Five Newton-Schulz steps flatten a spectrum", "Three nearly do"
    number = "share of singular values in [0.5, 1.5]"
    later = "momentum, from the first update on"
    return [
        judge(five, f"{number}, momentum", share("momentum", 5), low=0.9),
        judge(five, f"the same, {later}", share("momentum", 5, 1), low=0.9),
        judge(five, "the same, gradient", share("gradient", 5), low=0.9),
        judge(three, f"{number}, momentum", share("momentum", 3), low=0.75),
        judge(three, f"the same, {later}", share("momentum", 3, 1), low=0.75),
        judge(three, "the same, gradient", share("gradient", 3), low=0.75),
    ]


def best_rate(losses: Mapping[float, float]) -> float:
    """Returns the logarithm to base 2 of the best learning rate.

    It is the minimum of the parabola through the best of equally spaced rates and its
    neighbours; infinite, with the sign of the direction, if the best is at an end.
    """
    rates = sorted(losses)
    place = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if place in (0, len(rates) - 1):
        return math.inf if place else -math.inf
    below, least, above = (losses[rates[place + i]] for i in (-1, 0, 1))
    if math.inf in (below, above):
        return math.log2(rates[place])
    shift = (below - above) / (below - 2 * least + above) / 2
    return math.log2(rates[place]) + shift * math.log2(rates[1] / rates[0])


AXES = {"width": [64, 128, 256, 512], "layers": [1, 2, 4, 8]}


def losses_at(runs: Sequence[Run], **model: Any) -> dict[float, list[float]]:
    """Returns the losses of a model by learning rate, in the order of the seeds."""
    model = {"width": 64, "layers": 1, **model}
    mine = [run for run in runs if model.items() <= run.items()]
    losses: dict[float, list[float]] = {}
    for run in sorted(mine, key=lambda run: (run["learning_rate"], run["seed"])):
        losses.setdefault(run["learning_rate"], []).append(loss_of(run))
    return losses


LARGER = [(axis, size) for axis, sizes in AXES.items() for size in sizes[1:]]


def lowest(losses: Mapping[float, list[float]]) -> float:
    """Returns the rate whose loss is lowest on average."""
    return min(losses, key=lambda rate: statistics.mean(losses[rate]))


def _cost(losses: Mapping[float, list[float]], kept: float) -> str:
    """Returns the loss at a rate less the lowest, as a mean over the seeds."""
    best = lowest(losses)
    pairs = zip(losses[kept], losses[best], strict=True)
    mean, half = interval([a - b for a, b in pairs], CONFIDENCE)
    return "best too" if best == kept else f"{mean:+.3f} ± {half:.3f}"


def kept_of(runs: Sequence[Run]) -> str:
    """Returns a table of what it costs to keep the best rate of the smallest model."""
    heads = ["arm", "best rate at width 64", *(f"{a} {n}" for a, n in LARGER)]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]

    for arm in dict.fromkeys(run["arm"] for run in runs):
        kept = lowest(losses_at(runs, arm=arm))
        cells = []
        for axis, size in LARGER:
            losses = losses_at(runs, arm=arm, **{axis: size})
            if not losses:
                cells.append("")
                continue
            cells.append(_cost(losses, kept))
        lines.append(f"| {arm} | {kept:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def transfer_of(runs: Sequence[Run]) -> tuple[str, list[Answer]]:
    """Returns tables of rates, and the answers, from the runs of `transfer`."""
    arms, seeds = (list(dict.fromkeys(run[k] for run in runs)) for k in ("arm", "seed"))

    found = {
        (axis, arm): np.array(
            [[_best(runs, arm=arm, seed=s, **{axis: n}) for n in sizes] for s in seeds]
        )
        for axis, sizes in AXES.items()
        for arm in arms
        if losses_at(runs, arm=arm, **{axis: sizes[-1]})
    }
    heads = ["arm", *(f"{axis} {n}" for axis, sizes in AXES.items() for n in sizes)]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for arm in arms:
        cells = []
        for axis, sizes in AXES.items():
            rates = found.get((axis, arm))
            cells += [""] * len(sizes) if rates is None else map(_rate, rates.T)
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    answers = [
        judge(
            f"The best learning rate does not depend on the {NAMES[axis]}",
            f"octaves from {AXES[axis][0]} to {AXES[axis][-1]}, {arm}",
            _octaves(AXES[axis], rates),
            *(-0.5, 0.5),
        )
        for (axis, arm), rates in found.items()
    ]
    return "\n\n".join(["\n".join(lines), kept_of(runs)]), answers


def _best(runs: Sequence[Run], **model: Any) -> float:
    """Returns `best_rate` of the one run of this model and seed at each rate."""
    losses = losses_at(runs, **model)
    return best_rate({rate: found[0] for rate, found in losses.items()})


def _octaves(sizes: Sequence[int], rates: np.ndarray) -> list[float]:
    """Returns by how many octaves the best rate moves, by least squares, by seed.

    `rates` has the logarithms of the best rates, of shape (seeds, sizes).
    """
    if not np.isfinite(rates).all():
        return [math.nan]
    x = np.log2(sizes)
    return (np.polyfit(x, rates.T, 1)[0] * (x[-1] - x[0])).tolist()


NAMES = {"width": "width", "layers": "number of layers"}


def gained_of(scaled: Sequence[Run], plain: Sequence[Run]) -> str:
    """Returns a table of losses at the best rate of the smallest model.

    Each cell is the loss with scaled rates less that without, seed by seed.
    """
    heads = ["arm", "rate", *(f"{axis} {size}" for axis, size in LARGER)]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for arm in dict.fromkeys(run["arm"] for run in scaled):
        kept = lowest(losses_at(scaled, arm=arm))
        cells = []
        for axis, size in LARGER:
            model = {"width": 64, "layers": 1, axis: size}
            model |= {"arm": arm, "learning_rate": kept}
            with_factors, without = (
                {r["seed"]: loss_of(r) for r in runs if model.items() <= r.items()}
                for runs in (scaled, plain)
            )
            seeds = sorted(with_factors.keys() & without.keys())
            gaps = [with_factors[seed] - without[seed] for seed in seeds]
            text = (
                "{:+.3f} ± {:.3f}".format(*interval(gaps, CONFIDENCE)) if gaps else ""
            )
            cells.append(text)
        lines.append(f"| {arm} | {kept:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def auxiliary_of(runs: Sequence[Run]) -> tuple[str, list[Answer]]:
    """Returns a table of losses by model and rate, from the runs of `auxiliary`."""
    rates = sorted({run["learning_rate"] for run in runs})
    heads = ["model", "rates", *(f"{rate:g}" for rate in rates)]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for width, layers in dict.fromkeys((run["width"], run["layers"]) for run in runs):
        rows = {
            scaled: losses_at(runs, width=width, layers=layers, scaled=scaled)
            for scaled in (False, True)
        }
        model = f"width {width}" + (f", {layers} layers" if layers > 1 else "")
        for scaled, losses in rows.items():
            cells = [f"{statistics.mean(losses[rate]):.3f}" for rate in rates]
            kind = "scaled" if scaled else "the same"
            lines.append(f"| {model} | {kind} | {' | '.join(cells)} |")
        gaps = [
            [b - a for a, b in zip(rows[False][r], rows[True][r], strict=True)]
            for r in rates
        ]
        cells = ["{:+.3f} ± {:.3f}".format(*interval(x, CONFIDENCE)) for x in gaps]
        lines.append(f"| {model} | difference | {' | '.join(cells)} |")
    return "\n".join(lines), []


def tokens_of(runs: Sequence[Run]) -> tuple[str, list[Answer]]:
    """Returns a table of losses by steps and rate, and the answers, from `tokens`."""
    steps, rates, seeds = (
        sorted({run[name] for run in runs})
        for name in ("steps", "learning_rate", "seed")
    )
    best = np.array([[_best(runs, seed=s, steps=n) for n in steps] for s in seeds])
    kept = lowest(losses_at(runs, steps=steps[0]))
    heads = [
        "steps",
        *(f"{rate:g}" for rate in rates),
        "best rate",
        f"cost of {kept:g}",
    ]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for n, logarithms in zip(steps, best.T, strict=True):
        losses = losses_at(runs, steps=n)
        cells = [f"{statistics.mean(losses[rate]):.3f}" for rate in rates]
        cells += [_rate(logarithms), _cost(losses, kept)]
        lines.append(f"| {n} | {' | '.join(cells)} |")
    number = f"octaves from {steps[0]} to {steps[-1]} steps, muonh"
    moved, law = _octaves(steps, best), -0.32 * math.log2(steps[-1] / steps[0])
    same = "The best learning rate does not depend on the number of steps"
    hyperp = "It falls as the number of steps to the power of -0.32"
    return "\n".join(lines), [
        judge(same, number, moved, -0.5, 0.5),
        judge(hyperp, number, moved, round(law, 2) - 0.5, round(law, 2) + 0.5),
    ]


def coordinates_of(runs: Sequence[Run]) -> tuple[str, list[Answer]]:
    """Returns a table of exponents, and the answers, from the runs of `coordinates`."""
    names, sizes = list(runs[0]["exponents"]), list(runs[0]["steps"])
    columns = [f"steps: {size.replace('_', ' ')}" for size in sizes]
    heads = ["arm", "rates", *names, *columns]
    lines, answers = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"], []
    for arm, scaled in dict.fromkeys((run["arm"], run["scaled"]) for run in runs):
        mine = [r for r in runs if (r["arm"], r["scaled"]) == (arm, scaled)]
        last = {n: [run["exponents"][n][-1] for run in mine] for n in names}
        last |= {n: [_exponent(run["steps"][n]) for run in mine] for n in sizes}
        kind = "scaled" if scaled else "the same"
        cells = [
            "{:+.2f} ± {:.2f}".format(*interval(x, CONFIDENCE)) for x in last.values()
        ]
        lines.append(f"| {arm} | {kind} | {' | '.join(cells)} |")
        number = f"exponent of the head's outputs, {arm}, {kind}"
        changes = "Outputs change as much at all widths"
        answers.append(judge(changes, number, last["head"], -0.25, 0.25))
    return "\n".join(lines), answers


def _exponent(sizes: Sequence[float]) -> float:
    """Returns p of sizes that grow as the width to the power of p."""
    return float(np.polyfit(np.log(scaling.WIDTHS), np.log(sizes), 1)[0])


def _rate(logarithms: np.ndarray) -> str:
    """Returns the geometric mean of rates, or in which direction one was not found."""
    if np.isfinite(logarithms).all():
        return f"{2 ** logarithms.mean():.2g}"
    return "higher" if logarithms.max() == math.inf else "lower"


def table(answers: Sequence[Answer]) -> str:
    """Returns answers as Markdown."""
    heads = ["claim", "number", "measured", "claimed", "answer"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(answer)} |" for answer in answers)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--plots", type=Path, help="write plots into this folder too")
    given = parser.parse_args()
    studies: dict[str, list[Run]] = {}
    for run in (run for path in given.runs for run in read(path)):
        studies.setdefault(run["study"], []).append(run)
    for study, runs in studies.items():
        found = ANSWERS[study](runs)
        losses, answers = found if isinstance(found, tuple) else ("", found)
        print(f"{study}\n\n{losses}\n")
        if answers:
            print(f"{table(answers)}\n")
        if study == "scaled" and "transfer" in studies:
            print(f"{gained_of(runs, studies['transfer'])}\n")
        plot = getattr(claims_plots, study, None)
        if given.plots and plot:
            plot(runs, given.plots / f"convergence_{study}.png")


ANSWERS = {
    "dynamics": dynamics_of,
    "flattening": flattening_of,
    "rates": rates_of,
    "transfer": transfer_of,
    "scaled": transfer_of,
    "auxiliary": auxiliary_of,
    "tokens": tokens_of,
    "coordinates": coordinates_of,
}


if __name__ == "__main__":
    main()
