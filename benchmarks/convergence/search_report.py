"""Writes what a search found: a ranked table, plots, and what to try next."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

# Choices with fewer trials than this, complete or pruned, are suggested again; and with
# fewer complete trials than that, nothing is said about the importance of parameters.
ENOUGH, MANY = 3, 10


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Returns the complete trials with a finite loss, the lowest first."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    finite = [trial for trial in trials if math.isfinite(loss_of(trial))]
    return sorted(finite, key=loss_of)


def loss_of(trial: FrozenTrial) -> float:
    return math.inf if trial.value is None else trial.value


def shown(params: dict[str, Any]) -> str:
    """Returns parameters as text."""
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in params.items()
    )


def importances(study: optuna.Study) -> dict[str, float]:
    """Returns how much of the variance each parameter explains (PED-ANOVA)."""
    trials = finished(study)
    if len(trials) < MANY:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
    copy = optuna.create_study()
    copy.add_trials(trials)
    return optuna.importance.get_param_importances(copy, evaluator=evaluator)


def next_steps(study: optuna.Study) -> list[str]:
    """Returns what to try next, as sentences."""
    trials = finished(study)
    if not trials:
        return ["Search for longer: no trial was completed."]
    best, found = trials[0], []
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    tried = study.get_trials(deepcopy=False, states=states)
    for name, space in best.distributions.items():
        value = best.params[name]
        if isinstance(space, CategoricalDistribution):
            counts = {
                choice: sum(trial.params.get(name) == choice for trial in tried)
                for choice in space.choices
            }
            few = [f"{k} ({n})" for k, n in counts.items() if n < ENOUGH]
            if few:
                found.append(
                    f"Search for longer: of {len(tried)} trials, few had {name} "
                    f"{', '.join(few)}."
                )
            continue
        low, high = space.low, space.high  # type: ignore
        span = math.log(high / low) if space.log else high - low  # type: ignore
        above = math.log(value / low) if space.log else value - low  # type: ignore
        if not 0.1 <= above / span <= 0.9:
            found.append(
                f"Widen the range of {name}, [{low:g}, {high:g}]: the best trial has "
                f"{value:.3g}."
            )
    near = [trial for trial in trials[1:] if loss_of(trial) - loss_of(best) < 0.01]
    if near:
        numbers = ", ".join(str(trial.number) for trial in near)
        found.append(
            f"Compare trial {best.number} with {numbers} over several seeds: their "
            "losses differ by less than 0.01."
        )
    found.append(
        f"Confirm trial {best.number}: make it an arm in arms.py, and compare it with "
        "tuned Muon by run.py, which tunes both and uses fresh seeds."
    )
    return found


def table(trials: Sequence[FrozenTrial], rows: int = 20) -> str:
    """Returns the best trials as Markdown."""
    lines = ["| rank | trial | loss | chain |", "| --- | --- | --- | --- |"]
    for rank, trial in enumerate(trials[:rows], 1):
        text = shown(trial.params)
        lines.append(f"| {rank} | {trial.number} | {loss_of(trial):.4f} | {text} |")
    return "\n".join(lines)


def plot(study: optuna.Study, path: Path) -> None:
    """Plots the losses by trial, the curves, and the losses by polar method."""
    trials = finished(study)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    by_trial, curves, methods = figure.subplots(1, 3)
    by_trial.plot([t.number for t in trials], [loss_of(t) for t in trials], "o")
    by_trial.set(xlabel="trial", ylabel="validation loss")
    for trial in study.get_trials(deepcopy=False):
        values = trial.intermediate_values
        pruned = trial.state == TrialState.PRUNED
        color, width = ("0.7", 0.8) if pruned else ("C0", 1.0)
        curves.plot(*zip(*values.items(), strict=True), ".-", color=color, lw=width)
    curves.set(xlabel="step (grey: pruned)", ylabel="validation loss")
    names = sorted({trial.params["method"] for trial in trials})
    for place, name in enumerate(names):
        losses = [loss_of(t) for t in trials if t.params["method"] == name]
        methods.plot([place] * len(losses), losses, "o", color="C0")
    methods.set_xticks(range(len(names)), names, rotation=30)
    methods.set(ylabel="validation loss")
    figure.savefig(path, dpi=120)


def write(study: optuna.Study, out: Path) -> None:
    """Writes report.md and search.png into a folder."""
    trials = finished(study)
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    complete = states.count(TrialState.COMPLETE)
    text = [
        "# A search over chains",
        "",
        f"{complete} trials were complete ({complete - len(trials)} of them diverged), "
        f"{states.count(TrialState.PRUNED)} were pruned, and "
        f"{states.count(TrialState.FAIL)} failed or were interrupted. All are of one "
        "seed, so the ranks are leads.",
        "",
        table(trials),
        "",
        "![losses](search.png)",
        "",
    ]
    if weights := importances(study):
        shares = ", ".join(f"{name} {share:.0%}" for name, share in weights.items())
        text += [f"Shares of the variance of the loss (PED-ANOVA): {shares}.", ""]
    text += ["## What to try next", "", *[f"- {s}" for s in next_steps(study)], ""]
    plot(study, out / "search.png")
    (out / "report.md").write_text("\n".join(text))
