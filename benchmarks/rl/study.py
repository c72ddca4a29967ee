"""Trains what is needed to answer the claims about Hopper, with examples/rl.

    python -m benchmarks.rl.study rates --out RUNS.jsonl
    python -m benchmarks.rl.study finals --out RUNS.jsonl
    python -m benchmarks.rl.study long --out RUNS.jsonl
    python -m benchmarks.rl.study rates --epochs 4 --out RUNS_4.jsonl

`rates` tries the same number of learning rates for every arm, on seed 0. `finals`
trains each arm at its best rate on seeds 1 to 5, which the choice has not seen; Hopper
that is followed by Adam, both at their best rates; and fewer Newton-Schulz steps at the
best rate of five, without the RMS match, which makes them shorter too. `long` trains
three times as long. With 4 epochs, in which clipping acts, there are fewer arms and
half the steps. Every seed has a base of its own. Each line of the file is a run; the
same command continues it.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
# matrices have the RMS of Adam's, but for those of SGD and of "raw" arms.
ARMS: Mapping[str, Arm] = {
    "sgd": ("sgd", {}, 1e-2),
    "adam": ("adam", {}, 1.4e-4),
    "muon": ("muon", {}, 2e-4),
    "adamuon": ("adamuon", {}, 2e-4),
    "hopper": ("hopper", {}, 1.4e-4),
    "hopper, pre": ("hopper", {"variance": "pre"}, 1.4e-4),
    "hopper, 0 steps": ("hopper", {"orthogonalize": None}, 1.4e-4),
    "hopper, 2 steps": steps(2, 1.4e-4),
    "hopper, 3 steps": steps(3, 2e-4),
    "hopper, 5 steps": steps(5, 2e-4),
    "raw, 5 steps": steps(5, 2e-4, **RAW),
}
# Trained at the best rate of "raw, 5 steps".
SAME_RATE: Mapping[str, Arm] = {
    f"raw, {count} step{'s' * (count > 1)}": steps(count, 2e-4, **RAW)
    for count in (1, 2, 3)
}
LONG_ARMS = ("adam", "muon", "hopper")


class Setting(NamedTuple):
    """What is compared with some number of epochs."""

    arms: Sequence[str]
    steps: int


FEW = ("sgd", "adam", "muon", "adamuon", "hopper", "hopper, 5 steps")
SETTINGS: Mapping[int, Setting] = {
    1: Setting(tuple(ARMS), STEPS),
    4: Setting(FEW, STEPS // 2),
}
# Measures of each step that are kept, as means and maxima of ten steps each.
KEPT = (
    *("correct", "nonsense", "entropy", "kl_k1", "kl_k3", "kl_p99", "kl_largest"),
    *("signal", "clip_fraction", "ratio_largest", "update_rms", "update_rank"),
)
BLOCK = 10


def best_rates(runs: Sequence[Job], epochs: int) -> dict[str, float]:
    """Returns the learning rate with the lowest loss of the search, by arm."""
    tried = [r for r in runs if (r["phase"], r["epochs"]) == ("rates", epochs)]
    best: dict[str, Job] = {}
    for run in tried:
        if run["arm"] not in best or run["loss"] < best[run["arm"]]["loss"]:
            best[run["arm"]] = run
    return {arm: run["learning_rate"] for arm, run in best.items()}


def jobs_of(phase: str, epochs: int, runs: Sequence[Job]) -> list[Job]:
    """Returns the runs of a phase, given those before it."""
    arms = SETTINGS[epochs].arms
    basic = {"phase": phase, "epochs": epochs, "steps": SETTINGS[epochs].steps}
    if phase == "rates":
        return [
            {**basic, "arm": arm, "learning_rate": rate, "seed": SEARCH_SEED}
            for arm in arms
            for rate in (float(f"{ARMS[arm][2] * factor:.3g}") for factor in FACTORS)
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
    if phase == "long":
        if epochs != 1:
            raise ValueError(f"`long` is for 1 epoch, got {epochs}")
        basic["steps"] = LONG
        chosen = {arm: chosen[arm] for arm in LONG_ARMS}
    else:
        both = {"learning_rate": best["hopper"], "then_rate": best["adam"]}
        chosen["hopper, then adam"] = both
        if "raw, 5 steps" in chosen:
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
        eval_every=5,
        rounds=1,  # more would sample more for a policy that is better
        base_steps=BASE_STEPS,
        base_seed=job["seed"],
        quiet=True,
    )
    if "then_rate" in job:
        config = dataclasses.replace(config, then="adam", then_lr=job["then_rate"])
    return config


def blocks(records: Sequence[Mapping[str, Any]], name: str) -> dict[str, list[float]]:
    """Returns means and maxima of a measure over ten steps each."""
    values = [r[name] for r in records if r["kind"] == "train"]
    parts = [values[i : i + BLOCK] for i in range(0, len(values), BLOCK)]
    return {
        "mean": [float(f"{statistics.mean(part):.4g}") for part in parts],
        "max": [float(f"{max(part):.4g}") for part in parts],
    }


def do(job: Job) -> dict[str, Any]:
    """Does one run; its loss is the share of validation problems that are wrong.

    It is that of the best policy of the run. The rates are chosen by it, and the test
    problems are for the comparisons.
    """
    found = train.train(config_of(job))
    if found["stopped"]:
        raise KeyboardInterrupt(f"a run was stopped by {found['stopped']}")
    validation = [
        {"step": r["step"], "all": r["all"], "by_kind": r["by_kind"]}
        for r in found["records"]
        if r["kind"] == "val"
    ]
    return {
        "loss": 1 - max(point["all"] for point in validation[1:]),
        "validation": validation,
        **{name: found[name] for name in ("best", "best_step", "last")},
        "measures": {name: blocks(found["records"], name) for name in KEPT},
        **record.environment(),
    }


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
