"""The bench that compares optimizers: tuning, evidence, runs and reports."""

import concurrent.futures
import dataclasses
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import optax_matrix as om
from benchmarks.convergence import arms, evidence, report, run, tune
from examples.nanogpt import configs, data, train
from tests import problems

# ---------------------------------------------------------------------- tuning


def bowl(values):
    rate = math.log2(values["learning_rate"] / 0.05)
    memory = math.log2((1 - values["momentum"]) / 0.21)
    return rate**2 + memory**2 + 0.5 * rate * memory


def tuned(start, loss, trials):
    tried = []
    while len(tried) < trials:
        values = tune.next_values(start, tried)
        if values is None:
            break
        assert values not in [others for others, _ in tried]
        tried.append((values, loss(values)))
    return tried


def test_tuning_finds_the_least_loss_within_an_eighth_of_an_octave():
    start = {"learning_rate": 0.02, "momentum": 0.95}
    tried = tuned(start, bowl, 40)
    assert len(tried) < 40 and tried[0][0] == start
    best, _ = min(tried, key=lambda trial: trial[1])
    assert abs(math.log2(best["learning_rate"] / 0.05)) <= 0.25
    assert abs(math.log2((1 - best["momentum"]) / 0.21)) <= 0.25
    # It goes on where it stopped.
    assert tune.next_values(start, tried[:5]) == tried[5][0]


def test_tuning_survives_divergence_and_the_end_of_a_range():
    def loss(values):
        return math.inf if values["learning_rate"] > 0.03 else -values["learning_rate"]

    tried = tuned({"learning_rate": 0.02, "momentum": 0.3}, loss, 40)
    best, _ = min(tried, key=lambda trial: trial[1])
    assert 0.025 < best["learning_rate"] <= 0.03
    assert all(tune.SMALLEST_DECAY <= values["momentum"] < 1 for values, _ in tried)


# -------------------------------------------------------------------- evidence


def test_the_interval_is_students():
    arm = {1: 1.40, 2: 1.43, 3: 1.37, 4: 1.42, 9: 0.0}
    base = {1: 1.42, 2: 1.44, 3: 1.41, 4: 1.43, 5: 9.0}
    found = evidence.difference(arm, base, confidence=0.9, margin=0.01)
    gaps = [arm[seed] - base[seed] for seed in (1, 2, 3, 4)]
    low, high = stats.ttest_1samp(gaps, 0).confidence_interval(0.9)
    np.testing.assert_allclose(found.mean, np.mean(gaps))
    np.testing.assert_allclose(found.mean - found.half_width, low)
    np.testing.assert_allclose(found.mean + found.half_width, high)
    assert found.seeds == 4 and found.verdict == "better"
    with pytest.raises(ValueError, match=r"arm has the seeds \[1\].*train both"):
        evidence.difference({1: 0.0}, {2: 0.0}, confidence=0.9, margin=0.01)


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ((-0.03, -0.02, -0.025), "better"),
        ((0.03, 0.02, 0.025), "worse"),
        ((0.001, -0.002, 0.0), "no worse"),
        ((0.03, -0.04, 0.0), "undecided"),
        ((0.012, 0.008, -0.001), "undecided"),
        ((-0.5,), "undecided"),
        ((-0.5, -0.5, math.inf), "undecided"),
    ],
)
def test_verdicts(gaps, verdict):
    arm = {seed: 1.0 + gap for seed, gap in enumerate(gaps)}
    base = dict.fromkeys(arm, 1.0)
    found = evidence.difference(arm, base, confidence=0.95, margin=0.01)
    assert found.verdict == verdict


def test_steps_to_a_loss_are_interpolated():
    curve = [(10, 3.0), (20, 2.0), (30, 2.5), (40, 1.0)]
    assert evidence.steps_to(2.0, curve) == 20
    assert evidence.steps_to(2.25, curve) == 17.5
    assert evidence.steps_to(4.0, curve) == 10
    assert evidence.steps_to(0.5, curve) is None


