"""The runs that answer claims about optimizers, and what they measure."""

import concurrent.futures
import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_matrix as om
from benchmarks import jobs
from benchmarks.convergence import claims, claims_plots, claims_report, scaling
from benchmarks.convergence.arms import Arm
from benchmarks.trial import Trial
from examples.nanogpt import configs, train
from tests import problems


@pytest.fixture
def fields(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"to be, or not to be, that is the question\n" * 400)
    sizes = {"layers": 1, "width": 16, "head_dim": 8, "context": 16, "batch_size": 8}
    return {**sizes, "steps": 2, "val_windows": 8, "data": str(text)}


@pytest.mark.slow
def test_a_point_is_that_of_its_formulas(fields):
    config = configs.resolve(dataclasses.replace(configs.TINY, **fields))
    arm = claims.ARMS["muon"]
    trial = Trial(config, arm.make(arm.start, config))

    def matrices(tree):
        leaves = jax.tree.leaves_with_path(tree["blocks"])
        return [np.asarray(x, np.float64) for _, x in leaves if x.ndim == 2]

    before, windows = matrices(trial.state.params), trial.windows.train(0)[0]
    grads = matrices(jax.grad(train.loss_fn)(trial.state.params, trial.graph, windows))
    got = claims.measure(trial)
    after = matrices(trial.state.params)
    assert len(before) == 6 and trial.count == 1 and got["step"] == 0
    norms = [np.linalg.norm(x) for x in before]
    np.testing.assert_allclose(got["norm"], np.mean(norms), rtol=1e-5)
    steps = [
        np.linalg.norm(b - a) / n for a, b, n in zip(before, after, norms, strict=True)
    ]
    np.testing.assert_allclose(got["relative_step"], np.mean(steps), rtol=1e-3)

    def energies(x):
        squares = np.linalg.svd(x, compute_uv=False) ** 2
        return squares / squares.sum()

    for name, arrays in (("weights", before), ("gradient", grads)):
        shares = [energies(x) for x in arrays]
        entropies = [-(p * np.log(p)).sum() / np.log(len(p)) for p in shares]
        ratios = [1 / (p**2).sum() / len(p) for p in shares]
        np.testing.assert_allclose(got[name]["entropy"], np.mean(entropies), rtol=1e-3)
        np.testing.assert_allclose(
            got[name]["participation"], np.mean(ratios), rtol=1e-3
        )
    top = np.mean([energies(x)[:5].sum() for x in grads])
    np.testing.assert_allclose(got["gradient"]["top_5"], top, rtol=1e-3)


def test_studies_are_continued(tmp_path):
    def pretended(job):
        return {"loss": 1.0, "points": [{"step": 0}]}

    counts = {"dynamics": 15, "flattening": 3, "rates": 30, "transfer": 525}
    counts |= {"scaled": 165, "auxiliary": 54, "tokens": 54, "coordinates": 24}
    assert counts.keys() == set(claims.STUDIES)
    for study, count in counts.items():
        path, todo = tmp_path / f"{study}.jsonl", claims.jobs_of(study)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            said = list(jobs.run_all(todo, pretended, path, pool))
            assert len(said) == count and f"[{count}/{count}]" in said[-1]
            lines = path.read_text().splitlines(keepends=True)
            assert len({json.dumps(json.loads(line)) for line in lines}) == count
            path.write_text("".join(lines[:-2]))
            assert len(list(jobs.run_all(todo, pretended, path, pool))) == 2
            assert not list(jobs.run_all(todo, pretended, path, pool))
            # A line that was cut off is done again.
            path.write_text("".join(lines)[:-5])
            assert len(list(jobs.run_all(todo, pretended, path, pool))) == 1
        assert sorted(path.read_text().splitlines()) == sorted(
            line.strip() for line in lines
        )


