"""The ablation of Hopper in reinforcement learning: its runs, and their answers."""

import concurrent.futures
import dataclasses

import numpy as np
import pytest

from benchmarks import jobs
from benchmarks.rl import report, study
from examples.rl import task


def finished(
    job, *, right=0.7, entropy=0.1, peak=1.0, lead=40, late=0.0, last=90, learned=20
):
    """A run with known measures.

    Half of the parallel problems are right at `learned`, arithmetic has made half of
    its gain `lead` later, and the KL is `peak` times as large in a single step.
    """
    noise, steps = 1e-3 * job["seed"], job["steps"]

    def by_kind(step):
        rising = min(1.0, step / (2 * (learned + lead)))
        kinds = dict.fromkeys(task.KINDS, 0.4 + 0.4 * rising)
        parallel = min(1.0, step / (2 * learned))
        return {**kinds, "par_easy": parallel, "par_hard": parallel, "seq": 1.0}

    def point(step):
        share = 0.4 + 0.3 * min(1, step / last) + (late + noise) * (step > 200)
        return {"step": step, "by_kind": by_kind(step), "all": share}

    validation = [point(s) for s in range(0, steps + 1, 5 if job["epochs"] == 1 else 2)]
    # What the KL of a step depends on in all runs, and how it grows in all.
    kl = [0.002 * (i + 1) * (1 + 0.5 * (i % 3)) for i in range(steps)]
    kl[3 * steps // 4] *= peak + noise
    measures = {name: [0.1] * steps for name in study.KEPT}
    measures |= {"kl_k1": kl, "entropy": [entropy + noise] * steps}
    measures["correct"] = [0.5 * i / steps + right - 0.5 for i in range(steps)]
    score = {"all": right + noise, "nonsense": 0.1 - right / 10 - noise}
    score["by_kind"] = by_kind(steps)
    best = {**score, "pass@8": {"all": 0.9}}
    best["by_verb"] = {"dry": 0.9, "boil": right, "rust": 0.5}
    return {
        **{**job, "loss": 1 - right - noise, "best": best},
        **{"last": {**score, "all": right + noise + late}, "best_step": 100},
        **{"measures": measures, "validation": validation},
    }


KNOWN = {
    "sgd": {"right": 0.5},
    "adam": {"right": 0.7, "lead": 20, "peak": 1.5, "learned": 40},
    "muon": {"right": 0.65, "entropy": 0.3, "peak": 3.0},
    "adamuon": {"peak": 2.0, "entropy": 0.15},
    "hopper": {"right": 0.75, "last": 30},
    "hopper, 5 steps": {"peak": 2.0, "entropy": 0.2},
    "hopper, then adam": {"right": 0.72},
    "raw, 1 step": {"right": 0.71, "last": 100},
    "raw, 5 steps": {"right": 0.6, "peak": 2.0, "last": 40},
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
            late = -0.04 if job["arm"] == "adam" else -0.05
            known = {"late": late if phase == "long" else 0.0}
            runs.append(finished(job, **known | KNOWN.get(job["arm"], {})))
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
    assert study.config_of({**one, "epochs": 4}).eval_every == 2
    four = study.jobs_of("rates", 4, [])
    assert len(four) == 36 and {job["steps"] for job in four} == {60}
    with pytest.raises(ValueError, match="`long` is for 1 epoch, got 4"):
        study.jobs_of("long", 4, [{**job, "loss": 0.3} for job in four])
    long = study.jobs_of("long", 1, runs)
    assert {(job["arm"], job["steps"]) for job in long} == {
        (arm, 360) for arm in study.LONG_ARMS
    }


def test_equal_rates_are_the_same_for_all_newton_schulz_steps():
    tried = {}
    for job in study.jobs_of("rates", 1, []):
        tried.setdefault(job["arm"], []).append(job["learning_rate"])
    one, five = tried["hopper"], tried["hopper, 5 steps"]
    np.testing.assert_allclose(one[1:], five[:-1], rtol=0.01)


def test_of_equal_losses_the_lower_rate_is_chosen():
    runs = [{**run, "loss": 0.3} for run in known_runs()]
    best = study.best_rates(runs[::-1], 1)
    assert best["adam"] == min(
        run["learning_rate"] for run in runs if run["arm"] == "adam"
    )


def test_answers_are_those_of_known_runs(tmp_path):
    runs = known_runs()
    np.random.default_rng(0).shuffle(runs)
    answers = report.answers_of(runs)
    assert [answer.answer for answer in answers] == [
        *("yes", "yes", "yes", "yes"),  # an entropy floor
        *("yes", "yes"),  # spikes
        *("yes", "yes", "yes"),  # variance calms
        *("yes", "no", "yes", "yes", "yes"),  # SGD is smooth, and last
        *("yes", "yes", "yes"),  # one step is better
        *("yes", "no", "yes"),  # at one rate: better, but later
        *("yes", "yes", "yes"),  # twice as fast
        *("yes", "yes", "yes"),  # parallel before arithmetic
        *("yes", "yes", "yes", "yes", "yes"),  # late decline
        *("no", "yes", "no", "yes"),  # the hybrid
    ]
    measured = [float(answer.measured.split(" ± ")[0]) for answer in answers]
    wanted = [0.2, 0.2, 0.05, -0.1]
    # Jumps are logarithms of ratios, and multiples of the KL above its median.
    wanted += [np.log(2), None, np.log(2 / 3), None, np.log(2 / 3)]
    wanted += [-np.log(3), -0.15, -0.2, -0.15, -0.25]
    wanted += [0.05, -0.005, -np.log(2)]
    wanted += [0.11, 30, -np.log(2)]  # 0.15 is gained at 50 and 20 of 100 and 40
    wanted += [np.log2(27 / 81), -1, -0.0]
    wanted += [40, 20, None]
    wanted += [-0.037, -0.047]  # what is lost, but for the 0.003 of the seeds
    for found, value in zip(measured, wanted, strict=False):
        if value is not None:
            np.testing.assert_allclose(found, value, rtol=0.02, atol=2e-3)
    np.testing.assert_allclose(measured[-4:], [-0.03, 0.02, -0.03, 0.01], atol=1e-6)
    with pytest.raises(ValueError, match="continue the study until"):
        report.answers_of([r for r in runs if (r["arm"], r["seed"]) != ("muon", 3)])
    lines = report.arms_of(runs).splitlines()
    assert len(lines) == 2 + len(study.ARMS) + len(study.SAME_RATE) + 1
    assert lines[2].startswith("| hopper | 0.0002 | 0.753 ± 0.002 | +0.050 ± 0.000 |")
    assert "| 0.800 | 1.000 | 1.000 | 2.0 | 0.900 |" in lines[2]  # kinds, verbs, pass@8
    assert "| hopper, then adam | 0.0002, 0.0002 |" in "\n".join(lines)
    assert report.rates_of(runs).count("\n") == 1 + len(study.ARMS)
    hopper = report.long_of(runs).splitlines()[4]
    # It has learned after 30 steps, and loses 0.05 after 200; seeds differ by 0.001.
    assert hopper == (
        "| hopper | 0.400 | 0.700 | 0.700 | 0.700 | 0.653 | 0.653 | 0.653 "
        "| 0.703 ± 0.002 |"
    )
    with_4 = [{**r, "epochs": 4} for r in runs if r["arm"].split(",")[0] != "raw"]
    with_4 = [r for r in with_4 if r["phase"] != "long"]
    assert len(report.answers_of(with_4)) == len(answers) - 3 - 5 - 2
    report.plot(runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_what_still_rises_does_not_decline():
    def run(curve):
        steps = range(0, 361, 5)
        return {"validation": [{"step": s, "all": curve(s)} for s in steps]}

    rising, other = run(lambda s: s / 1000), run(lambda s: s / 1000 + 0.1)
    assert report.late_change(rising, [other]) == pytest.approx(0.06)
    fallen = run(lambda s: 0.5 - 0.2 * (s > 300))
    # The last of 13 evaluations before the fall is the first of the last 60 steps.
    assert report.late_change(fallen, [fallen]) == pytest.approx(-0.2 * 12 / 13)


def test_what_is_hardly_learned_has_no_time():
    def run(arithmetic, parallel):
        by_kind = dict.fromkeys(task.KINDS, 0.2)
        points = []
        for step, a, p in zip((0, 100, 200), arithmetic, parallel, strict=True):
            found = {k: a for k in report.ARITHMETIC} | {k: p for k in report.PARALLEL}
            points.append({"step": step, "by_kind": by_kind | found, "all": a})
        return {"validation": points}

    assert np.isnan(report.lead(run([0.2, 0.2, 0.29], [0.0, 1.0, 1.0])))
    assert np.isnan(report.lead(run([0.2, 0.6, 0.6], [0.0, 0.1, 0.0])))
    lead = report.lead(run([0.2, 0.6, 0.6], [0.0, 0.0, 1.0]))
    assert lead == pytest.approx(50 - 150)
    adam, never = run([0.2, 0.2, 0.1], [0, 0, 0]), run([0.1, 0.1, 0.1], [0, 0, 0])
    assert report.time_to(adam, adam, 0.9) == 1
    assert report.time_to(never, adam, 0.9) == 200


def test_the_habit_and_its_opposite_are_half_of_parallelism():
    def value(parallel, seq):
        by_kind = {"par_easy": parallel, "par_hard": parallel, "seq": seq}
        return report.parallelism({"by_kind": by_kind})

    assert value(0.0, 1.0) == value(1.0, 0.0) == 0.5 and value(1.0, 1.0) == 1.0


def test_level_prompts_and_slow_growth_are_no_spikes():
    rng = np.random.default_rng(0)
    prompts = rng.gamma(4, size=120)

    def run(level, jump=0.0):
        kl = level * prompts * np.linspace(0.2, 1, 120)
        kl[80] += jump
        return {"measures": {"kl_k1": list(kl)}}

    assert abs(report.spike(run(0.1), run(0.03))) < 0.05
    assert report.spike(run(0.1, jump=3.0), run(0.03)) > 1
    assert report.spike(run(0.03), run(0.1, jump=3.0)) < -1
    early = run(0.1)
    early["measures"]["kl_k1"][20] *= 9
    assert abs(report.spike(early, run(0.1))) < 0.05
    flat = {"measures": {"kl_k1": [0.1] * 60 + [0.4] + [0.1] * 59}}
    assert report.excess(flat) == pytest.approx(0.3)


def test_entropies_are_compared_where_both_are_as_often_right():
    def run(rate, start=0.2):
        right = np.minimum(0.8, start + rate * np.arange(120))
        measures = {"correct": list(right), "entropy": list(1 - right)}
        return {"measures": measures}

    # The entropy follows from the share of right samples: no difference at any speed.
    assert abs(report.matched_entropy(run(0.005), run(0.02))) < 0.02
    higher = run(0.005)
    higher["measures"]["entropy"] = [e + 0.1 for e in higher["measures"]["entropy"]]
    assert report.matched_entropy(higher, run(0.02)) == pytest.approx(0.1, abs=0.02)
    assert np.isnan(report.matched_entropy(run(0.0), run(0.02)))


def test_a_late_change_is_from_the_best_steps_of_the_other_seeds():
    def run(values):
        points = [{"step": 10 * i, "all": v} for i, v in enumerate(values)]
        return {"validation": points}

    steps = np.arange(37)
    peaked = 0.8 - 0.01 * np.abs(steps - 12)
    lucky = [*peaked]
    lucky[20] = 1.0  # its own highest evaluation does not count
    found = report.late_change(run(lucky), [run(peaked), run(peaked)])
    assert found == pytest.approx(np.mean(peaked[-7:]) - np.mean(peaked[9:16]))


@pytest.mark.slow
def test_a_run_of_the_study_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where its base is kept
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
    assert all(len(run["measures"][name]) == 4 for name in study.KEPT)
    assert len(run["base_sha256"]) == 64
    mean = np.mean([point["all"] for point in run["validation"][1:]])
    assert run["loss"] == pytest.approx(1 - mean, abs=1e-4)
