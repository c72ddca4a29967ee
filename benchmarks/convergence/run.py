"""Tunes every arm and trains the best of each on fresh seeds.

    python -m benchmarks.convergence.run tiny-250 --out RUNS.jsonl --arms muon halley

Each line of the file is one run, with all that is needed to repeat it at its commit.
The same command continues an existing file.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import threading
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optax

from benchmarks import jobs
from benchmarks.convergence import tune
from benchmarks.convergence.arms import ARMS
from benchmarks.jobs import read
from benchmarks.trial import Trial
from examples.nanogpt import configs, data, record

PROTOCOLS: Mapping[str, Mapping[str, Any]] = tomllib.loads(
    Path(__file__).with_name("protocol.toml").read_text()
)
Run = dict[str, Any]


def fit(
    config: configs.Config,
    optimizer: optax.GradientTransformation,
    every: int,
    go_on: Callable[[int, float], bool] = lambda step, loss: True,
) -> Run:
    """Trains once.

    Args:
      config: The configuration.
      optimizer: The optimizer of all parameters.
      every: Steps between validations; one is at the end.
      go_on: Returns whether to continue, given the step and the loss of a validation.

    Returns:
      The last validation loss (None if it is not finite, which ends the run, because
      JSON has no NaN), the finite ones with their steps, and what identifies data,
      versions and machine.
    """
    trial = Trial(config, optimizer)
    curve, seconds, loss = [], 0.0, math.nan
    while trial.count < config.steps:
        seconds += trial.advance(min(every, config.steps - trial.count))
        loss = trial.validate()
        if not math.isfinite(loss):
            break
        curve.append((trial.count, loss))
        if not go_on(trial.count, loss):
            break
    return {
        "loss": loss if math.isfinite(loss) else None,
        "curve": curve,
        "seconds": round(seconds, 2),
        "data_sha256": trial.dataset.sha256,
        **record.environment(),
    }


def train(
    protocol: Mapping[str, Any], arm: str, values: tune.Values, seed: int, phase: str
) -> Run:
    """Does one run of a protocol.

    Args:
      protocol: A table of protocol.toml.
      arm: A name from ARMS.
      values: The values of what is tuned.
      seed: The seed of the parameters and of the order of the data.
      phase: "search", which validates at the end only, or "final".
    """
    preset = configs.PRESETS[protocol["config"]]
    config = dataclasses.replace(preset, seed=seed, **protocol["fields"])
    config = configs.resolve(config)
    expected = protocol.get("data_sha256")
    found = data.load(config.data).sha256 if expected else None
    if found != expected:
        raise ValueError(
            f"the protocol is for a text with SHA-256 {expected}, and that of "
            f"{config.data} is {found}: install another version of it"
        )
    every = config.steps if phase == "search" else protocol["val_every"]
    about = {"arm": arm, "phase": phase, "seed": seed, "values": dict(values)}
    return {**about, **fit(config, ARMS[arm].make(values, config), every)}


def loss_of(run: Run) -> float:
    """Returns a loss that can be compared: infinite for a run that diverged."""
    return math.inf if run["loss"] is None else run["loss"]


def of(runs: Sequence[Run], arm: str, phase: str) -> list[Run]:
    """Returns the runs of an arm in the search or after it."""
    return [run for run in runs if (run["arm"], run["phase"]) == (arm, phase)]


def best_of(runs: Sequence[Run]) -> tune.Values:
    """Returns the values of the run with the lowest loss; {} if there is none."""
    return min(runs, key=loss_of)["values"] if runs else {}


class Bench:
    """The runs of a protocol: those of a file and those that are still missing."""

    def __init__(self, name: str, arms: Sequence[str], path: Path):
        self.name, self.arms, self.path = name, arms, path
        self.protocol, self.runs = PROTOCOLS[name], read(path)
        others = {run["protocol"] for run in self.runs} - {name}
        if others:
            raise ValueError(
                f"{path} has runs of {', '.join(sorted(others))}, not of {name}: "
                "name another file"
            )
        self.lock, self.begin, self.done = threading.Lock(), time.perf_counter(), 0

    @property
    def total(self) -> int:
        """The number of runs of all arms, if no search converges before its end."""
        return len(self.arms) * (self.protocol["trials"] + len(self.protocol["seeds"]))

    def missing(self) -> int:
        """Returns how many of them are still to do."""
        return self.total - sum(run["arm"] in self.arms for run in self.runs)

    def minutes_left(self) -> float:
        """Returns an estimate, from the runs since `run` was called."""
        elapsed = (time.perf_counter() - self.begin) / 60
        return elapsed / self.done * self.missing()

    def add(self, run: Run) -> None:
        """Adds a run to the file and reports."""
        run = {"protocol": self.name, **run}
        with self.lock:
            self.runs.append(run)
            self.done += 1
            if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
                # The last line was cut off.
                self.path.write_text("".join(json.dumps(r) + "\n" for r in self.runs))
            else:
                with self.path.open("a") as file:
                    file.write(json.dumps(run) + "\n")
            values = ", ".join(f"{k} {v:.4g}" for k, v in run["values"].items())
            print(
                f"[{self.total - self.missing()}/{self.total}] {run['arm']} ({values}) "
                f"seed {run['seed']}: {loss_of(run):.4f}; about "
                f"{self.minutes_left():.0f} minutes left",
                flush=True,
            )

    def one_arm(self, pool: concurrent.futures.Executor, arm: str) -> None:
        """Does the runs of one arm that are missing."""
        protocol = self.protocol
        start = protocol.get("start", ARMS[arm].start)

        def done(phase: str) -> list[Run]:
            with self.lock:
                return of(self.runs, arm, phase)

        def run(values: tune.Values, seed: int, phase: str) -> None:
            self.add(pool.submit(train, protocol, arm, values, seed, phase).result())

        while len(tried := done("search")) < protocol["trials"]:
            losses = [(each["values"], loss_of(each)) for each in tried]
            values = tune.next_values(start, losses)
            if values is None:
                break
            run(values, protocol["search_seed"], "search")
        have = {each["seed"] for each in done("final")}
        for seed in protocol["seeds"]:
            if seed not in have:
                run(best_of(done("search")) or start, seed, "final")

    def run(self, pool: concurrent.futures.Executor, workers: int) -> None:
        """Does all runs that are missing.

        Args:
          pool: What trains.
          workers: How many arms are worked on at a time.
        """
        minutes = self.protocol["minutes"] * self.missing() / workers
        print(f"{self.missing()} runs, about {minutes:.0f} minutes", flush=True)
        self.begin, self.done = time.perf_counter(), 0
        with concurrent.futures.ThreadPoolExecutor(workers) as threads:
            jobs = [threads.submit(self.one_arm, pool, arm) for arm in self.arms]
            for job in jobs:
                job.result()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("protocol", choices=PROTOCOLS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, required=True)
    parser.add_argument("--workers", type=int, default=2, help="concurrent processes")
    arguments = parser.parse_args()
    bench = Bench(arguments.protocol, arguments.arms, arguments.out)
    with jobs.processes(arguments.workers) as pool:
        bench.run(pool, arguments.workers)


if __name__ == "__main__":
    main()
