"""`make search`: the space, the budget, resuming, pruning and the report."""

import dataclasses
import json
import math
import time

import jax
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from benchmarks.convergence import arms, search, search_report
from examples.nanogpt import configs
from tests import problems

PARAMS = {"mlp": {"kernel": problems.normal((4, 8), 2)}}


@pytest.fixture
def config(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"to be, or not to be, that is the question\n" * 400)
    small = {"layers": 1, "width": 16, "head_dim": 8, "context": 16, "batch_size": 8}
    return configs.resolve(
        dataclasses.replace(
            configs.TINY, **small, steps=10, val_windows=8, data=str(text)
        )
    )


@pytest.fixture
def pretended(monkeypatch):
    """Training whose loss is that of the values, at each of five steps."""
    seen = []

    def fit(config, optimizer, every, go_on):
        seen.append((config, every))
        base = abs(math.log(optimizer["learning_rate"] / 0.02)) + optimizer["entry"]
        curve = []
        for step in range(every, config.steps + 1, every):
            curve.append((step, base + 1 / step))
            if not go_on(*curve[-1]):
                break
        return {"loss": curve[-1][1], "curve": curve, "seconds": 0.0}

    def around(orthogonalize, values, config, *, entry, neuron):
        return {**values, "entry": entry, "neuron": neuron}

    monkeypatch.setattr(search, "fit", fit)
    monkeypatch.setattr(arms, "around", around)
    return seen


def test_trials_are_recorded_pruned_and_continued(tmp_path, config, pretended, capsys):
    study = search.study_of(tmp_path)
    for values in search.FIRST:
        study.enqueue_trial(values)

    def objective(trial):
        return search.objective(trial, config, tmp_path)

    study.optimize(objective, n_trials=30)
    runs = [json.loads(r) for r in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(runs) == 30
    for run, first in zip(runs, search.FIRST, strict=False):
        assert run["values"] == first
    states = [trial.state for trial in study.trials]
    pruned = [run for run in runs if run["pruned"]]
    assert 0 < len(pruned) == states.count(TrialState.PRUNED)
    assert all(run["curve"][-1][0] < 10 for run in pruned)
    assert all(run["curve"][-1][0] == 10 for run in runs if not run["pruned"])
    assert {run["values"]["method"] for run in runs} > {"jordan", "halley"}

    # Another process sees the same study, and its report.
    again = search.study_of(tmp_path)
    assert len(again.trials) == 30 and again.best_value == study.best_value
    search_report.write(again, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert f"{30 - len(pruned)} trials were complete (0 of them diverged)" in text
    assert f"{len(pruned)} were pruned" in text and "PED-ANOVA" in text
    assert f"| 1 | {study.best_trial.number} | {study.best_value:.4f} |" in text
    assert (tmp_path / "search.png").stat().st_size > 1000


def test_every_proposal_is_an_optimizer(config):
    """The space, sampled at random, has no corner that raises."""

    def objective(trial):
        optimizer, run = search.propose(trial, config)
        assert 0.3 <= run.cooldown <= 1
        state = jax.eval_shape(optimizer.init, PARAMS)
        updates, _ = jax.eval_shape(optimizer.update, PARAMS, state, PARAMS)
        assert jax.tree.map(jax.numpy.shape, updates) == {"mlp": {"kernel": (4, 8)}}
        return 0.0

    optuna.create_study(sampler=optuna.samplers.RandomSampler(0)).optimize(
        objective, n_trials=30
    )
    study = optuna.create_study()
    for values in search.FIRST:
        study.enqueue_trial(values)
    study.optimize(objective, n_trials=len(search.FIRST))
    assert [trial.params for trial in study.trials] == list(search.FIRST)


def test_no_trial_begins_that_would_end_after_the_budget(
    tmp_path, config, monkeypatch, capsys
):
    def slow(trial, config, out):
        time.sleep(0.4)
        return trial.suggest_float("x", 0, 1)

    monkeypatch.setattr(search, "objective", slow)
    search.work(config, tmp_path, time.time() + 1.0, seed=0)
    said = capsys.readouterr().out.splitlines()
    # After two of them less than 0.2 s are left, however slow the machine is.
    assert 1 <= len(said) <= 2 and len(said) == len(search.study_of(tmp_path).trials)
    assert "trial 0 complete at" in said[0] and "minutes left" in said[0]


def test_a_folder_holds_one_configuration(tmp_path, config):
    search.check_same(config, tmp_path)
    search.check_same(config, tmp_path)
    with pytest.raises(ValueError, match=r"steps: 10 -> 20.*another folder"):
        search.check_same(dataclasses.replace(config, steps=20), tmp_path)


def test_what_to_try_next():
    study = optuna.create_study()
    space = {
        "rate": FloatDistribution(0.01, 1.0, log=True),
        "method": CategoricalDistribution(("a", "b")),
    }

    def add(loss, rate, method):
        params = {"rate": rate, "method": method}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=space, value=loss)
        )

    assert search_report.next_steps(study) == [
        "Search for longer: no trial was completed."
    ]
    for loss, rate in ((1.0, 0.011), (1.005, 0.1), (2.0, 0.2)):
        add(loss, rate, "a")
    add(math.inf, 0.5, "b")
    said = " ".join(search_report.next_steps(study))
    assert "Widen the range of rate, [0.01, 1]: the best trial has 0.011." in said
    assert "of 4 trials, few had method b (1)." in said
    assert "Compare trial 0 with 1 over" in said and "Confirm trial 0" in said


@pytest.mark.slow
def test_two_processes_search_and_report(tmp_path, config, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    search.search(config, tmp_path, minutes=0.6, workers=2)
    count = len((tmp_path / "runs.jsonl").read_text().splitlines())
    assert count >= 2 and (tmp_path / "report.md").exists()
    search.search(config, tmp_path, minutes=0.2, workers=1)
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) > count
