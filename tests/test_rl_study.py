"""The ablation of Hopper in reinforcement learning: its runs, and their answers."""

import concurrent.futures
import dataclasses

import numpy as np
import pytest

from benchmarks import jobs
from benchmarks.rl import report, study
from examples.rl import task


def finished(job, *, right=0.7, entropy=0.1, peak=1.5, lead=40, late=0.0, last=90):
    """A run with known measures; every kind gains half at a known step."""
    noise = 1e-3 * job["seed"]
    blocks = job["steps"] // 10

    def by_kind(step):
        def share(kind):
            half = 20 if kind.startswith("par") else 20 + lead
            return 0.2 + 0.6 * min(1.0, step / (2 * half))

        return {kind: share(kind) for kind in task.KINDS}

    def score(share, step=job["steps"]):
        return {"all": share, "by_kind": by_kind(step), "nonsense": 0.1 - share / 10}

    steps = range(0, job["steps"] + 1, 5)
    validation = [
        {
            **{"step": s, "by_kind": by_kind(s)},
            "all": 0.4 + 0.3 * min(1, s / last) + (late + noise) * (s > 200),
        }
        for s in steps
    ]
    flat = [0.1] * blocks
    measures = {name: {"mean": flat, "max": flat} for name in study.KEPT}
    measures["entropy"] = {"mean": [entropy + noise] * blocks, "max": [1.0] * blocks}
    rising = [0.01 * i for i in range(blocks)]
    measures["correct"] = {"mean": rising, "max": rising}
    measures["kl_k1"] = {"mean": flat, "max": [*flat[1:], 0.1 * (peak + noise)]}
    best = {**score(right + noise), "pass@8": {"all": 0.9}}
    best["by_verb"] = {"dry": 0.9, "boil": right, "rust": 0.5}
    return {
        **job,
        **{
            "loss": 1 - right - noise,
            "best": best,
            "last": score(right + noise + late),
        },
        **{"best_step": 100, "measures": measures, "validation": validation},
    }


KNOWN = {
    "sgd": {"right": 0.5, "peak": 1.2},
    "adam": {"right": 0.7, "lead": 20},
    "muon": {"right": 0.65, "entropy": 0.3, "peak": 3.0},
    "adamuon": {"peak": 2.0},
    "hopper": {"right": 0.75, "lead": 40, "last": 30},
    "hopper, then adam": {"right": 0.72},
    "raw, 1 step": {"right": 0.71},
    "raw, 5 steps": {"right": 0.6, "lead": 0},
}


def known_runs():
    rates = study.jobs_of("rates", 1, [])
    runs = []
    for job in rates:
        middle = study.ARMS[job["arm"]][2]
        off = abs(np.log2(job["learning_rate"] / middle) - 0.5)
        runs.append({**finished(job), "loss": 0.3 + 0.01 * off})
    for phase in ("finals", "long"):
        for job in study.jobs_of(phase, 1, runs):
            late = -0.05 if phase == "long" else 0.0
            runs.append(finished(job, **KNOWN.get(job["arm"], {}), late=late))
    return runs


def test_every_arm_has_the_same_number_of_rates_and_seeds():
    rates = study.jobs_of("rates", 1, [])
    for arm, (_, _, middle) in study.ARMS.items():
        mine = [job["learning_rate"] for job in rates if job["arm"] == arm]
        assert len(set(mine)) == 6
        assert max(mine) / min(mine) == pytest.approx(32, rel=0.02)
        assert np.sqrt(max(mine) * min(mine)) == pytest.approx(middle, rel=0.02)
    with pytest.raises(ValueError, match="66 of 66 runs of `rates`"):
        study.jobs_of("finals", 1, [])
    runs = known_runs()
    with pytest.raises(ValueError, match="`rates` with 4 epochs are missing"):
        study.jobs_of("finals", 4, runs)
    with pytest.raises(ValueError, match="1 of 66 runs"):
        study.jobs_of("finals", 1, runs[1:])
    finals = study.jobs_of("finals", 1, runs)
    for arm, (_, _, middle) in study.ARMS.items():
        mine = [job for job in finals if job["arm"] == arm]
        assert [job["seed"] for job in mine] == [1, 2, 3, 4, 5]
        assert {job["learning_rate"] for job in mine} == {
            float(f"{middle * 2**0.5:.3g}")
        }
    hybrid = [job for job in finals if job["arm"] == "hopper, then adam"]
    config = study.config_of(hybrid[0])
    assert (config.optimizer, config.then) == ("hopper", "adam")
    assert config.then_lr == study.best_rates(runs, 1)["adam"]
    assert config.seed == config.base_seed == 1
    (rate,) = {job["learning_rate"] for job in finals if "raw" in job["arm"]}
    assert rate == study.best_rates(runs, 1)["raw, 5 steps"]
    one = next(job for job in finals if job["arm"] == "raw, 1 step")
    config = study.config_of(one)
    assert config.settings == {"orthogonalize": {"steps": 1}, **study.RAW}
    assert (config.steps, config.eval_every, config.rounds) == (120, 5, 1)
    four = study.jobs_of("rates", 4, [])
    assert len(four) == 36 and {job["steps"] for job in four} == {60}
    with pytest.raises(ValueError, match="`long` is for 1 epoch, got 4"):
        study.jobs_of("long", 4, [{**job, "loss": 0.3} for job in four])
    long = study.jobs_of("long", 1, runs)
    assert {(job["arm"], job["steps"]) for job in long} == {
        (arm, 360) for arm in study.LONG_ARMS
    }


