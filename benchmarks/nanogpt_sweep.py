"""Trains nanoGPT `tiny` with several optimizers, with the same effort for each.

For every optimizer, `--trials` learning rates are tried with seed 0. The best one is
then run with seeds 1, 2 and 3, which were not used for the choice. The first three
rates are a factor of 2 apart. If the best rate so far is the smallest or the largest
tried, the next trial is a factor of 2 beyond it; otherwise it is the geometric mean of
the best rate and its better neighbour. The auxiliary optimizer of the matrix optimizers
keeps the settings of the example.

    python -m benchmarks.nanogpt_sweep --out benchmarks/results/nanogpt_tiny.json
    python -m benchmarks.nanogpt_sweep --table benchmarks/results/nanogpt_tiny.json

Every run is written to the file when it ends. The same command continues an existing
file.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import statistics
import threading
from pathlib import Path
from typing import Any

CENTRES = {
    "adamw": 4e-3,
    "lion": 8e-4,
    "muon": 0.03,
    "muonh": 0.03,
    "normuon": 0.03,
    "hopper": 6e-3,
    "shampoo": 4e-3,
    "soap": 4e-3,
    "kl_soap": 4e-3,
    "soap_muon": 0.03,
}
FINAL_SEEDS = (1, 2, 3)
SECOND_ORDER = ("adamw", "muon", "shampoo", "soap", "kl_soap", "soap_muon")


def train_once(
    optimizer: str, lr: float, seed: int, preset: str, val_every: int
) -> dict[str, Any]:
    """Trains once, in one thread, so that two concurrent runs use two cores."""
    os.environ["XLA_FLAGS"] = (
        "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    )
    import dataclasses

    from examples.nanogpt import configs, train

    config = dataclasses.replace(
        configs.PRESETS[preset],
        optimizer=optimizer,
        lr=lr,
        seed=seed,
        val_every=val_every,
        out=None,
        quiet=True,
        sample=0,
    )
    result = train.train(config)
    records = result.pop("records")
    begin = next(r for r in records if r["kind"] == "run")
    curve = [(r["step"], r["loss"]) for r in records if r["kind"] == "val"]
    run = {"optimizer": optimizer, "lr": lr, "seed": seed, "validation": curve}
    return {**run, **result, "begin": begin}


def next_rate(tried: dict[float, float], centre: float) -> float:
    """Returns the next learning rate, given the losses of those tried."""
    first = [centre, centre / 2, centre * 2]
    if len(tried) < len(first):
        return first[len(tried)]
    rates = sorted(tried)
    best = min(tried, key=lambda rate: tried[rate])
    place = rates.index(best)
    if place == 0:
        return best / 2
    if place == len(rates) - 1:
        return best * 2
    neighbour = min(rates[place - 1], rates[place + 1], key=lambda rate: tried[rate])
    return math.sqrt(best * neighbour)


def finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def sweep(args: argparse.Namespace) -> None:
    path = Path(args.out)
    runs: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    lock = threading.Lock()
    context = multiprocessing.get_context("spawn")

    def run(pool: Any, optimizer: str, lr: float, seed: int) -> None:
        settings = (optimizer, lr, seed, args.preset, args.val_every)
        result = pool.submit(train_once, *settings).result()
        with lock:
            runs.append(result)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(runs, indent=1) + "\n")
            partial.replace(path)
        print(
            f"{optimizer:8} lr {lr:.3g} seed {seed}: {result['loss']:.4f} in "
            f"{result['seconds']:.0f} s",
            flush=True,
        )

    def one_optimizer(pool: Any, name: str) -> None:
        def tried() -> dict[float, float]:
            with lock:
                mine = [r for r in runs if r["optimizer"] == name and r["seed"] == 0]
            return {r["lr"]: finite(r["loss"]) for r in mine}

        while len(tried()) < args.trials:
            run(pool, name, next_rate(tried(), CENTRES[name]), 0)
        best = min(tried(), key=lambda rate: tried()[rate])
        done = {r["seed"] for r in runs if (r["optimizer"], r["lr"]) == (name, best)}
        for seed in FINAL_SEEDS:
            if seed not in done:
                run(pool, name, best, seed)

    with (
        concurrent.futures.ProcessPoolExecutor(args.workers, context) as pool,
        concurrent.futures.ThreadPoolExecutor(args.workers) as threads,
    ):
        jobs = [threads.submit(one_optimizer, pool, n) for n in args.optimizers]
        for job in jobs:
            job.result()


def trials_of(name: str, runs: list[dict[str, Any]]) -> dict[float, float]:
    """Returns the losses of the learning rates tried with seed 0."""
    mine = [run for run in runs if run["optimizer"] == name and run["seed"] == 0]
    return {run["lr"]: finite(run["loss"]) for run in mine}


def final_runs(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns, by optimizer, the runs of the final seeds at its best learning rate."""
    found = {}
    for name in dict.fromkeys(run["optimizer"] for run in runs):
        trials = trials_of(name, runs)
        best = min(trials, key=lambda rate: trials[rate])
        found[name] = [
            run
            for run in runs
            if (run["optimizer"], run["lr"]) == (name, best)
            and run["seed"] in FINAL_SEEDS
        ]
        if len(found[name]) < len(FINAL_SEEDS):
            raise ValueError(
                f"{name} has {len(found[name])} runs at its best learning rate, and "
                f"not one for each of the seeds {FINAL_SEEDS}: continue the sweep"
            )
    return found


def table(path: str | Path) -> str:
    """Returns the results as Markdown, best first."""
    runs = json.loads(Path(path).read_text())
    rows = []
    for name, mine in final_runs(runs).items():
        trials = trials_of(name, runs)
        best, final = mine[0]["lr"], [run["loss"] for run in mine]
        edge = "" if min(trials) < best < max(trials) else " (edge)"
        tried = ", ".join(f"{rate:.3g}" for rate in sorted(trials))
        rows.append(
            (
                statistics.mean(final),
                f"| {name} | {best:.3g}{edge} | {statistics.mean(final):.4f} ± "
                f"{statistics.stdev(final):.4f} | {trials[best]:.4f} | {tried} |",
            )
        )
    head = (
        "| optimizer | learning rate | validation loss ± σ (seeds 1, 2, 3) | seed 0 | "
        "rates tried with seed 0 |\n| --- | --- | --- | --- | --- |\n"
    )
    return head + "\n".join(row for _, row in sorted(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="file of results to write or continue")
    parser.add_argument("--table", help="print the table of a file and exit")
    parser.add_argument("--optimizers", nargs="+", default=list(CENTRES))
    parser.add_argument(
        "--trials", type=int, default=4, help="learning rates per optimizer"
    )
    parser.add_argument("--preset", default="tiny")
    parser.add_argument(
        "--val-every", type=int, default=100, help="steps between validations"
    )
    parser.add_argument("--workers", type=int, default=2, help="concurrent processes")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
    elif args.out:
        sweep(args)
    else:
        parser.error("one of --out and --table is needed")


if __name__ == "__main__":
    main()
