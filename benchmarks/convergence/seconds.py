"""Measures the time of training steps, arm beside arm, with nothing else running.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.convergence.seconds --out OUT.json \
        --arms adamw muon halley

The arms take turns of ten steps, so that each turn has a refresh of a preconditioner,
and the median over the turns counts.
"""

import argparse
import dataclasses
import gc
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.convergence.arms import ARMS
from benchmarks.trial import Trial
from examples.nanogpt import configs, record

TURN = 10


def measure(arms: Sequence[str], turns: int, config: configs.Config) -> dict[str, Any]:
    """Returns, by arm, the seconds of a training step in each turn and their median."""
    trials = {
        arm: Trial(config, ARMS[arm].make(ARMS[arm].start, config)) for arm in arms
    }
    for trial in trials.values():
        trial.advance(TURN)  # compiles, and computes the first bases and roots
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(turns):
        for arm, trial in trials.items():
            gc.collect()
            seconds[arm].append(trial.advance(TURN) / TURN)
    return {
        arm: {"seconds": statistics.median(found), "turns": found}
        for arm, found in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, required=True)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--config", choices=configs.PRESETS, default="tiny")
    arguments = parser.parse_args()
    config = configs.resolve(
        dataclasses.replace(configs.PRESETS[arguments.config], val_windows=16)
    )
    result = {
        "command": " ".join(
            ["python -m benchmarks.convergence.seconds", *sys.argv[1:]]
        ),
        **record.environment(),
        "config": dataclasses.asdict(config),
        "arms": measure(arguments.arms, arguments.turns, config),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
