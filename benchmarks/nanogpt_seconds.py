"""Measures the steps and seconds until nanoGPT `tiny` reaches AdamW's final loss.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.nanogpt_seconds --out NAME.json
    python -m benchmarks.nanogpt_seconds --table SWEEP.json NAME.json

The steps come from the runs of `nanogpt_sweep` (with `--val-every 10`): for each seed,
the first validation at or below the final loss of AdamW with the same seed. The seconds
per step are measured here, because the sweep runs two processes at a time. The
optimizers take turns of ten whole training steps, so that every turn contains a
refresh, and the median over the turns is reported. The seconds of a run are its steps
times the seconds per step.
"""

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks import nanogpt_sweep, step_time
from examples.nanogpt import batches, configs, data, sharding, train

CYCLE = 10


class Run:
    """A training run that can be continued by ten steps at a time."""

    def __init__(self, optimizer: str, preset: str):
        config = dataclasses.replace(configs.PRESETS[preset], optimizer=optimizer)
        config = configs.resolve(config)
        mesh = sharding.make_mesh(config.mesh, config.mesh_axes)
        dataset = data.load(config.data)
        self.windows = batches.Batches(dataset, config, mesh)
        graph, tx, self.state = train.initial(config, dataset.vocab_size, mesh)
        self.step = train.make_step(graph, tx, mesh, like=self.state)
        self.count = 0

    def __call__(self) -> float:
        """Takes ten steps and returns the seconds they took."""
        given = [self.windows.train(self.count + i) for i in range(CYCLE)]
        begin = time.perf_counter()
        for windows in given:
            self.state, _ = self.step(self.state, windows)
        jax.block_until_ready(self.state)
        self.count += CYCLE
        return time.perf_counter() - begin


def measure(optimizers: list[str], repeats: int, preset: str) -> dict[str, Any]:
    runs = {name: Run(name, preset) for name in optimizers}
    for run in runs.values():
        run()  # compiles, and computes the first bases or roots
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            gc.collect()
            seconds[name].append(run() / CYCLE)
    return {
        name: {"seconds_a_step": statistics.median(found), "raw": found}
        for name, found in seconds.items()
    }


def steps_to(run: dict[str, Any], loss: float) -> int | None:
    """Returns the first validated step with a loss at or below `loss`."""
    return next((step for step, value in run["validation"] if value <= loss), None)


def table(sweep: str | Path, seconds: str | Path) -> str:
    """Returns steps and seconds as Markdown, fewest steps first."""
    runs = json.loads(Path(sweep).read_text())
    a_step = json.loads(Path(seconds).read_text())["optimizers"]
    best = nanogpt_sweep.final_runs(runs)
    target = {run["seed"]: run["loss"] for run in best["adamw"]}
    rows = []
    for name, mine in best.items():
        taken = [steps_to(run, target[run["seed"]]) for run in mine]
        each = a_step[name]["seconds_a_step"]
        slow = each / a_step["adamw"]["seconds_a_step"]
        reached = [steps for steps in taken if steps is not None]
        if len(reached) < len(taken):
            steps, whole = f"{len(reached)} of {len(taken)} runs get there", "-"
            order = float("inf")
        else:
            order = statistics.mean(reached)
            steps = f"{order:.0f} ± {statistics.stdev(reached):.0f}"
            whole = f"{order * each:.1f}"
        rows.append(
            (
                order,
                f"| {name} | {steps} | {each * 1e3:.0f} | {slow:.2f} | {whole} |",
            )
        )
    head = (
        "| optimizer | steps ± σ | ms a step | over AdamW's | seconds |\n"
        "| --- | --- | --- | --- | --- |\n"
    )
    return head + "\n".join(row for _, row in sorted(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="file to write the seconds to")
    parser.add_argument(
        "--table", nargs=2, help="print the table of two files and exit"
    )
    parser.add_argument(
        "--optimizers", nargs="+", default=list(nanogpt_sweep.SECOND_ORDER)
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--preset", default="tiny")
    args = parser.parse_args()
    if args.table:
        print(table(*args.table))
        return
    if not args.out:
        parser.error("one of --out and --table is needed")
    result = {
        "command": " ".join(["python -m benchmarks.nanogpt_seconds", *sys.argv[1:]]),
        "environment": step_time.environment(),
        "repeats": args.repeats,
        "optimizers": measure(args.optimizers, args.repeats, args.preset),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
