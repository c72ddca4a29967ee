"""Prints the table of a protocol's runs, and plots them.

python -m benchmarks.convergence.report RUNS.jsonl [--seconds SECONDS.json]
python -m benchmarks.convergence.report RUNS.jsonl --plot PLOT.png
"""

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

import optax_matrix as om
from benchmarks.convergence import tune
from benchmarks.convergence.arms import ARMS, OPTIMIZERS
from benchmarks.convergence.evidence import Difference, difference, steps_to
from benchmarks.convergence.run import PROTOCOLS, Run, loss_of, of
from benchmarks.jobs import read


class Row(NamedTuple):
    """What the runs of one arm say.

    Attributes:
      arm: Its name.
      values: The values of the best trial.
      edge: Those of them at the end of what was tried, if more than one was.
      losses: The losses by seed.
      against: The difference from the baseline; None if it has no final runs.
      steps: The steps to the target by seed; None for runs that do not get there.
    """

    arm: str
    values: tune.Values
    edge: Sequence[str]
    losses: Mapping[int, float]
    against: Difference | None
    steps: Sequence[float | None]

    @property
    def mean(self) -> float:
        return statistics.mean(self.losses.values())


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Returns the rows of all arms with final runs, the lowest loss first."""
    protocol = PROTOCOLS[runs[0]["protocol"]]

    def losses_of(arm: str) -> dict[int, float]:
        return {run["seed"]: loss_of(run) for run in of(runs, arm, "final")}

    baseline, rows = losses_of(protocol["baseline"]), []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        losses, trials = losses_of(arm), of(runs, arm, "search")
        if not losses:
            continue
        values = of(runs, arm, "final")[0]["values"]
        tried = {name: {run["values"][name] for run in trials} for name in values}
        varied = {name: found for name, found in tried.items() if len(found) > 1}
        edge = [k for k, v in varied.items() if values[k] in (min(v), max(v))]
        against = None
        if baseline:
            rule = {name: protocol[name] for name in ("confidence", "margin")}
            against = difference(losses, baseline, **rule)
        curves = [run["curve"] for run in of(runs, arm, "final")]
        steps = [steps_to(protocol["target"], curve) for curve in curves]
        rows.append(Row(arm, values, edge, losses, against, steps))
    return sorted(rows, key=lambda row: row.mean)


def equivalents(polar: om.PolarMethod | None) -> str:
    """Returns the FLOPs of a method in products XXᵀ, for a square and a 4:1 matrix."""
    flops, m = getattr(polar, "flops", None), 128
    if flops is None:
        return ""

    def products(n: int) -> str:
        return f"{flops(m, n, 'float32', 'cpu') / (2 * m * m * n):.3g}"

    return f"{products(m)}; {products(4 * m)}"


def table(runs: Sequence[Run], seconds: Mapping[str, float] | None = None) -> str:
    """Returns the table in Markdown.

    Args:
      runs: The runs of one protocol.
      seconds: The seconds of a training step by arm.
    """
    protocol = PROTOCOLS[runs[0]["protocol"]]
    seconds = seconds or {}
    base = protocol["baseline"]
    heads = ["arm", "tuned values", "products", "loss ± σ", f"less {base}'s", "verdict"]
    curves = protocol["val_every"] < protocol["fields"]["steps"]
    if curves:
        heads += [f"steps to {protocol['target']}", "ms a step", "seconds to it"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row in rows_of(runs):
        values = ", ".join(
            f"{name} {value:.3g}{'*' if name in row.edge else ''}"
            for name, value in row.values.items()
        )
        cells = [row.arm, values, equivalents(ARMS[row.arm].polar)]
        cells += [_loss(row), *_gap(row, base)]
        cells += _speed(row, seconds.get(row.arm)) if curves else ()
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _speed(row: Row, seconds: float | None) -> tuple[str, str, str]:
    """Returns the steps to the target, the milliseconds of each, and their seconds."""
    step = f"{seconds * 1e3:.0f}" if seconds else ""
    reached = [step for step in row.steps if step is not None]
    if len(reached) < len(row.steps):
        return f"{len(reached)} of {len(row.steps)} get there", step, ""
    steps = statistics.mean(reached)
    return f"{steps:.0f}", step, f"{steps * seconds:.1f}" if seconds else ""


# Optimizers of the library, by the names of their arms.
HEADLINES: Mapping[str, str] = {
    **{arm: f"`{arm}`" for arm in OPTIMIZERS if arm in om.OPTIMIZERS},
    "entry+halley+neuron": "`halley_muon`",
    "soap_refresh_1": "`soap`, refreshed in every update",
    "kl_soap_refresh_1": "`kl_soap`, refreshed in every update",
}


def headlines(runs: Sequence[Run]) -> str:
    """Returns a short table in Markdown, of the optimizers of the library."""
    base = PROTOCOLS[runs[0]["protocol"]]["baseline"]
    lines = [f"| optimizer | loss | less `{base}`'s | |", "| --- | --- | --- | --- |"]
    for row in rows_of(runs):
        if row.arm not in HEADLINES:
            continue
        cells = [HEADLINES[row.arm], _loss(row), *_gap(row, base)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _loss(row: Row) -> str:
    if not math.isfinite(row.mean):
        return "diverged"
    sigma = statistics.stdev(row.losses.values()) if len(row.losses) > 1 else 0.0
    return f"{row.mean:.4f} ± {sigma:.4f}"


def _gap(row: Row, base: str) -> tuple[str, str]:
    """Returns the difference from the baseline and its verdict, if there is one."""
    if not row.against or row.arm == base or not math.isfinite(row.mean):
        return "", ""
    gap = f"{row.against.mean:+.3f} ± {row.against.half_width:.3f}"
    return gap, row.against.verdict


def plot(runs: Sequence[Run], path: Path) -> None:
    """Plots the differences from the baseline with their intervals, and all trials."""
    protocol, rows = PROTOCOLS[runs[0]["protocol"]], rows_of(runs)
    rows = [row for row in rows if row.against and math.isfinite(row.mean)]
    figure = Figure(figsize=(8, 1 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    base = next(row.losses for row in rows if row.arm == protocol["baseline"])
    for place, row in enumerate(rows):
        assert row.against
        mean, half = row.against.mean, row.against.half_width
        half = half if math.isfinite(half) else 0.0
        axes.errorbar(mean, place, xerr=half, fmt="o", color="C0", capsize=3)
        own = [loss - base[seed] for seed, loss in row.losses.items() if seed in base]
        axes.plot(own, [place] * len(own), "|", color="0.6")
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.axvline(protocol["margin"], color="0.5", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), [row.arm for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(
        f"validation loss less that of {protocol['baseline']}; bars: "
        f"{protocol['confidence']:.0%} interval of the mean, ticks: each seed"
    )
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seconds", type=Path, help="a result of seconds.py")
    parser.add_argument("--plot", type=Path, help="write a plot instead")
    arguments = parser.parse_args()
    runs = read(arguments.runs)
    if arguments.plot:
        plot(runs, arguments.plot)
        return
    seconds = {}
    if arguments.seconds:
        arms = json.loads(arguments.seconds.read_text())["arms"]
        seconds = {arm: measured["seconds"] for arm, measured in arms.items()}
    print(table(runs, seconds))


if __name__ == "__main__":
    main()
