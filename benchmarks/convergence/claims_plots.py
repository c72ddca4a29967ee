"""Plots the runs of each study of claims.py."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.convergence import scaling
from benchmarks.convergence.run import Run, loss_of
from optax_matrix.diagnostics import CoordinateCheck

MEASURES: Mapping[str, Callable[[Any], float]] = {
    "Frobenius norm of the weights": lambda point: point["norm"],
    "relative step": lambda point: point["relative_step"],
    "spectral entropy over its maximum": lambda point: point["weights"]["entropy"],
    "participation ratio over its maximum": lambda point: point["weights"][
        "participation"
    ],
}


def dynamics(runs: Sequence[Run], path: Path) -> None:
    """Plots norm, relative step, entropy and participation ratio over the steps."""
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    for axes, (title, of) in zip(figure.subplots(1, 4), MEASURES.items(), strict=True):
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


def flattening(runs: Sequence[Run], path: Path) -> None:
    """Plots the share of singular values near 1 over the Newton-Schulz steps."""
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.subplots()
    for place, of in enumerate(("momentum", "gradient")):
        for seed, run in enumerate(runs):
            columns = zip(*(point[of] for point in run["points"]), strict=True)
            shares = [statistics.mean(column) for column in columns]
            axes.plot(shares, color=f"C{place}", label=None if seed else of)
    axes.set(xlabel="Newton-Schulz steps", ylabel="share in [0.5, 1.5]", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=130)


def rates(runs: Sequence[Run], path: Path) -> None:
    """Plots the loss over the learning rate."""
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.subplots()
    for arm in dict.fromkeys(run["arm"] for run in runs):
        _losses(axes, [run for run in runs if run["arm"] == arm], arm)
    axes.set(xlabel="learning rate", ylabel="validation loss")
    axes.legend()
    figure.savefig(path, dpi=130)


def transfer(runs: Sequence[Run], path: Path) -> None:
    """Plots the loss over the learning rate, by width and by depth."""
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure = Figure(figsize=(2.6 * len(arms), 5), layout="constrained")
    grid = figure.subplots(2, len(arms), squeeze=False)
    fixed = {"width": ("layers", 1), "layers": ("width", 64)}
    for row, (axis, (other, value)) in zip(grid, fixed.items(), strict=True):
        for axes, arm in zip(row, arms, strict=True):
            mine = [run for run in runs if run["arm"] == arm and run[other] == value]
            for size in sorted({run[axis] for run in mine}):
                some = [run for run in mine if run[axis] == size]
                _losses(axes, some, f"{axis} {size}")
            axes.set(title=arm, xlabel="learning rate")
        row[0].set_ylabel("validation loss")
        row[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


scaled = transfer


def coordinates(runs: Sequence[Run], path: Path) -> None:
    """Plots the changes of activations over the width, as means over the seeds."""
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure = Figure(figsize=(2.8 * len(arms), 5), layout="constrained")
    grid = figure.subplots(2, len(arms), squeeze=False, sharey=True)
    for row, is_scaled in zip(grid, (False, True), strict=True):
        for axes, arm in zip(row, arms, strict=True):
            mine = [r for r in runs if (r["arm"], r["scaled"]) == (arm, is_scaled)]
            means = {
                measure: {
                    name: np.mean([run[measure][name] for run in mine], axis=0)
                    for name in mine[0][measure]
                }
                for measure in ("changes", "exponents")
            }
            CoordinateCheck(scaling.WIDTHS, **means).plot(axes)
            axes.set(title=f"{arm}, {'scaled rates' if is_scaled else 'one rate'}")
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _losses(axes: Any, runs: Sequence[Run], label: str) -> None:
    """Plots the mean loss over seeds at each learning rate."""
    rates = sorted({run["learning_rate"] for run in runs})
    losses = [
        statistics.mean(loss_of(run) for run in runs if run["learning_rate"] == rate)
        for rate in rates
    ]
    axes.semilogx(rates, losses, "o-", base=2, label=label, markersize=3)
