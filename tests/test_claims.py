"""The runs that answer claims about optimizers, and what they measure."""

import concurrent.futures
import json

import jax
import numpy as np
import pytest

from benchmarks.convergence import claims
from benchmarks.trial import Trial
from examples.nanogpt import configs, train


@pytest.fixture
def fields(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"to be, or not to be, that is the question\n" * 400)
    sizes = {"layers": 1, "width": 16, "head_dim": 8, "context": 16, "batch_size": 8}
    return {**sizes, "steps": 2, "val_windows": 8, "data": str(text)}


def test_a_point_is_that_of_its_formulas(fields):
    config = configs.resolve(configs.dataclasses.replace(configs.TINY, **fields))
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


def test_studies_are_continued(tmp_path, monkeypatch):
    def pretended(study, job, fields):
        return {"study": study, **job, "loss": 1.0, "points": [{"step": 0}]}

    monkeypatch.setattr(claims, "do", pretended)
    for study, count in (("dynamics", 15), ("rates", 30)):
        path = tmp_path / f"{study}.jsonl"
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            said = list(claims.run_all(study, path, pool))
            assert len(said) == count and f"[{count}/{count}]" in said[-1]
            lines = path.read_text().splitlines(keepends=True)
            assert len({json.dumps(json.loads(line)) for line in lines}) == count
            path.write_text("".join(lines[:-2]))
            assert len(list(claims.run_all(study, path, pool))) == 2
            assert not list(claims.run_all(study, path, pool))
        assert sorted(path.read_text().splitlines()) == sorted(
            line.strip() for line in lines
        )


@pytest.mark.slow
@pytest.mark.parametrize("study", claims.STUDIES)
def test_every_study_trains(study, fields):
    job = next(job for job in claims.jobs_of(study) if job["arm"] == "muonh")
    got = claims.do(study, job, fields)
    json.dumps(got, allow_nan=False)
    assert 4 < got["loss"] < 7 and job.items() <= got.items()
    if study == "dynamics":
        assert [point["step"] for point in got["points"]] == [0]
        # A hyperball step has the length of its learning rate.
        np.testing.assert_allclose(got["points"][0]["relative_step"], 0.06, rtol=0.01)
