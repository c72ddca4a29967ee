"""Trains what is needed to answer the claims about Hopper, with examples/rl.

    python -m benchmarks.rl.study rates --out RUNS.jsonl
    python -m benchmarks.rl.study finals --out RUNS.jsonl
    python -m benchmarks.rl.study long --out RUNS.jsonl
    python -m benchmarks.rl.study rates --epochs 4 --out RUNS_4.jsonl

`rates` tries the same number of learning rates for every arm, on seed 0. `finals`
trains each arm at its best rate on seeds 1 to 5, which the choice has not seen; Hopper
that is followed by Adam, both at their best rates; and fewer Newton-Schulz steps at the
best rate of five, without the RMS match, which makes them shorter too. `long` trains
some of them three times as long. With 4 epochs, in which clipping acts, there are fewer
arms and half the steps. Every seed has a base of its own. Each line of the file is a
run; the same command continues it.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import jobs
from benchmarks.jobs import Job
from examples.nanogpt import record
from examples.rl import configs, train

STEPS, LONG = 120, 360
BASE_STEPS = 450  # after `make rl`'s 600, little arithmetic is left to learn
SEARCH_SEED, SEEDS = 0, (1, 2, 3, 4, 5)
# Six learning rates over one and a half decades, relative to the arm's middle one.
FACTORS = tuple(2.0**k for k in (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5))
Arm = tuple[str, Mapping[str, Any], float]


def steps(count: int, rate: float, **settings: Any) -> Arm:
    """Returns Hopper with a number of Newton-Schulz steps."""
    return "hopper", {"orthogonalize": {"steps": count}, **settings}, rate


# Adam's direction and then Newton-Schulz, as it is: here the norm after five steps is
# about three times that after one.
RAW = {"variance": "pre", "rms": None}
# The optimizer of each arm, its settings, and its middle learning rate. The updates of
# matrices have the RMS of Adam's, but for those of SGD and of "raw" arms. The middle
# rates are an octave apart, so that most rates are those of other arms too.
ARMS: Mapping[str, Arm] = {
    "sgd": ("sgd", {}, 4e-2),
    "adam": ("adam", {}, 1.4e-4),
    "muon": ("muon", {}, 2.8e-4),
    "adamuon": ("adamuon", {}, 2.8e-4),
    "hopper": ("hopper", {}, 1.4e-4),
    "hopper, pre": ("hopper", {"variance": "pre"}, 1.4e-4),
    "hopper, 0 steps": ("hopper", {"orthogonalize": None}, 1.4e-4),
    "hopper, 2 steps": steps(2, 1.4e-4),
    "hopper, 3 steps": steps(3, 2.8e-4),
    "hopper, 5 steps": steps(5, 2.8e-4),
    "raw, 5 steps": steps(5, 2.8e-4, **RAW),
}
# Trained at the best rate of "raw, 5 steps".
SAME_RATE: Mapping[str, Arm] = {
    f"raw, {count} step{'s' * (count > 1)}": steps(count, 2.8e-4, **RAW)
    for count in (1, 2, 3)
}
LONG_ARMS = ("adam", "muon", "hopper", "hopper, then adam")


class Setting(NamedTuple):
    """What is compared with some number of epochs."""

    arms: Sequence[str]
    steps: int
    eval_every: int
    shifts: Mapping[str, float] = {}  # of the middle learning rate of some arms


FEW = ("sgd", "adam", "muon", "adamuon", "hopper", "hopper, 5 steps")
SETTINGS: Mapping[int, Setting] = {
    1: Setting(tuple(ARMS), STEPS, 5),
    # With four times as many updates, Adam's best rate was the lowest of the first six.
    4: Setting(FEW, STEPS // 2, 2, {"adam": 0.25}),
}
# Measures of each step that are kept, but for the search.
KEPT = (
    *("correct", "format", "nonsense", "entropy", "kl_k1", "kl_k3", "kl_largest"),
    *("signal", "clip_fraction", "ratio_largest", "gradient_norm", "update_rms"),
)


def best_rates(runs: Sequence[Job], epochs: int) -> dict[str, float]:
    """Returns the learning rate with the lowest loss of the search, by arm."""
    best: dict[str, Job] = {}
    for run in sorted(runs, key=lambda run: run["learning_rate"]):
        if (run["phase"], run["epochs"]) == ("rates", epochs):
            arm = run["arm"]
            if arm not in best or run["loss"] < best[arm]["loss"]:
                best[arm] = run
    return {arm: run["learning_rate"] for arm, run in best.items()}


def jobs_of(phase: str, epochs: int, runs: Sequence[Job]) -> list[Job]:
    """Returns the runs of a phase, given those before it."""
    arms = SETTINGS[epochs].arms
    basic = {"phase": phase, "epochs": epochs, "steps": SETTINGS[epochs].steps}
    if phase == "rates":
        shifts = SETTINGS[epochs].shifts
        return [
            {**basic, "arm": arm, "learning_rate": rate, "seed": SEARCH_SEED}
            for arm in arms
            for middle in (ARMS[arm][2] * shifts.get(arm, 1.0),)
            for rate in (float(f"{middle * factor:.3g}") for factor in FACTORS)
        ]
    rates = jobs_of("rates", epochs, [])
    missing = [r for r in rates if not any(r.items() <= run.items() for run in runs)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(rates)} runs of `rates` with {epochs} epochs are "
            "missing: run `rates` first, with the same --out and --epochs"
        )
    best = best_rates(runs, epochs)
    chosen = {arm: {"learning_rate": rate} for arm, rate in best.items()}
    both = {"learning_rate": best["hopper"], "then_rate": best["adam"]}
    chosen["hopper, then adam"] = both
    if phase == "long":
        if epochs != 1:
            raise ValueError(f"`long` is for 1 epoch, got {epochs}")
        basic["steps"] = LONG
        chosen = {arm: chosen[arm] for arm in LONG_ARMS}
    elif "raw, 5 steps" in chosen:
        chosen |= dict.fromkeys(SAME_RATE, chosen["raw, 5 steps"])
    return [
        {**basic, "arm": arm, **rates, "seed": seed}
        for arm, rates in chosen.items()
        for seed in SEEDS
    ]


def config_of(job: Job) -> configs.Config:
    """Returns the configuration of a run."""
    arm = job["arm"].removesuffix(", then adam")
    optimizer, settings, _ = {**ARMS, **SAME_RATE}[arm]
    config = configs.Config(
        optimizer=optimizer,
        settings=dict(settings),
        lr=job["learning_rate"],
        steps=job["steps"],
        epochs=job["epochs"],
        seed=job["seed"],
        eval_every=SETTINGS[job["epochs"]].eval_every,
        rounds=1,  # more would sample more for a policy that is better
        base_steps=BASE_STEPS,
        base_seed=job["seed"],
        quiet=True,
    )
    if "then_rate" in job:
        config = dataclasses.replace(config, then="adam", then_lr=job["then_rate"])
    return config


def do(job: Job) -> dict[str, Any]:
    """Does one run; its loss is the mean share of wrong validation problems.

    It is that over all evaluations of the run, because the best of many would be lucky.
    The rates are chosen by it, and the test problems are for the comparisons.
    """
    found = train.train(config_of(job))
    if found["stopped"]:
        raise KeyboardInterrupt(f"a run was stopped by {found['stopped']}")
    run, train_steps, points = (
        [record for record in found["records"] if record["kind"] == kind]
        for kind in ("run", "train", "val")
    )
    search = job["phase"] == "rates"
    kept = ("step", "all") if search else ("step", "all", "by_kind")
    result = {
        "loss": 1 - statistics.mean(point["all"] for point in points[1:]),
        "validation": [{name: point[name] for name in kept} for point in points],
        **{name: found[name] for name in ("best", "best_step", "last")},
        "measures": {k: [r[k] for r in train_steps] for k in KEPT if not search},
        "base_sha256": run[0]["data_sha256"],
    }
    return {**jax.tree.map(_short, result), **record.environment()}


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("phase", choices=("rates", "finals", "long"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--epochs",
        type=int,
        default=1,
        choices=SETTINGS,
        help="passes over the responses of a step",
    )
    parser.add_argument("--workers", type=int, default=2, help="concurrent processes")
    given = parser.parse_args()
    try:
        todo = jobs_of(given.phase, given.epochs, jobs.read(given.out))
    except ValueError as error:
        parser.error(str(error))
    with jobs.processes(given.workers) as pool:
        for line in jobs.run_all(todo, do, given.out, pool):
            print(line, flush=True)


if __name__ == "__main__":
    main()