def test_a_job_that_fails_ends_the_others(tmp_path):
    begun = []

    def fails(job):
        begun.append(job["seed"])
        if job["seed"] == 1:
            raise RuntimeError("no memory")
        time.sleep(0.05)  # so that the failure is seen before the last job begins
        return {"loss": 1.0}

    path, todo = tmp_path / "runs.jsonl", [{"seed": seed} for seed in range(50)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with pytest.raises(RuntimeError, match="no memory"):
            list(jobs.run_all(todo, fails, path, pool))
    assert len(begun) < len(todo)
    # What was done before is kept.
    assert [run["seed"] for run in jobs.read(path)] == [0]


@pytest.mark.slow
def test_flattening_is_that_of_its_formulas(fields):
    config = configs.resolve(dataclasses.replace(configs.TINY, **fields))
    arm = claims.ARMS["muon"]
    trial = Trial(config, arm.make(arm.start, config))
    assert claims.flatten(trial)["step"] == 0

    def matrices(tree):
        leaves = jax.tree.leaves(tree["blocks"])
        return [np.asarray(x, np.float64) for x in leaves if x.ndim == 2]

    first = optax.tree.get(trial.state.optimizer, "momentum")
    m, g = matrices(first), matrices(trial.gradient())
    got = claims.flatten(trial)
    # Nesterov's momentum: what the next update orthogonalizes.
    moved = [0.95 * m + 0.05 * g for m, g in zip(m, g, strict=True)]
    ahead = [0.95 * m + 0.05 * g for m, g in zip(moved, g, strict=True)]
    for name, arrays in (("gradient", g), ("momentum", ahead)):
        for steps in (0, 3, 5):
            sigmas = []
            for x in arrays:
                sigma = np.linalg.svd(x / np.linalg.norm(x), compute_uv=False)
                for _ in range(steps):
                    sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
                sigmas.append(sigma)
            share = np.mean(np.abs(np.concatenate(sigmas) - 1) <= 0.5)
            # One value of 16 in six matrices may be on the other side of a limit.
            np.testing.assert_allclose(got[name][steps], share, atol=1.01 / 96)


@pytest.mark.slow
@pytest.mark.parametrize("study", [s for s in claims.STUDIES if s != "coordinates"])
def test_every_study_trains(study, fields):
    todo = claims.jobs_of(study)
    job = next((job for job in todo if job["arm"] == "muonh"), todo[0])
    got = claims.do(study, job, fields=fields)
    json.dumps(got, allow_nan=False)
    assert 4 < got["loss"] < 7 and got["study"] == study
    if study == "dynamics":
        assert [point["step"] for point in got["points"]] == [0]
        # A hyperball step has the length of its learning rate.
        np.testing.assert_allclose(got["points"][0]["relative_step"], 0.06, rtol=0.01)


def test_the_size_of_a_model_is_that_of_its_job(fields, monkeypatch):
    seen = []

    def pretended(config, optimizer, every):
        seen.append((config.width, config.layers, config.seed, config.steps, every))
        return {"loss": 1.0}

    monkeypatch.setattr(claims, "fit", pretended)
    todo = claims.jobs_of("transfer")
    for job in (todo[0], todo[-1]):
        claims.do("transfer", job, fields={"data": fields["data"]})
    assert seen == [(64, 1, 1, 50, 50), (64, 8, 3, 50, 50)]


@pytest.mark.parametrize(
    "arm, hidden, head, gain",
    [
        ("adamw", 1 / 2, 1 / 2, 1),
        ("muonh", 1 / 2, 0.003 / 2 / 2, 0.003 / 2),
        ("muon_rms", 2**-0.5, 0.003 / 2, 0.003),
        ("muon_spectral", 1, 0.003 / 2, 0.003),
    ],
)
def test_scaled_rates_are_those_of_the_base_model_times_factors(
    arm, hidden, head, gain
):
    config = dataclasses.replace(configs.TINY, width=128, layers=4)

    def sgd(values, config):
        rate = values["learning_rate"]
        auxiliary = rate if arm == "adamw" else config.aux_lr
        return om.partition(lambda layout: optax.sgd(rate), optax.sgd(auxiliary))

    unit = claims.CHECKED[arm]
    made = scaling.scaled(Arm(sgd, {}), unit, over_depth=arm == "muonh")
    tx = made.make({"learning_rate": 1.0}, config)
    params = jax.tree.map(lambda x: jnp.ones(x.shape), scaling.shapes(config))
    updates, _ = tx.update(params, tx.init(params), params)
    found = {
        "hidden": updates["blocks"][3]["mlp"]["fc"],
        "head": updates["head"],
        "gain": updates["norm2"],
        "embed": updates["embed"],
    }
    want = {"hidden": hidden, "head": head, "gain": gain, "embed": gain}
    for name, tree in found.items():
        (leaf,) = jax.tree.leaves(tree)
        np.testing.assert_allclose(leaf, -want[name], rtol=1e-6, err_msg=name)


def test_the_size_of_a_step_is_that_of_its_singular_values():
    square = problems.with_spectrum((4, 4), [2, 1, 1, 0])
    wide = problems.with_spectrum((4, 16), [6, 6, 6, 6])
    old = {"o": jnp.ones((4, 4)), "fc": jnp.zeros((4, 16)), "scale": jnp.ones(4)}
    new = {"o": 1 + square, "fc": wide, "scale": jnp.zeros(4)}
    found = scaling.step_sizes({"blocks": [old]}, {"blocks": [new]})
    wanted = {"spectral": (2 * 6 / 2) ** 0.5, "stable_rank": (6 / 4 * 4) ** 0.5}
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
def test_activations_are_those_of_the_model(fields, monkeypatch):
    monkeypatch.setattr(scaling, "WIDTHS", (8, 16))
    monkeypatch.setattr(scaling, "UPDATES", 2)
    job = {"arm": "adamw", "scaled": True, "seed": 1}
    del fields["width"], fields["steps"]
    found = claims.do("coordinates", job, fields=fields)
    json.dumps(found, allow_nan=False)
    assert list(found["changes"]) == ["blocks", "embedding", "head"]
    assert np.shape(found["changes"]["head"]) == (2, 2)
    assert np.shape(found["exponents"]["head"]) == (2,)
    assert [*map(len, found["steps"].values())] == [2, 2]
    # The capped logits of the model are those of what the head passes on.
    fields |= {"width": 16, "steps": 2}
    config = configs.resolve(dataclasses.replace(configs.TINY, **fields))
    trial = Trial(config, optax.sgd(0.1))
    head = scaling.activations(trial)["head"]
    gpt = nnx.merge(trial.graph, trial.state.params)
    capped = 15 * head / np.sqrt(np.square(head) + 15**2)
    np.testing.assert_allclose(gpt(trial.windows.val[0][:, :-1]), capped, rtol=1e-4)


# --------------------------------------------------------------------- answers


def test_a_claim_is_judged_by_its_interval():
    assert claims_report.judge("c", "n", [1.0, 1.1, 0.9], 0.5, 1.5) == (
        *("c", "n", "1 ± 0.25", "0.5 to 1.5", "yes"),
    )
    assert claims_report.judge("c", "n", [1.0, 1.1, 0.9], high=0.5).answer == "no"
    assert claims_report.judge("c", "n", [1.0, 1.1, 0.9], low=2.0).answer == "no"
    assert claims_report.judge("c", "n", [1.0, 1.1, 0.9], low=0.9).answer == "undecided"
    assert claims_report.judge("c", "n", [1.0], low=0.0).answer == "undecided"


def history(arm, seed, *, power, slowing, entropy, top):
    """A run whose measures are known."""
    points = []
    for step in range(0, 250, 25):
        share = step / 225
        points.append(
            {
                "step": step,
                "norm": (4.0 + (1 + 0.01 * seed) * step ** (2 * power)) ** 0.5,
                "relative_step": 0.1 * slowing ** ((step - 25) / 200),
                "weights": {
                    "entropy": 0.9 + (entropy + 1e-3 * seed) * share,
                    "participation": 0.5 + (entropy + 1e-3 * seed) * share,
                },
                "gradient": {"top_5": top + 1e-3 * seed},
            }
        )
    return {"arm": arm, "seed": seed, "points": points, "loss": 1.0}


def test_answers_are_those_of_known_runs(tmp_path):
    known = {
        "adamw": {"power": 0.5, "slowing": 0.5, "entropy": 0.0, "top": 0.4},
        "muon": {"power": 0.9, "slowing": 0.5, "entropy": 0.0, "top": 0.8},
        "muonw": {"power": 0.5, "slowing": 0.3, "entropy": -0.1, "top": 0.5},
        "muonh": {"power": 0.5, "slowing": 1.0, "entropy": -0.2, "top": 0.5},
        "spectral_sphere": {"power": 0.5, "slowing": 1, "entropy": -0.05, "top": 0.5},
    }
    # The order of a file is that in which runs end, another one for each arm.
    runs = [
        history(arm, 1 + (place + turn) % 3, **kind)
        for place, (arm, kind) in enumerate(known.items())
        for turn in range(3)
    ]
    answers = claims_report.dynamics_of(runs)
    assert [answer.answer for answer in answers] == [
        *("no", "yes"),
        *("yes", "yes"),
        *("yes", "yes", "yes", "yes"),
        *("yes", "yes", "no"),
    ]
    assert answers[0].measured.startswith("0.9 ±")
    assert answers[2].measured.startswith("0.3 ±")
    # Differences are of the same seed, so that what seeds have in common cancels.
    assert float(answers[5].measured.split(" ± ")[1]) < 1e-6
    assert claims_report.table(answers).count("\n") == len(answers) + 1
    claims_plots.dynamics(runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_rates_are_paired_by_place_and_seed():
    runs = []
    for job in claims.jobs_of("rates"):
        factor = job["learning_rate"] / claims.ARMS[job["arm"]].start["learning_rate"]
        # MuonH is better at low rates, and at the highest only MuonW trains.
        gap = 0.1 * np.log2(factor) if job["arm"] == "muonh" else 0.0
        loss = 1.5 + gap + 0.01 * job["seed"]
        lost = job["arm"] == "muonh" and factor > 3
        runs.append({**job, "loss": None if lost else loss})
    text, answers = claims_report.rates_of(runs)
    assert [answer.answer for answer in answers] == ["yes", "yes", "yes", "undecided"]
    assert "| 0.01 | 0.015 | 1.520 | 1.320 | -0.200 |" in text
    assert text.count("\n") == 6 and "inf" in text


def test_shares_are_means_over_a_run():
    shares = [[0.0, 0.1, 0.4, 0.7, 0.9, 0.95], [0.0, 0.1, 0.4, 0.9, 1.0, 0.97]]
    points = [{"momentum": share, "gradient": share[::-1]} for share in shares]
    answers = claims_report.flattening_of([{"points": points}] * 3)
    assert [answer.answer for answer in answers] == ["yes", "yes", "no"] * 2
    means = [answer.measured.split(" ± ")[0] for answer in answers]
    assert means == ["0.96", "0.97", "0", "0.8", "0.9", "0.4"]


def test_the_best_rate_is_the_minimum_of_a_parabola():
    rates = [0.01 * 2.0**k for k in range(5)]
    losses = {rate: (np.log2(rate) - np.log2(0.05)) ** 2 for rate in rates}
    assert claims_report.best_rate(losses) == pytest.approx(np.log2(0.05))
    assert claims_report.best_rate({0.1: 1.0, 0.2: 2.0, 0.4: 3.0}) == -np.inf
    assert claims_report.best_rate({0.1: 3.0, 0.2: 2.0, 0.4: 1.0}) == np.inf
    diverged = {0.125: 3.0, 0.25: 2.0, 0.5: np.inf}
    assert claims_report.best_rate(diverged) == -2


def test_transfer_is_the_movement_of_the_best_rate():
    def octaves(job):
        """By how many octaves the best rate of a model is below the base rate."""
        wide, deep = np.log2(job["width"] / 64), np.log2(job["layers"])
        slopes = {"adamw": (0.5, 0.0), "muonh": (0.0, 0.0), "muon_rms": (0.1, 9.0)}
        by_width, by_depth = slopes.get(job["arm"], (0.0, 0.3))
        return by_width * wide + by_depth * deep

    runs = []
    for job in claims.jobs_of("transfer"):
        start = claims.TRANSFERRED[job["arm"]].start["learning_rate"]
        place = np.log2(job["learning_rate"] / start) + octaves(job)
        runs.append({**job, "loss": 2 + (place - 1e-3 * job["seed"]) ** 2})
    text, answers = claims_report.transfer_of(runs)
    found = {answer.number: answer for answer in answers}
    assert len(found) == 10
    adamw = found["octaves from 64 to 512, adamw"]
    assert adamw.answer == "no" and adamw.measured.startswith("-1.5 ±")
    assert found["octaves from 64 to 512, muonh"].answer == "yes"
    assert found["octaves from 64 to 512, muon_rms"].answer == "yes"
    assert found["octaves from 1 to 8, muon_mup"].measured.startswith("-0.9 ±")
    # A best rate at the end of what was tried is not known.
    assert found["octaves from 1 to 8, muon_rms"].answer == "undecided"
    assert "| adamw | 0.006 | 0.0042 | 0.003 | 0.0021 | 0.006 |" in text
    assert "| lower |" in text
    # The smallest model is the one that is not named.
    smallest = claims_report.losses_at(runs, arm="adamw")
    assert smallest == claims_report.losses_at(runs, arm="adamw", width=64, layers=1)
    assert [len(losses) for losses in smallest.values()] == [3] * 5
    # Half an octave to either side is as good; the loss is 1 - 0.002 times the seed.
    assert "| adamw | 0.006 | best too | +0.996 ± 0.005 | +" in text
    assert "| muonh | 0.1 | best too | best too | best too | best too |" in text


def test_scaled_rates_are_compared_with_the_same_rate():
    runs = {"transfer": [], "scaled": []}
    for study, done in runs.items():
        for job in claims.jobs_of(study):
            start = claims.TRANSFERRED[job["arm"]].start["learning_rate"]
            place = np.log2(job["learning_rate"] / start)
            # Without factors the best rate falls by an octave per octave of width.
            if study == "transfer" and job["arm"] == "adamw":
                place += np.log2(job["width"] / 64)
            done.append({**job, "loss": 2 + place**2 + 0.01 * job["seed"]})
    runs["transfer"].reverse()  # runs are paired by seed, not by their order
    text, answers = claims_report.transfer_of(runs["scaled"])
    assert [answer.answer for answer in answers] == ["yes"] * 3
    assert "| adamw | 0.006 | 0.006 | 0.006 | 0.006 |  |  |  |  |" in text
    assert "| adamw | 0.006 | best too | best too | best too |  |  |  |" in text
    gained = claims_report.gained_of(runs["scaled"], runs["transfer"])
    assert "| adamw | 0.006 | -1.000 ± 0.000 | -4.000 ± 0.000 | -9" in gained
    assert gained.splitlines()[-1] == "| muonh | 0.1 |" + " +0.000 ± 0.000 |" * 6


def test_losses_beside_a_tuned_auxiliary_are_paired():
    runs = [
        {**job, "loss": 2 + 0.1 * job["seed"] - (0.25 if job["scaled"] else 0)}
        for job in claims.jobs_of("auxiliary")
    ]
    text, answers = claims_report.auxiliary_of(runs)
    lines = text.splitlines()
    assert len(lines) == 2 + 9 and not answers
    assert lines[5] == "| width 512 | the same | 2.200 | 2.200 | 2.200 |"
    assert lines[-2] == "| width 64, 8 layers | scaled | 1.950 | 1.950 | 1.950 |"
    assert lines[-1].endswith("| difference |" + " -0.250 ± 0.000 |" * 3)


def checked(job, exponent):
    """A run of `coordinates` in which the head's changes follow a power law."""
    changes = [[0.1 * width**exponent for width in scaling.WIDTHS]] * 2
    names = ("blocks", "embedding", "head")
    powers = {"blocks": 0.0, "embedding": 0.0, "head": exponent + 0.01 * job["seed"]}
    return {
        **{"study": "coordinates", **job, "changes": dict.fromkeys(names, changes)},
        "exponents": {name: [9.0, power] for name, power in powers.items()},
        "steps": {"spectral": changes[0], "stable_rank": np.sqrt(scaling.WIDTHS)},
    }


def test_coordinates_are_judged_by_the_last_step(tmp_path):
    runs = [
        checked(job, 0.0 if job["scaled"] else 1.0)
        for job in claims.jobs_of("coordinates")
    ]
    text, answers = claims_report.coordinates_of(runs)
    assert [answer.answer for answer in answers] == ["no", "yes"] * 4
    assert "| head | steps: spectral | steps: stable rank |" in text
    numbers = ("+0.00 ± 0.00", "+0.00 ± 0.00", "+1.02 ± 0.02", "+1.00 ± 0.00")
    assert f"| adamw | the same | {' | '.join(numbers)} | +0.50 ± 0.00 |" in text
    claims_plots.coordinates(runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_best_rates_by_tokens_are_those_of_known_runs():
    def loss(job, power):
        best = 0.1 * (job["steps"] / 50) ** power * 1.05 ** job["seed"]
        return np.log2(job["learning_rate"] / best) ** 2

    for power, judged in ((-0.32, ["no", "yes"]), (0.0, ["yes", "no"])):
        runs = [
            {"study": "tokens", **job, "loss": loss(job, power)}
            for job in claims.jobs_of("tokens")
        ]
        text, answers = claims_report.tokens_of(runs)
        assert [answer.answer for answer in answers] == judged
        moved = float(answers[0].measured.split()[0])
        assert moved == pytest.approx(4 * power, abs=1e-6)
        assert answers[1].range == "-1.78 to -0.78"
        last = text.splitlines()[-1]
        assert f"| {0.1 * 16**power * 1.05**2:.2g} |" in last
        assert last.endswith("| best too |") == (power == 0)


def test_every_study_has_a_plot(tmp_path):
    runs = {study: [] for study in ("flattening", "rates", "transfer", "scaled")}
    for study, done in runs.items():
        for job in claims.jobs_of(study):
            points = [{"momentum": [0.5] * 6, "gradient": [0.2] * 6}]
            done.append({"study": study, **job, "loss": 1.0, "points": points})
        path = tmp_path / f"{study}.png"
        getattr(claims_plots, study)(done, path)
        assert path.stat().st_size > 1000
    studies = {*runs, "dynamics", "coordinates", "auxiliary", "tokens"}
    assert studies == claims_report.ANSWERS.keys() == set(claims.STUDIES)
