"""Plots the losses of several runs in one figure.

python -m examples.nanogpt.plot runs/tiny-adamw-0 runs/tiny-muon-0 --out loss.png
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

if not __package__:  # run as a file: `python examples/nanogpt/plot.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.nanogpt import record


def read(folder: str | Path) -> list[dict[str, Any]]:
    """Reads the records of a run."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"no metrics.jsonl in {folder}: is it the folder of a run?"
        )
    return record.read(path)


def plot(folders: Sequence[str | Path], out: str | Path) -> None:
    """Writes a PNG: thin lines for training losses, markers for validation losses."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, folder in enumerate(folders):
        records, color = read(folder), f"C{index % 10}"
        for kind, style in (
            ("train", {"alpha": 0.3, "linewidth": 1}),
            ("val", {"marker": "o", "markersize": 4}),
        ):
            points = [(r["step"], r["loss"]) for r in records if r["kind"] == kind]
            if points:
                label = f"{Path(folder).resolve().name}: {points[-1][1]:.4f}"
                label = label if kind == "val" else None
                axes.plot(*zip(*points, strict=True), color=color, label=label, **style)
    axes.set(xlabel="step", ylabel="loss in nats per token (markers: validation)")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Plots the losses of several runs in one figure."
    )
    parser.add_argument("runs", nargs="+", help="folders of runs, one line each")
    parser.add_argument("--out", default="loss.png", help="output PNG (loss.png)")
    arguments = parser.parse_args()
    plot(arguments.runs, arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
