"""Searches chains of stages for the lowest loss, within a budget of minutes.

    make search
    python -m benchmarks.convergence.search --minutes 60 --steps 250 --out runs/search

Every trial is a chain: momentum, the variance of each entry or not, a polar method with
its settings, the variance of each output or not, and a schedule. Optuna proposes it and
stops it early if its loss is above the median of other trials at the same step. The
folder has

    study.log    the study of Optuna; the same command continues it
    runs.jsonl   one line per trial, like those of run.py
    report.md    the trials, ranked, and what to try next; with plots beside it

The trials are of one seed, so their ranks are leads: `run.py` compares over seeds.
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

import optax_matrix as om
from benchmarks import jobs
from benchmarks.convergence import arms, search_report
from benchmarks.convergence.run import fit
from examples.nanogpt import configs

VALIDATIONS = 5
# Muon at a fixed RMS, and `halley_muon`.
FIRST: tuple[dict[str, Any], ...] = (
    {
        **{"learning_rate": 0.024, "forget": 0.15, "entry variance": False},
        **{"method": "jordan", "steps": 5, "neuron variance": False, "cooldown": 0.7},
    },
    {
        **{"learning_rate": 0.024, "forget": 0.15, "entry variance": True},
        **{"method": "halley", "bound": 1e-2, "neuron variance": True, "cooldown": 0.7},
    },
)


def polar(trial: optuna.Trial) -> om.PolarMethod | None:
    """Proposes a polar method and its settings."""
    names = ("jordan", "polar_express", "halley", "zolotarev", "mud", "none")
    match name := trial.suggest_categorical("method", names):
        case "jordan" | "polar_express":
            return om.NewtonSchulz(trial.suggest_int("steps", 1, 6), coefficients=name)
        case "halley" | "zolotarev":
            bound = trial.suggest_float("bound", 1e-3, 0.1, log=True)
            return om.Halley(bound) if name == "halley" else om.Zolotarev(bound)
        case "mud":
            return om.MUD()
    return None


def propose(trial: optuna.Trial, config: configs.Config) -> tuple[Any, configs.Config]:
    """Proposes an optimizer and its schedule: this is the declared space."""
    values = {
        "learning_rate": trial.suggest_float("learning_rate", 6e-3, 0.1, log=True),
        # One less the momentum.
        "momentum": 1 - trial.suggest_float("forget", 0.03, 0.5, log=True),
    }
    entry = trial.suggest_categorical("entry variance", (False, True))
    method = polar(trial)
    neuron = trial.suggest_categorical("neuron variance", (False, True))
    cooldown = trial.suggest_float("cooldown", 0.3, 1.0)
    config = dataclasses.replace(config, cooldown=cooldown)

    def orthogonalize(layout: Any) -> arms.Stage:
        return om.orthogonalize(method, layout=layout)

    optimizer = arms.around(orthogonalize, values, config, entry=entry, neuron=neuron)
    return optimizer, config


def objective(trial: optuna.Trial, config: configs.Config, out: Path) -> float:
    """Trains the chain of a trial, adds its run to the file, and returns the loss."""
    optimizer, config = propose(trial, config)

    def go_on(step: int, loss: float) -> bool:
        trial.report(loss, step)
        return step == config.steps or not trial.should_prune()

    run = fit(config, optimizer, math.ceil(config.steps / VALIDATIONS), go_on)
    pruned = run["loss"] is not None and run["curve"][-1][0] < config.steps
    about = {"protocol": "search", "arm": f"trial {trial.number}", "phase": "search"}
    about |= {"seed": config.seed, "values": trial.params, "steps": config.steps}
    with (out / "runs.jsonl").open("a") as file:
        file.write(json.dumps({**about, "pruned": pruned, **run}) + "\n")
    if pruned:
        raise optuna.TrialPruned
    return math.inf if run["loss"] is None else run["loss"]


def study_of(out: Path, seed: int = 0) -> optuna.Study:
    """Returns the study of a folder, a new one if there is none."""
    return optuna.create_study(
        study_name="search",
        storage=JournalStorage(JournalFileBackend(str(out / "study.log"))),
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        load_if_exists=True,
    )


def work(config: configs.Config, out: Path, until: float, seed: int) -> None:
    """Runs trials; none begins that would probably end after the time `until`."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    longest = 0.0

    def after(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        nonlocal longest
        assert trial.duration is not None
        longest = max(longest, trial.duration.total_seconds())
        left = until - time.time()
        complete = search_report.finished(study)
        pruned = len(study.get_trials(deepcopy=False, states=(TrialState.PRUNED,)))
        best = min(map(search_report.loss_of, complete), default=math.inf)
        print(
            f"trial {trial.number} {trial.state.name.lower()} at "
            f"{search_report.loss_of(trial):.4f}; best {best:.4f} of {len(complete)} "
            f"complete, {pruned} pruned; {max(left, 0) / 60:.1f} minutes left",
            flush=True,
        )
        if left < longest:
            study.stop()

    study_of(out, seed).optimize(
        functools.partial(objective, config=config, out=out),
        timeout=max(until - time.time(), 0.0),
        callbacks=[after],
    )


def search(config: configs.Config, out: Path, minutes: float, workers: int) -> None:
    """Searches with several processes, and writes the report."""
    out.mkdir(parents=True, exist_ok=True)
    check_same(config, out)
    study = study_of(out)
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)  # It was interrupted.
    for values in FIRST:
        study.enqueue_trial(values, skip_if_exists=True)
    until, done = time.time() + 60 * minutes, len(study.trials)
    with jobs.processes(workers) as pool:
        seeds = [config.seed + done + 1000 * worker for worker in range(workers)]
        for job in [pool.submit(work, config, out, until, seed) for seed in seeds]:
            job.result()
    search_report.write(study_of(out), out)
    print(f"wrote {out / 'report.md'}")


def check_same(config: configs.Config, out: Path) -> None:
    """Raises if the trials of a folder are not of this configuration."""
    path = out / "config.json"
    now = configs.identity(config)
    if not path.exists():
        path.write_text(json.dumps(now, indent=1) + "\n")
    then = json.loads(path.read_text())
    changed = [f"{k}: {then.get(k)} -> {now[k]}" for k in now if then.get(k) != now[k]]
    if changed:
        raise ValueError(
            f"the trials in {out} are of another configuration ({', '.join(changed)}): "
            "name another folder with --out"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="budget")
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    parser.add_argument("--steps", type=int, default=100, help="steps of a trial")
    parser.add_argument("--config", choices=configs.PRESETS, default="tiny")
    parser.add_argument("--data", default="stdlib", help="as in the example")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="concurrent processes")
    given = parser.parse_args()
    config = dataclasses.replace(
        configs.PRESETS[given.config],
        **{"steps": given.steps, "data": given.data, "seed": given.seed},
    )
    search(configs.resolve(config), given.out, given.minutes, given.workers)


if __name__ == "__main__":
    main()