# ------------------------------------------------------------------------ arms


def test_every_arm_changes_every_leaf_at_the_rate_that_it_is_given():
    config = configs.resolve(dataclasses.replace(configs.TINY, steps=10))
    params = {
        "embed": {"embedding": problems.normal((8, 4), 1)},
        "mlp": {"kernel": problems.normal((4, 8), 2)},
    }

    def shapes(name):
        optimizer = arms.ARMS[name].make(arms.ARMS[name].start, config)
        state = jax.eval_shape(optimizer.init, params)
        updates, _ = jax.eval_shape(optimizer.update, params, state, params)
        return updates

    for name in arms.ARMS:
        chex.assert_trees_all_equal_shapes_and_dtypes(shapes(name), params)
    assert len(arms.ARMS) == len(arms.OPTIMIZERS) + len(arms.CHAINS)


@pytest.mark.parametrize("name", ["muon", "entry+halley+neuron"])
def test_tuned_values_reach_the_stages(name):
    config = configs.resolve(dataclasses.replace(configs.TINY, steps=10))
    params = {"mlp": {"kernel": problems.normal((4, 8), 2)}}
    grads = [{"mlp": {"kernel": problems.normal((4, 8), seed)}} for seed in (3, 4)]

    def second_update(**changes):
        optimizer = arms.ARMS[name].make({**arms.ARMS[name].start, **changes}, config)
        state = optimizer.init(params)
        _, state = optimizer.update(grads[0], state, params)
        updates, _ = optimizer.update(grads[1], state, params)
        return updates["mlp"]["kernel"]

    usual = second_update()
    rate = arms.ARMS[name].start["learning_rate"]
    doubled = second_update(learning_rate=2 * rate)
    np.testing.assert_allclose(doubled, 2 * usual, rtol=1e-5)
    assert not np.allclose(second_update(momentum=0.2), usual, rtol=1e-2)


def test_variances_are_around_the_polar_method():
    config = configs.resolve(dataclasses.replace(configs.TINY, steps=10))
    params = {"mlp": {"kernel": problems.normal((4, 8), 2)}}
    grads = [{"mlp": {"kernel": problems.normal((4, 8), seed)}} for seed in (3, 4)]
    values = {"learning_rate": 0.1, "momentum": 0.8}

    def second_update(optimizer):
        state = optimizer.init(params)
        _, state = optimizer.update(grads[0], state, params)
        updates, _ = optimizer.update(grads[1], state, params)
        return updates["mlp"]["kernel"]

    parts = {
        "exact": [],
        "entry+exact": ["entry"],
        "exact+neuron": ["neuron"],
        "entry+exact+neuron": ["entry", "neuron"],
    }
    for name, variances in parts.items():
        stages = [
            om.ema_momentum(0.8),
            *([om.scale_by_variance(0.95)] if "entry" in variances else []),
            om.orthogonalize_exact(),
            *([om.scale_by_neuron_variance(0.95)] if "neuron" in variances else []),
            om.match_rms(0.2),
            optax.scale(-0.1),
        ]
        got = second_update(arms.ARMS[name].make(values, config))
        np.testing.assert_allclose(got, second_update(optax.chain(*stages)), rtol=1e-4)


def test_a_chain_is_the_named_optimizer():
    config = configs.resolve(dataclasses.replace(configs.TINY, steps=10))
    params = {"mlp": {"kernel": problems.normal((4, 8), 2)}}
    grads = [{"mlp": {"kernel": problems.normal((4, 8), s)}} for s in range(3, 9)]
    values = {"learning_rate": 0.1, "momentum": 0.8}
    chain = arms.ARMS["entry+halley+neuron"].make(values, config)
    schedule = train.schedule(0.1, config)
    got, _ = problems.run(chain, params, grads)
    want, _ = problems.run(om.halley_muon(schedule, momentum=0.8), params, grads)
    chex.assert_trees_all_close(got[-1], want[-1], rtol=1e-6)