def test_measures_are_means_and_maxima_of_ten_steps():
    records = [{"kind": "val", "x": 9.0}]
    records += [{"kind": "train", "x": float(i)} for i in range(20)]
    assert study.blocks(records, "x") == {"mean": [4.5, 14.5], "max": [9.0, 19.0]}


def test_answers_are_those_of_known_runs(tmp_path):
    runs = known_runs()
    np.random.default_rng(0).shuffle(runs)
    answers = report.answers_of(runs)
    assert [answer.answer for answer in answers] == [
        *("yes", "yes"),  # an entropy floor
        *("yes", "yes"),  # spikes
        *("yes", "yes", "yes", "yes"),  # SGD is smooth, and last
        *("yes", "yes"),  # variance calms
        *("yes", "yes"),  # one step is better, with less nonsense
        *("yes", "no"),  # at one rate: better, but later
        "yes",  # twice as fast
        *("yes", "yes", "yes"),  # parallel before arithmetic
        *("yes", "yes", "yes"),  # late decline
        *("no", "yes"),  # the hybrid
    ]
    measured = [float(answer.measured.split(" ± ")[0]) for answer in answers]
    np.testing.assert_allclose(measured[0], 0.2, rtol=1e-6)
    np.testing.assert_allclose(measured[2:4], [0.15, 1.5], rtol=1e-6)
    np.testing.assert_allclose(measured[5:8], [-0.2, -0.15, -0.25], rtol=1e-6)
    np.testing.assert_allclose(measured[12], 0.11, rtol=1e-6)
    np.testing.assert_allclose(measured[14], 30 / 90, rtol=1e-2)
    np.testing.assert_allclose(measured[15:18], [40, 20, 20], rtol=1e-6)
    np.testing.assert_allclose(measured[18:21], [-0.047] * 3, rtol=0.02)
    np.testing.assert_allclose(measured[21], -0.03, rtol=1e-6)
    with pytest.raises(ValueError, match="continue the study until"):
        report.answers_of([r for r in runs if (r["arm"], r["seed"]) != ("muon", 3)])
    lines = report.arms_of(runs).splitlines()
    assert len(lines) == 2 + len(study.ARMS) + len(study.SAME_RATE) + 1
    assert lines[2].startswith("| hopper | 0.0002 | 0.753 ± 0.002 | +0.050 ± 0.000 |")
    assert "| 0.800 | 2.0 | 0.900 |" in lines[2]  # seq, verbs, pass@8
    assert "| hopper, then adam | 0.0002, 0.0002 |" in "\n".join(lines)
    assert report.rates_of(runs).count("\n") == 1 + len(study.ARMS)
    with_4 = [{**r, "epochs": 4} for r in runs if r["arm"].split(",")[0] != "raw"]
    with_4 = [r for r in with_4 if r["phase"] != "long"]
    assert len(report.answers_of(with_4)) == len(answers) - 2 - 3
    report.plot(runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_what_is_never_learned_is_learned_last():
    def run(arithmetic, parallel):
        by_kind = {k: 0.2 for k in task.KINDS}
        points = []
        for step, a, p in zip((0, 100, 200), arithmetic, parallel, strict=True):
            found = {k: a for k in report.ARITHMETIC} | {k: p for k in report.PARALLEL}
            points.append({"step": step, "by_kind": by_kind | found, "all": a})
        return {"validation": points}

    assert report.lead(run([0.2, 0.2, 0.21], [0.0, 1.0, 1.0])) == 200 - 50
    assert report.lead(run([0.2, 0.6, 0.6], [0.0, 0.0, 0.0])) == 50 - 200
    assert report.lead(run([0.2, 0.2, 0.2], [0.1, 0.1, 0.1])) == 0
    adam, never = run([0.2, 0.2, 0.1], [0, 0, 0]), run([0.1, 0.1, 0.1], [0, 0, 0])
    assert report.time_to(adam, adam) == 0 and report.time_to(never, adam) == 200


@pytest.mark.slow
def test_a_run_of_the_study_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where its base is kept
    monkeypatch.setattr(study, "BLOCK", 2)
    full = study.config_of

    def short(job):
        few = {"base_steps": 2, "groups": 2, "samples": 4, "eval_every": 2}
        few |= {"eval_problems": 1, "test_problems": 1}
        return dataclasses.replace(full(job), **few)

    monkeypatch.setattr(study, "config_of", short)
    job = {"phase": "finals", "epochs": 4, "steps": 4, "arm": "hopper, 5 steps"}
    job |= {"learning_rate": 1e-4, "seed": 1}
    path = tmp_path / "runs.jsonl"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        (said,) = jobs.run_all([job], study.do, path, pool)
    assert "arm hopper, 5 steps" in said
    (run,) = jobs.read(path)
    assert job.items() <= run.items() and 0 <= run["loss"] <= 1
    assert [point["step"] for point in run["validation"]] == [0, 2, 4]
    assert all(len(run["measures"][name]["max"]) == 2 for name in study.KEPT)
