"""Compares ways to keep the state of an optimizer: loss, bytes, and time of a step.

    python -m benchmarks.state_memory losses --out RUNS.jsonl
    OPENBLAS_NUM_THREADS=1 python -m benchmarks.state_memory seconds --out SECONDS.json
    python -m benchmarks.state_memory table --out RUNS.jsonl [--seconds SECONDS.json]
    python -m benchmarks.state_memory peak --config gpt2-small --way int8

`losses` trains nanoGPT with moments in several dtypes; the same command continues the
file, each line of which is a run. `seconds` measures training steps, with nothing else
running: the ways take turns of ten steps. `peak` prints the most memory that ten steps
by Muon took on a GPU or TPU, one way per process.
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

# The dtypes of each optimizer's momentum; SOAP refuses int8.
DTYPES = {
    "muon": ("float32", "bfloat16", "int8", "float8_e4m3fn"),
    "hopper": ("float32", "bfloat16", "int8", "float8_e4m3fn"),
    "soap": ("float32", "bfloat16", "float8_e4m3fn"),
}
OFFLOADED = "float32, offloaded"
SEEDS = (1, 2, 3)
STEPS, TURN = 250, 10


def config_of(
    optimizer: str, dtype: str, preset: str = "tiny", **fields: Any
) -> configs.Config:
    """Returns a configuration with an optimizer at its default rate."""
    return dataclasses.replace(
        configs.PRESETS[preset],
        optimizer=optimizer,
        settings={"mu_dtype": dtype},
        sample=0,
        checkpoint_every=0,
        quiet=True,
        **fields,
    )


def all_jobs() -> list[Job]:
    """Returns the runs, the dtypes side by side."""
    return [
        {"optimizer": optimizer, "seed": seed, "mu_dtype": dtype}
        for optimizer, dtypes in DTYPES.items()
        for seed in SEEDS
        for dtype in dtypes
    ]


def do(job: Job) -> dict[str, Any]:
    """Does one run."""
    config = config_of(
        job["optimizer"],
        job["mu_dtype"],
        seed=job["seed"],
        steps=STEPS,
        val_windows=1024,
        val_every=STEPS,
    )
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


def trial(optimizer: str, way: str, preset: str) -> Trial:
    """Returns training that keeps the state of an optimizer in some way."""
    dtype = way.removesuffix(", offloaded")
    config = configs.resolve(config_of(optimizer, dtype, preset, val_windows=16))
    tx: optax.GradientTransformation = train.make_optimizer(config)
    return Trial(config, om.offload_state(tx) if way == OFFLOADED else tx)


def peak(way: str, preset: str) -> str:
    """Returns the most memory that ten steps by Muon took, and all of the state."""
    training = trial("muon", way, preset)
    training.advance(TURN)
    stats = jax.devices()[0].memory_stats()
    if not stats:
        return "this device does not say how much memory it used"
    state = _bytes_by_memory(training.state.optimizer)
    return f"{way}: peak {stats['peak_bytes_in_use']:,} bytes, state {state}"


def seconds(optimizers: Sequence[str], preset: str, turns: int) -> dict[str, Any]:
    """Returns, by optimizer and way, the seconds of a step, and its memory."""
    result: dict[str, Any] = {}
    for optimizer in optimizers:
        kept = (*DTYPES[optimizer], OFFLOADED)
        trials = {way: trial(optimizer, way, preset) for way in kept}
        for training in trials.values():
            training.advance(TURN)  # compiles, and computes the first bases
        found: dict[str, list[float]] = {way: [] for way in trials}
        for _ in range(turns):
            for way, training in trials.items():
                gc.collect()
                found[way].append(training.advance(TURN) / TURN)
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


def table(runs: Sequence[Job], measured: dict[str, Any] | None = None) -> str:
    """Returns a table of losses, bytes and times by optimizer and dtype.

    Optimizers without runs are left out, and times if they were not measured.
    """
    columns = ["optimizer", "moments", "bytes per entry", "loss ± σ over seeds"]
    columns += ["less float32", *["step over float32"] * (measured is not None)]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    losses = {(r["optimizer"], r["mu_dtype"], r["seed"]): r["loss"] for r in runs}
    for optimizer, dtypes in DTYPES.items():
        if not any(run["optimizer"] == optimizer for run in runs):
            continue
        for dtype in dtypes:
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
            if measured:
                cells += [f"{measured[optimizer][dtype]['over_float32']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
        if not measured:
            continue
        cells = [optimizer, OFFLOADED, f"{bytes_per_entry(optimizer, 'float32'):.2f}"]
        cells += ["", "", f"{measured[optimizer][OFFLOADED]['over_float32']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("losses", "seconds", "table", "peak"))
    parser.add_argument("--out", type=Path, help="the file of `losses` or `seconds`")
    parser.add_argument("--way", choices=(*DTYPES["muon"], OFFLOADED), help="of `peak`")
    parser.add_argument("--seconds", type=Path, help="the file that `seconds` wrote")
    parser.add_argument("--config", choices=configs.PRESETS, default="tiny")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--optimizers", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--workers", type=int, default=2, help="concurrent processes")
    given = parser.parse_args()
    if given.part == "peak":
        print(peak(given.way or "float32", given.config))
    elif given.out is None:
        parser.error(f"`{given.part}` needs --out")
    elif given.part == "losses":
        with jobs.processes(given.workers) as pool:
            for line in jobs.run_all(all_jobs(), do, given.out, pool):
                print(line, flush=True)
    elif given.part == "seconds":
        result = {
            "config": given.config,
            **record.environment(),
            "optimizers": seconds(given.optimizers, given.config, given.turns),
        }
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    else:
        found = given.seconds and json.loads(given.seconds.read_text())["optimizers"]
        print(table(jobs.read(given.out), found))


if __name__ == "__main__":
    main()