def test_the_controls_have_the_spectra_of_their_paper():
    x = np.asarray(problems.normal((6, 9), 1), np.float64)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    got = arms.METHODS["freon"].polar(jnp.asarray(x, "float32"))
    np.testing.assert_allclose(got, (u * s**-0.5) @ vt, rtol=1e-4, atol=1e-5)
    assert not np.any(arms.METHODS["freon"].polar(jnp.zeros((2, 3))))
    got = arms.METHODS["kaon"].polar(jnp.asarray(x, "float32"))
    s = s / np.linalg.norm(x)
    for _ in range(10):
        s = 4.1 * s * (1 - s**2) ** 2
    np.testing.assert_allclose(got, (u * s) @ vt, atol=1e-2)


# ------------------------------------------------------------- runs and reports


@pytest.fixture
def protocol(tmp_path, monkeypatch):
    """A protocol of runs that take seconds."""
    text = tmp_path / "text.txt"
    text.write_bytes(b"to be, or not to be, that is the question\n" * 400)
    fields = {"steps": 4, "layers": 1, "width": 16, "head_dim": 8, "context": 16}
    fields |= {"batch_size": 8, "val_windows": 8, "data": str(text)}
    protocol = {
        **{"config": "tiny", "fields": fields, "trials": 3, "search_seed": 0},
        **{"seeds": [1, 2], "val_every": 2, "target": 1.5, "baseline": "muon"},
        **{"confidence": 0.95, "margin": 0.01, "minutes": 0.1},
    }
    monkeypatch.setitem(run.PROTOCOLS, "test", protocol)
    return protocol


def pretended(protocol, arm, values, seed, phase):
    """A run whose loss is known: halley is lower by 0.02, with some noise."""
    loss = 1.4 + 0.01 * bowl(values) + 0.1 * seed
    loss += {"muon": 0.0, "halley": -0.02 + 0.001 * seed, "lion": math.inf}[arm]
    return {
        **{"arm": arm, "phase": phase, "seed": seed, "values": values},
        "loss": loss if math.isfinite(loss) else None,
        "curve": [(2, 3.0), (4, loss)] if math.isfinite(loss) else [],
    }


