"""Compares ways to keep the state of an optimizer: loss, bytes, and time of a step.

    python -m benchmarks.state_memory losses --out RUNS.jsonl
    OPENBLAS_NUM_THREADS=1 python -m benchmarks.state_memory seconds --out SECONDS.json
    python -m benchmarks.state_memory table --out RUNS.jsonl --seconds SECONDS.json

`losses` trains nanoGPT with moments in several dtypes; the same command continues the
file, each line of which is a run. `seconds` measures training steps, with nothing else
running: the ways take turns of ten steps. On a GPU it also says how much memory the
steps needed, which is what `om.offload_state` is for.
"""

import argparse
import dataclasses
import gc
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import optax

import optax_matrix as om
from benchmarks import jobs
from benchmarks.convergence.evidence import interval
from benchmarks.jobs import Job
from benchmarks.trial import Trial
from examples.nanogpt import configs, record, train

OPTIMIZERS = ("muon", "hopper", "soap")
DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")
SEEDS = (1, 2, 3)
STEPS, TURN = 250, 10


def config_of(optimizer: str, dtype: str, **fields: Any) -> configs.Config:
    """Returns the configuration `tiny` with an optimizer at its default rate."""
    return dataclasses.replace(
        configs.TINY, optimizer=optimizer, settings={"mu_dtype": dtype}, steps=STEPS,
        val_windows=1024, val_every=STEPS, sample=0, checkpoint_every=0, quiet=True,
        **fields,
    )  # fmt: skip


def all_jobs() -> list[Job]:
    """Returns the runs, the dtypes side by side."""
    return [
        {"optimizer": optimizer, "seed": seed, "mu_dtype": dtype}
        for optimizer in OPTIMIZERS
        for seed in SEEDS
        for dtype in DTYPES
    ]


def do(job: Job) -> dict[str, Any]:
    """Does one run."""
    config = config_of(job["optimizer"], job["mu_dtype"], seed=job["seed"])
    found = train.train(config)
    return {
        "lr": configs.resolve(config).lr,
        "loss": found["loss"],
        "data_sha256": found["data_sha256"],
        **record.environment(),
    }


def bytes_per_entry(optimizer: str, dtype: str) -> float:
    """Returns the bytes of state per entry of a hidden matrix of `tiny`."""
    shape = jax.ShapeDtypeStruct((128, 512), "float32")
    tx = om.make_optimizer(optimizer, 0.01, mu_dtype=dtype)
    (row,) = om.describe_state(tx, {"up": {"kernel": shape}}).rows
    return row.state_bytes / math.prod(row.shape)


def ways(optimizer: str) -> dict[str, optax.GradientTransformation]:
    """Returns an optimizer with every dtype, and with its state on the host."""
    found: dict[str, optax.GradientTransformation] = {
        dtype: train.make_optimizer(config_of(optimizer, dtype)) for dtype in DTYPES
    }
    return found | {"float32, offloaded": om.offload_state(found["float32"])}


def seconds(preset: str, turns: int) -> dict[str, Any]:
    """Returns, by optimizer and way, the seconds of a step, and its memory."""
    result: dict[str, Any] = {}
    for optimizer in OPTIMIZERS:
        config = dataclasses.replace(
            configs.PRESETS[preset], optimizer=optimizer, val_windows=16
        )
        trials = {
            way: Trial(configs.resolve(config), tx)
            for way, tx in ways(optimizer).items()
        }
        for trial in trials.values():
            trial.advance(TURN)  # compiles, and computes the first bases
        found: dict[str, list[float]] = {way: [] for way in trials}
        for _ in range(turns):
            for way, trial in trials.items():
                gc.collect()
                found[way].append(trial.advance(TURN) / TURN)
        result[optimizer] = {
            way: {
                "seconds": statistics.median(times),
                "over_float32": statistics.median(
                    a / b for a, b in zip(times, found["float32"], strict=True)
                ),
                "turns": times,
                "state_bytes": _bytes_by_memory(trials[way].state.optimizer),
            }
            for way, times in found.items()
        }
    return result


def _bytes_by_memory(state: optax.OptState) -> dict[str, int]:
    found: dict[str, int] = {}
    for leaf in jax.tree.leaves(state):
        kind = leaf.sharding.memory_kind
        found[kind] = found.get(kind, 0) + leaf.nbytes
    return found


def table(runs: Sequence[Job], measured: dict[str, Any]) -> str:
    """Returns a table of losses, bytes and times by optimizer and dtype."""
    columns = ["optimizer", "moments", "bytes per entry", "loss ± σ over seeds"]
    columns += ["less float32", "step over float32"]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    losses = {(r["optimizer"], r["mu_dtype"], r["seed"]): r["loss"] for r in runs}
    for optimizer in OPTIMIZERS:
        for dtype in DTYPES:
            mine, plain = (
                [losses[optimizer, x, seed] for seed in SEEDS]
                for x in (dtype, "float32")
            )
            gaps = [a - b for a, b in zip(mine, plain, strict=True)]
            mean, half = interval(gaps, 0.95)
            sigma = statistics.stdev(mine)
            cells = [optimizer, dtype, f"{bytes_per_entry(optimizer, dtype):.2f}"]
            cells += [f"{statistics.mean(mine):.4f} ± {sigma:.4f}"]
            cells += ["" if dtype == "float32" else f"{mean:+.4f} ± {half:.4f}"]
            cells += [f"{measured[optimizer][dtype]['over_float32']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("losses", "seconds", "table"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=Path, help="the file that `seconds` wrote")
    parser.add_argument("--config", choices=configs.PRESETS, default="tiny")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--workers", type=int, default=2, help="concurrent processes")
    given = parser.parse_args()
    if given.part == "losses":
        with jobs.processes(given.workers) as pool:
            for line in jobs.run_all(all_jobs(), do, given.out, pool):
                print(line, flush=True)
    elif given.part == "seconds":
        result = {
            "config": given.config,
            **record.environment(),
            "optimizers": seconds(given.config, given.turns),
        }
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    elif given.seconds is None:
        parser.error("`table` needs --seconds, the file that `seconds` wrote")
    else:
        measured = json.loads(given.seconds.read_text())["optimizers"]
        print(table(jobs.read(given.out), measured))


if __name__ == "__main__":
    main()
