"""Trains nanoGPT without normalized queries and keys, with qk_clip and without it.

    python -m benchmarks.qk_clip --out RUNS.jsonl
    python -m benchmarks.qk_clip --out RUNS.jsonl --table

The same command continues the file. Each line is a run, with the largest attention
logit of every step.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import jobs
from benchmarks.convergence.evidence import interval
from benchmarks.jobs import Job
from examples.nanogpt import configs, record, train

RATES, SEEDS = (0.04, 0.08, 0.16, 0.32), (1, 2, 3)
LIMIT = 30.0


def all_jobs() -> list[Job]:
    """Returns the runs, with and without a limit side by side."""
    return [
        {"lr": rate, "seed": seed, "qk_clip": limit}
        for rate in RATES
        for seed in SEEDS
        for limit in (0.0, LIMIT)
    ]


def do(job: Job) -> dict[str, Any]:
    """Does one run of 250 steps by Muon."""
    config = dataclasses.replace(
        configs.TINY, optimizer="muon", qk_norm=0, val_windows=1024, val_every=250,
        sample=0, checkpoint_every=0, quiet=True, log_every=1, **job,
    )  # fmt: skip
    found = train.train(config)
    logits = [r["max_logit"] for r in found["records"] if r["kind"] == "train"]
    return {
        "loss": found["loss"],
        "max_logits": [float(f"{logit:.4g}") for logit in logits],
        "data_sha256": found["data_sha256"],
        **record.environment(),
    }


def table(runs: Sequence[Job]) -> str:
    """Returns a table of losses and logits by learning rate."""
    columns = ["learning rate", "largest logit, no clip", f"clipped at {LIMIT:g}"]
    columns += ["loss, no clip", "clipped", "difference"]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    found = {(r["lr"], r["seed"], r["qk_clip"]): r for r in runs}
    for rate in RATES:
        free, clipped = (
            [found[rate, seed, limit] for seed in SEEDS] for limit in (0.0, LIMIT)
        )
        cells = [f"{rate:g}"]
        both = (free, clipped)
        cells += [f"{np.max([r['max_logits'] for r in x]):.0f}" for x in both]
        losses = [[r["loss"] for r in x] for x in both]
        cells += [f"{sum(x) / len(x):.3f}" for x in losses]
        gaps = [b - a for a, b in zip(*losses, strict=True)]
        mean, half = interval(gaps, 0.95)
        lines.append(f"| {' | '.join([*cells, f'{mean:+.3f} ± {half:.3f}'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print the table alone")
    parser.add_argument("--workers", type=int, default=2, help="concurrent processes")
    given = parser.parse_args()
    if not given.table:
        with jobs.processes(given.workers) as pool:
            for line in jobs.run_all(all_jobs(), do, given.out, pool):
                print(line, flush=True)
    print(table(jobs.read(given.out)))


if __name__ == "__main__":
    main()