def test_a_bench_runs_resumes_and_reports(tmp_path, protocol, monkeypatch, capsys):
    monkeypatch.setattr(run, "train", pretended)
    monkeypatch.setitem(arms.ARMS, "lion", arms.ARMS["muon"])
    path, names = tmp_path / "runs.jsonl", ["muon", "halley", "lion"]

    def go():
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            run.Bench("test", names, path).run(pool, 2)

    go()
    said = capsys.readouterr().out
    assert "15 runs, about 1 minutes" in said and "[15/15]" in said
    runs = run.read(path)
    for arm in names:
        trials, final = run.of(runs, arm, "search"), run.of(runs, arm, "final")
        assert [trial["seed"] for trial in trials] == [0, 0, 0]
        assert trials[0]["values"] == arms.ARMS[arm].start
        assert [each["seed"] for each in final] == [1, 2]
        best = min(trials, key=run.loss_of)["values"]
        assert all(each["values"] == best for each in final)

    # What is cut off is done again, and nothing else.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:12]) + lines[12][:50])
    go()
    assert "3 runs" in capsys.readouterr().out
    texts = [sorted(json.dumps(r) for r in each) for each in (run.read(path), runs)]
    assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="has runs of test, not of tiny-250"):
        run.Bench("tiny-250", names, path)

    rows = report.rows_of(runs)
    assert [row.arm for row in rows] == ["halley", "muon", "lion"]
    lines = report.table(runs, {"muon": 0.5, "halley": 0.25}).splitlines()
    assert len(lines) == 5 and all(line.count("|") == 10 for line in lines)
    assert "| 2.17; 2.42 | 1.5340 ± 0.0714 | -0.020 ± 0.006 | better |" in lines[2]
    assert "| 250 |" in lines[2] and "1 of 2 get there" in lines[2]
    assert "| diverged |" in lines[4] and "0 of 2 get there" in lines[4]
    lines = report.headlines(runs).splitlines()
    assert lines[2:] == [
        "| `muon` | 1.5542 ± 0.0707 |  |  |",
        "| `lion` | diverged |  |  |",
    ]
    report.plot(runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_protocol_can_start_all_arms_at_the_same_values(
    tmp_path, protocol, monkeypatch
):
    monkeypatch.setattr(run, "train", pretended)
    protocol["start"] = {"learning_rate": 0.05, "momentum": 0.79}  # the best ones
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        bench = run.Bench("test", ["muon", "halley"], tmp_path / "runs.jsonl")
        bench.run(pool, 1)
    for arm in ("muon", "halley"):
        rates = [
            r["values"]["learning_rate"] for r in run.of(bench.runs, arm, "search")
        ]
        assert rates == [0.05, 0.1, 0.025]
    # A value that was not varied is not at the end of what was tried.
    assert [row.edge for row in report.rows_of(bench.runs)] == [[], []]
    protocol["trials"] = 0
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        bench = run.Bench("test", ["muon"], tmp_path / "others.jsonl")
        bench.run(pool, 1)
    assert [each["values"] for each in bench.runs] == [protocol["start"]] * 2


@pytest.mark.slow
def test_training_is_that_of_the_example(protocol):
    """The same values, seed and data give the losses of `train.train`."""
    values = {"learning_rate": 0.02, "momentum": 0.9}
    got = run.train(protocol, "muon", values, 3, "final")
    settings = {"momentum": 0.9}
    config = dataclasses.replace(
        configs.TINY,
        **protocol["fields"],
        **{"seed": 3, "lr": 0.02, "settings": settings, "val_every": 2},
        **{"sample": 0, "quiet": True},
    )
    want = [r["loss"] for r in train.train(config)["records"] if r["kind"] == "val"]
    assert [step for step, _ in got["curve"]] == [2, 4]
    np.testing.assert_allclose([loss for _, loss in got["curve"]], want, rtol=1e-6)
    assert got["loss"] == got["curve"][-1][1] and got["seconds"] > 0
    search = run.train(protocol, "muon", values, 3, "search")
    assert search["curve"] == got["curve"][1:]


@pytest.mark.slow
def test_the_track_trains_on_its_shards(tmp_path, protocol):
    """A small model, for a few steps, on shards in the format of the track."""
    tokens = np.random.default_rng(0).integers(0, 50257, 3000)
    data.write_shard(tmp_path / "fineweb_train_000001.bin", tokens[:2000])
    data.write_shard(tmp_path / "fineweb_val_000000.bin", tokens[2000:])
    track = dict(run.PROTOCOLS["track3"])
    small = {name: protocol["fields"][name] for name in ("layers", "width", "head_dim")}
    small |= {"context": 16, "batch_size": 8, "accumulate": 1, "val_windows": 8}
    track["fields"] = {**track["fields"], **small, "steps": 3, "data": str(tmp_path)}
    track["val_every"] = 1
    got = run.train(track, "record", {}, 0, "final")
    assert [step for step, _ in got["curve"]] == [1, 2, 3]
    assert abs(got["curve"][0][1] - np.log(50304)) < 0.5
    preset = configs.PRESETS[run.PROTOCOLS["track3"]["config"]]
    assert (preset.layers, preset.width, preset.data) == (12, 768, "fineweb")


def test_another_text_than_that_of_the_protocol_raises(protocol):
    other = {**protocol, "data_sha256": "0" * 64}
    with pytest.raises(ValueError, match=r"SHA-256 0000.*install another version"):
        run.train(other, "muon", arms.ARMS["muon"].start, 0, "search")


@pytest.mark.slow
def test_a_run_that_diverges_ends_and_is_recorded(protocol):
    values = {"learning_rate": 1e30, "momentum": 0.9}
    got = run.train(protocol, "muon", values, 1, "final")
    assert got["loss"] is None and run.loss_of(got) == math.inf
    json.dumps(got, allow_nan=False)
    assert len(got["curve"]) < 2
