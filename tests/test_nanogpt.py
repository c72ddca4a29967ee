"""The nanoGPT example: it learns, resumes bit for bit, skips what is not finite."""

import dataclasses
import functools
import json
import math
import os
import pydoc
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

import optax_matrix as om
from examples.nanogpt import (
    checkpoint,
    configs,
    data,
    model,
    plot,
    processes,
    record,
    sharding,
    train,
)

ROOT = Path(__file__).resolve().parents[1]

# Every size differs from every other, so a swapped axis cannot pass. 8 sequences are
# one for each of the devices of conftest.py.
SMALL = dataclasses.replace(
    configs.TINY, layers=1, width=32, head_dim=16, context=24, steps=12, batch_size=8,
    data=pydoc.__file__, val_every=6, val_windows=16, log_every=1, sample=0,
    checkpoint_every=0, quiet=True,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    """Most of the time here is compilation, often of the same program: done once."""
    folder = str(tmp_path_factory.mktemp("programs"))
    wanted = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield {name.upper(): str(value) for name, value in wanted.items()}
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def losses(result, kind="train"):
    return [(r["step"], r["loss"]) for r in result["records"] if r["kind"] == kind]


# ------------------------------------------------------------------------ model


@functools.partial(nnx.jit, static_argnums=0)
def small_model(dtype=jnp.float32):
    return model.GPT(256, 1, 32, 16, dtype=dtype, rngs=nnx.Rngs(0))


@nnx.jit
def logits_of(gpt, tokens):
    return gpt(tokens)


def test_gpt2_small_has_124m_parameters():
    config = configs.PRESETS["gpt2-small"]

    def init():
        sizes = (50304, config.layers, config.width, config.head_dim)
        return model.GPT(*sizes, rngs=nnx.Rngs(0))

    state = nnx.state(nnx.eval_shape(init))
    total = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert total == 162_221_568
    assert total - 50304 * 768 == 123_588_096  # without the untied head


def test_a_position_sees_only_what_is_before_it():
    gpt, tokens = small_model(), jnp.arange(24)[None] % 7
    changed = tokens.at[0, 15].set(9)
    before, after = logits_of(gpt, tokens), logits_of(gpt, changed)
    np.testing.assert_array_equal(before[0, :15], after[0, :15])
    assert not np.array_equal(before[0, 15:], after[0, 15:])


def test_rotary_keeps_lengths_and_depends_on_distance_only():
    x = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    # The same query and the same key at each of 6 positions.
    q, k = (model.rotary(jnp.broadcast_to(v, (1, 6, 1, 16))) for v in x)
    # Ulps of sums of 16 products.
    np.testing.assert_allclose(
        jnp.linalg.norm(q, axis=-1)[0, :, 0], jnp.linalg.norm(x[0]) * np.ones(6), 1e-6
    )
    scores = np.asarray(jnp.einsum("bqhk,bshk->qs", q, k))
    np.testing.assert_allclose(scores[1:, 1:], scores[:-1, :-1], atol=1e-5)
    assert abs(scores[0, 0] - scores[0, 1]) > 1e-2


def test_every_matrix_starts_nonzero_and_the_first_loss_is_that_of_a_guess():
    gpt = small_model()
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(gpt)):
        assert jnp.linalg.norm(leaf) > 0, path
    graph, params = nnx.split(gpt)
    windows = jnp.arange(8 * 25).reshape(8, 25)
    loss = jax.jit(train.loss_fn)(params, graph, windows)
    assert loss == pytest.approx(math.log(256), abs=0.1)


def test_bfloat16_multiplies_in_bfloat16_and_keeps_float32_parameters():
    gpt, wide = small_model(jnp.bfloat16), small_model()
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(gpt))} == {
        jnp.dtype("float32")
    }
    tokens = jnp.arange(24)[None]
    logits, expected = logits_of(gpt, tokens), logits_of(wide, tokens)
    assert logits.dtype == jnp.float32
    assert not np.array_equal(logits, expected)
    # 8 bits, through one block; the logits are of order 1/sqrt(32).
    np.testing.assert_allclose(logits, expected, atol=0.02)


def test_sampling_continues_past_the_context():
    prompt, key = jnp.arange(5), jax.random.key(0)
    gpt = small_model()
    tokens = model.generate(gpt, prompt, 40, 24, 1e-4, key)
    assert tokens.shape == (40,)
    # Near zero temperature is the most probable token of the last 24.
    text = jnp.concatenate([prompt, tokens])
    for end in (24, 30, 44):
        window = text[end - 24 : end]
        assert jnp.argmax(logits_of(gpt, window[None])[0, -1]) == text[end]


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param("adamw", marks=pytest.mark.slow),
        pytest.param("muon", marks=pytest.mark.slow),
        "muonh",
    ],
)
def test_the_loss_falls(optimizer):
    result = train.train(dataclasses.replace(SMALL, optimizer=optimizer))
    values = [loss for _, loss in losses(result)]
    assert len(values) == 12 and np.isfinite(values).all()
    assert values[-1] < values[0] - 0.3
    assert [step for step, _ in losses(result, "val")] == [6, 12]
    assert result["skipped"] == 0 and result["stopped"] is None


@pytest.fixture(scope="module")
def small_step():
    graph, params = nnx.split(small_model())
    dataset = data.load(SMALL.data)
    windows = jnp.asarray(dataset.train.batch(0, 0, 8, SMALL.context))[None]
    return graph, params, windows


# That every optimizer descends is tested with the registry.
FEW = ["muon", "adamw"]
MORE = [*sorted(om.MATRIX_OPTIMIZERS - set(FEW)), "lion"]


@pytest.mark.parametrize(
    "name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_optimizers_train_the_model(name, small_step):
    graph, params, windows = small_step
    config = configs.resolve(dataclasses.replace(SMALL, optimizer=name))
    optimizer = train.make_optimizer(config)
    step = train.make_step(graph, optimizer)
    state = jax.tree.map(jnp.copy, train.State(params, optimizer.init(params)))
    values = []
    for _ in range(4):
        state, loss, _ = step(state, windows)
        values.append(float(loss))
    assert values[-1] < values[0]
    assert record.digest(state.params) != record.digest(params)


def test_every_optimizer_has_a_default_learning_rate():
    assert set(configs.LEARNING_RATES) == set(om.OPTIMIZERS)


def test_the_routing_owns_each_parameter_once(small_step):
    _, params, _ = small_step
    table = om.describe(params)
    total = train.check_ownership(table, params)
    assert total == sum(leaf.size for leaf in jax.tree.leaves(params))
    for rows in (table.rows[1:], (*table.rows, table.rows[0])):
        with pytest.raises(RuntimeError, match="unlike the model"):
            train.check_ownership(dataclasses.replace(table, rows=rows), params)


def test_accumulation_equals_the_large_batch():
    # Momentum, not Adam: the sign of a gradient near zero is rounding.
    config = dataclasses.replace(
        SMALL, optimizer="momentum", batch_size=32, steps=4, val_windows=32
    )
    at_once = train.train(config)
    in_four = train.train(dataclasses.replace(config, accumulate=4))
    # Rounding of one sum over 32 sequences, in another order.
    np.testing.assert_allclose(losses(at_once), losses(in_four), rtol=1e-5)


def test_a_step_that_is_not_finite_is_skipped_and_counted(monkeypatch, capsys):
    config = dataclasses.replace(SMALL, steps=6, quiet=False)
    poison = data.load(config.data).train.batch(config.seed, 3, 8, config.context)
    both = train.loss_and_max_logits

    def poisoned(params, graph, windows):
        loss, logits = both(params, graph, windows)
        hit = jnp.all(windows == jnp.asarray(poison))
        return loss * jnp.where(hit, jnp.nan, 1.0), logits

    monkeypatch.setattr(train, "loss_and_max_logits", poisoned)
    result = train.train(config)
    assert result["skipped"] == 1
    found = losses(result)
    assert [step for step, loss in found if not math.isfinite(loss)] == [4]
    assert found[-1][1] < found[0][1]
    printed = capsys.readouterr().out
    assert "step 4: 1 steps skipped" in printed
    assert "(1 skipped)" in printed

    # It left everything as it was, the count of the schedule included.
    graph, params = nnx.split(small_model())
    optimizer = train.make_optimizer(configs.resolve(config))
    state = train.State(params, optimizer.init(params))
    before = record.digest(params), record.digest(state.optimizer.inner_state)  # type: ignore
    step = train.make_step(graph, optimizer)
    state, loss, _ = step(state, jnp.asarray(poison)[None])
    assert jnp.isnan(loss)
    after = record.digest(state.params), record.digest(state.optimizer.inner_state)
    assert before == after
    assert state.optimizer.total_notfinite == 1


def test_schedule_is_stable_then_falls_to_zero():
    config = dataclasses.replace(SMALL, steps=10, cooldown=0.5)
    rates = [float(train.schedule(2.0, config)(jnp.asarray(i))) for i in range(11)]
    np.testing.assert_allclose(
        rates, [2, 2, 2, 2, 2, 2, 1.6, 1.2, 0.8, 0.4, 0], atol=1e-6
    )
    rising = train.schedule(2.0, dataclasses.replace(config, warmup=4))
    rates = [float(rising(jnp.asarray(i))) for i in range(5)]
    np.testing.assert_allclose(rates, [0.5, 1, 1.5, 2, 2], atol=1e-6)


def test_clipping_bounds_the_raw_gradient(small_step):
    graph, params, windows = small_step
    config = dataclasses.replace(SMALL, optimizer="sgd", lr=1.0, clip=0.25, cooldown=0)
    optimizer = train.make_optimizer(config)
    state = jax.tree.map(jnp.copy, train.State(params, optimizer.init(params)))
    state, *_ = train.make_step(graph, optimizer)(state, windows)
    moved = jax.tree.map(jnp.subtract, state.params, params)
    norm = math.sqrt(sum(float(jnp.vdot(x, x)) for x in jax.tree.leaves(moved)))
    assert norm == pytest.approx(0.25, rel=1e-4)


def test_the_largest_attention_logits_are_those_of_each_head():
    config = dataclasses.replace(SMALL, qk_norm=0)
    mesh = sharding.make_mesh("", "auto", jax.devices()[:1])
    graph, _, state = train.initial(config, 256, mesh)
    windows = data.load(config.data).train.batch(0, 0, 2, config.context)
    _, found = train.loss_and_max_logits(state.params, graph, jnp.asarray(windows))
    assert list(found) == ["blocks/0/attn"]

    gpt = nnx.merge(graph, state.params)
    block = gpt.blocks[0]
    x = block.norm1(gpt.norm1(gpt.embed(windows[:, :-1])))
    q, k, _ = (np.asarray(part, np.float64) for part in block.attn.heads(x))
    logits = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(config.head_dim)
    later = np.triu_indices(config.context, 1)
    logits[:, :, *later] = -np.inf
    np.testing.assert_allclose(found["blocks/0/attn"], logits.max((0, 2, 3)), rtol=1e-5)
    # Normalized queries and keys have no such logits to watch.
    graph, params = nnx.split(small_model())
    assert train.loss_and_max_logits(params, graph, jnp.asarray(windows))[1] == {}


@pytest.mark.slow
def test_qk_clip_bounds_the_attention_logits():
    # At this rate, they grow from step to step.
    config = dataclasses.replace(
        SMALL, steps=8, lr=0.3, qk_norm=0, batch_size=16, sample=5
    )

    def largest(**fields):
        records = train.train(dataclasses.replace(config, **fields))["records"]
        return [r["max_logit"] for r in records if r["kind"] == "train"]

    free, bounded, in_two = largest(), largest(qk_clip=1.0), largest(accumulate=2)
    assert free[-1] > 4 and max(bounded[2:]) < free[-1] / 2
    assert free[0] == bounded[0]
    # The largest of all micro-batches.
    np.testing.assert_allclose(free[:4], in_two[:4], rtol=1e-3)


def test_the_clip_is_exact_where_nothing_else_moves():
    config = dataclasses.replace(SMALL, lr=0.0, aux_lr=0.0, qk_norm=0, qk_clip=1.0)
    mesh = sharding.make_mesh("", "auto", jax.devices()[:1])
    graph, optimizer, state = train.initial(config, 256, mesh)
    step = train.make_step(graph, optimizer)
    windows = jnp.asarray(data.load(config.data).train.batch(0, 0, 8, config.context))
    found = []
    for _ in range(3):
        state, _, max_logit = step(state, windows[None])
        found.append(float(max_logit))
    assert found[0] > 1.2
    np.testing.assert_allclose(found[1:], 1.0, rtol=1e-5)


def test_a_clip_of_bounded_logits_is_refused():
    with pytest.raises(
        ValueError, match="add `--qk-norm 0`, or leave out `--qk-clip 3"
    ):
        configs.resolve(dataclasses.replace(SMALL, qk_clip=30.0))
    config = dataclasses.replace(SMALL, qk_norm=0, qk_clip=30.0, optimizer="muonh")
    with pytest.raises(ValueError, match="`muonh` restores the norms"):
        configs.resolve(config)
    with pytest.raises(ValueError, match="`qk_norm` must be 0 or 1, got 2"):
        configs.resolve(dataclasses.replace(SMALL, qk_norm=2))


def test_train_runs_outside_the_main_thread_and_leaves_signals_alone():
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    results = []
    config = dataclasses.replace(SMALL, steps=2)
    thread = threading.Thread(target=lambda: results.append(train.train(config)))
    thread.start()
    thread.join()
    assert results[0]["step"] == 2
    for number in (signal.SIGINT, signal.SIGTERM):
        with checkpoint.Interruption() as interruption:
            signal.raise_signal(number)
            assert interruption.signal is number
            # A second one acts as if nobody had listened.
            assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == (
                handlers
            )
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "mion"}, "`optimizer` must be one of .*muon"),
        ({"batch_size": 12}, "`batch_size` must be a multiple"),
        ({"batch_size": 16, "accumulate": 3}, "`batch_size` must be a multiple"),
        ({"val_windows": 4}, "do not fill a micro-batch"),
        ({"head_dim": 12}, "`width` must be a multiple of `head_dim`"),
        ({"context": 10**6}, "too few for windows"),
    ],
)
def test_a_bad_configuration_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        train.train(dataclasses.replace(SMALL, **change))


NUMBERS = [
    field.name
    for field in dataclasses.fields(configs.Config)
    if type(getattr(configs.TINY, field.name)) in (int, float) or field.name == "lr"
]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_makes_no_sense_is_refused_by_name(name):
    bad = [-1, math.nan, math.inf]
    if name in ("layers", "width", "head_dim", "context", "steps", "log_every"):
        bad.append(0)
    if name == "cooldown":
        bad.append(1.1)
    for value in bad:
        with pytest.raises(ValueError, match=f"`{name}` must be .*, got {value}"):
            configs.resolve(dataclasses.replace(SMALL, **{name: value}))


# ---------------------------------------------------- records, plot, command line


def test_a_run_documents_itself(tmp_path, capsys):
    folder = tmp_path / "a"
    config = dataclasses.replace(
        SMALL, out=str(folder), steps=3, sample=5, quiet=False, optimizer="muon"
    )
    result = train.train(config)
    printed = capsys.readouterr()
    assert printed.out.index("blocks/0/attn/q/kernel") < printed.out.index(
        "data_sha256"
    )
    assert "--- sample ---\ndef " in printed.out
    # Data and Python stand beside each loss; the progress bar is on the other stream.
    for line in printed.out.splitlines():
        if "validation loss" in line:
            assert result["data_sha256"] in line and result["python"] in line
    assert "tokens/s" in printed.err and "loss" in printed.err

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["kind"] for r in records] == ["run", *["train"] * 3, "val", "final"]
    first, last = records[0], records[-1]
    assert first["config"] == json.loads(json.dumps(dataclasses.asdict(config))) | {
        "lr": configs.LEARNING_RATES["muon"]
    }
    assert first["versions"]["jax"] == jax.__version__
    assert {"commit", "uncommitted_changes", "device", "parameters"} < set(first)
    for header in (first, last):
        assert header["data_sha256"] == data.load(config.data).sha256
        assert header["python"] == sys.version.split()[0]
    assert (folder / "source" / "train.py").read_text() == Path(
        train.__file__
    ).read_text()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(FileExistsError, match="--resume"):
        train.train(config)
    again = dataclasses.replace(config, overwrite=True, quiet=True)
    assert train.train(again)["weights_sha256"] == result["weights_sha256"]
    with pytest.raises(ValueError, match=r"different from .*: steps: 3 -> 4"):
        train.train(dataclasses.replace(config, steps=4, resume=True))


def test_plot_overlays_runs_and_takes_losses_that_are_not_finite(tmp_path):
    for name in ("a", "b"):
        log = record.Record(tmp_path / name, resume=False, overwrite=False)
        log.add("train", step=1, loss=2.0)
        log.add("train", step=2, loss=math.nan)
        log.add("val", step=2, loss=1.5)
        assert "NaN" not in (tmp_path / name / "metrics.jsonl").read_text()
    plot.plot([tmp_path / "a", tmp_path / "b"], tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 1000
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        plot.plot([tmp_path], tmp_path / "none.png")


def test_rewinding_drops_what_comes_again_and_a_torn_line(tmp_path):
    log = record.Record(tmp_path, resume=False, overwrite=False)
    log.add("run", step=0)
    for step in (1, 2, 3):
        log.add("train", step=step, loss=1.0 / step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    log = record.Record(tmp_path, resume=True, overwrite=False)
    log.rewind(2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("step") for line in lines] == [0, 1, 2]


def test_help_lists_every_flag_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        configs.from_command_line(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(configs.Config):
        assert f"  --{field.name.replace('_', '-')} " in text
        assert field.metadata["help"].split()[0] in text


def test_command_line_changes_the_named_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--config", "gpt2-small", "--lr", "0.5", "--steps", "7"]
    given += ["--settings", '{"weight_decay": 0.1}', "--compare", "a", "b"]
    config = configs.from_command_line(given)
    assert config == dataclasses.replace(
        configs.PRESETS["gpt2-small"], lr=0.5, steps=7, settings={"weight_decay": 0.1},
        compare=("a", "b"), out="runs/gpt2-small-muon-0",
    )  # fmt: skip
    # A second run gets a folder of its own; resuming takes the newest.
    Path("runs/tiny-muon-0").mkdir(parents=True)
    assert configs.from_command_line([]).out == "runs/tiny-muon-0-2"
    assert configs.from_command_line(["--resume"]).out == "runs/tiny-muon-0"
    assert configs.from_command_line(["--out", "none"]).out is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--lr", "nan"], "`lr` must be finite and at least 0, got nan"),
        (["--steps", "0"], "`steps` must be positive and finite, got 0"),
        (["--settings", "[1]"], "argument --settings: expected a JSON object such as"),
        (["--settings", "{"], "argument --settings: expected a JSON object such as"),
    ],
)
def test_the_command_line_refuses_a_flag_by_name(given, message, capsys):
    with pytest.raises(SystemExit) as stop:
        configs.from_command_line([*given, "--out", "none"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("optimizer", "given", "built"),
    [
        ("muon", {"momentum": 0.9, "weight_decay": 0.1}, {}),
        (
            "muon",
            {"orthogonalize": {"steps": 12, "coefficients": "track3"}},
            {"orthogonalize": om.NewtonSchulz(12, coefficients="track3")},
        ),
        ("muon", {"orthogonalize": "halley"}, {}),
        (
            "dion",
            {"orthogonalize": {"fraction": 0.5, "method": {"steps": 3}}},
            {"orthogonalize": om.LargestSlices(0.5, om.NewtonSchulz(3))},
        ),
        (
            "dion",
            {"orthogonalize": {"fraction": 0.5}},
            {"orthogonalize": om.LargestSlices(0.5)},
        ),
        (
            "kl_soap",
            {"refresh": 1, "preconditioner": {"max_dim": 40}},
            {"preconditioner": om.KL(max_dim=40)},
        ),
        # The other fields are the optimizer's own.
        (
            "distributed_shampoo",
            {"preconditioner": {"block_size": 16}},
            {"preconditioner": om.Shampoo(block_size=16, stagger=True)},
        ),
    ],
)
def test_settings_are_json(optimizer, given, built):
    flags = ["--optimizer", optimizer, "--settings", json.dumps(given)]
    config = configs.from_command_line([*flags, "--out", "none"])
    assert config.settings == given  # what metrics.jsonl records
    assert configs.built(config.optimizer, config.settings) == given | built
    assert train.make_optimizer(config)


def test_settings_that_an_optimizer_does_not_have_are_named():
    for settings, message in [
        ({"preconditioner": {"stagger": True}}, "unexpected .* 'preconditioner'"),
        ({"orthogonalize": {"step": 3}}, "unexpected keyword argument 'step'"),
    ]:
        config = dataclasses.replace(SMALL, optimizer="muon", settings=settings)
        with pytest.raises(TypeError, match=message):
            train.make_optimizer(config)


def test_settings_cannot_replace_the_learning_rate():
    config = dataclasses.replace(SMALL, settings={"learning_rate": 0.1})
    with pytest.raises(TypeError, match="multiple values for argument 'learning_rate'"):
        train.make_optimizer(config)


# ------------------------------------------------------------ damaged checkpoints


def flip(path):
    """Inverts 64 bytes in the middle of a file."""
    raw = np.fromfile(path, np.uint8)
    raw[len(raw) // 2 :][:64] ^= 255
    raw.tofile(path)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def largest_file(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def state_of(step):
    weights = jax.random.normal(jax.random.key(step), (100, 100))
    return train.State({"w": weights}, {"momentum": weights / 2})  # type: ignore


@pytest.fixture
def two_checkpoints(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as saved:
        for step in (1, 2):
            saved.save(step, state_of(step))
    return tmp_path


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["(data)", "_METADATA", checkpoint.DIGESTS])
def test_a_damaged_checkpoint_is_skipped_by_name(name, damage, two_checkpoints):
    newest = two_checkpoints / "2"
    (path,) = newest.rglob(name) if name != "(data)" else [largest_file(newest)]
    damage(path)
    messages = []
    with checkpoint.Checkpoints(two_checkpoints) as saved:
        step, state = saved.restore(state_of(0), messages.append)
        assert step == 1 and record.digest(state) == record.digest(state_of(1))
        (message,) = messages
        assert message.startswith("checkpoint 2 skipped: ")
        if name != checkpoint.DIGESTS:
            assert message.endswith(f"SHA-256 mismatch in {path.relative_to(newest)}")
        # The run can save that step again.
        saved.save(2, state_of(2))
        step, state = saved.restore(state_of(0), messages.append)
        assert step == 2 and record.digest(state) == record.digest(state_of(2))


def test_without_a_valid_checkpoint_nothing_is_restored_or_deleted(two_checkpoints):
    flip(largest_file(two_checkpoints / "1"))
    (two_checkpoints / "2" / checkpoint.DIGESTS).unlink()
    with checkpoint.Checkpoints(two_checkpoints) as saved:
        message = r"(?s)no valid .*2: .* is missing.*1: SHA-256 mismatch.*`--overwrite`"
        with pytest.raises(ValueError, match=message):
            saved.restore(state_of(0), print)
    assert {path.name for path in two_checkpoints.iterdir()} == {"1", "2"}


def test_a_checkpoint_that_another_process_skips_is_skipped(
    two_checkpoints, monkeypatch
):
    answers = iter([1, 0])
    monkeypatch.setattr(processes, "largest", lambda _: next(answers))
    messages = []
    with checkpoint.Checkpoints(two_checkpoints) as saved:
        assert saved.restore(state_of(0), messages.append)[0] == 1
    assert messages == ["checkpoint 2 skipped: another process found it damaged"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_checkpoint_with_non_finite_parameters_is_skipped(value, two_checkpoints):
    messages = []
    with checkpoint.Checkpoints(two_checkpoints) as saved:
        weights = state_of(3).params["w"].at[7, 5].set(value)
        saved.save(3, state_of(3)._replace(params={"w": weights}))
        assert saved.restore(state_of(0), messages.append)[0] == 2
    assert messages == ["checkpoint 3 skipped: parameter w contains NaN or Inf"]


@pytest.mark.slow
def test_a_run_resumes_before_a_damaged_checkpoint_bit_for_bit(tmp_path, capsys):
    config = dataclasses.replace(
        SMALL, optimizer="momentum", checkpoint_every=4, out=str(tmp_path)
    )
    whole = train.train(config)
    flip(largest_file(tmp_path / "checkpoints" / "12"))
    again = train.train(dataclasses.replace(config, resume=True, quiet=False))
    printed = capsys.readouterr().out
    assert "checkpoint 12 skipped: SHA-256 mismatch" in printed
    assert "resuming after step 8" in printed
    assert losses(again) == losses(whole)
    assert again["weights_sha256"] == whole["weights_sha256"]


# ------------------------------------------------------------- killed and resumed

FLAGS = {
    "layers": 1, "width": 32, "head-dim": 16, "context": 24, "steps": 60,
    "batch-size": 8, "accumulate": 2, "data": pydoc.__file__, "log-every": 1,
    "val-every": 20, "val-windows": 8, "sample": 0, "checkpoint-every": 4,
    "optimizer": "muon",
}  # fmt: skip


def start(programs, folder, *more, module=True):
    """The example as a process of its own, on one device, `folder` its output."""
    flags = [word for k, v in FLAGS.items() for word in (f"--{k}", str(v))]
    script = ["-m", "examples.nanogpt.train"]
    if not module:
        script = [str(ROOT / "examples/nanogpt/train.py")]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    # Into a file: nobody reads a pipe before the process ends.
    with folder.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *script, *flags, "--out", str(folder), *more],
            cwd=ROOT,
            env=environment | programs | {"JAX_PLATFORMS": "cpu"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    process.log = Path(log.name)  # type: ignore
    return process


def finish(process):
    process.wait(timeout=240)
    return process.log.read_text()


def signal_when(ready, process, number):
    """Sends the signal as soon as `ready()`, somewhere in the steps after it."""
    limit = time.monotonic() + 240
    while not ready():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < limit
        time.sleep(0.002)
    process.send_signal(number)
    return finish(process)


def numbers(folder):
    """All that must not depend on having been interrupted, and no clock."""
    records = plot.read(folder)
    kept = ("kind", "step", "loss", "learning_rate", "skipped", "tokens")
    numbers = [
        {k: r[k] for k in kept if k in r}
        for r in records
        if r["kind"] in ("train", "val", "final")
    ]
    return numbers, records[-1]["weights_sha256"]


@pytest.fixture(scope="module")
def uninterrupted(programs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    process = start(programs, folder)
    output = finish(process)
    assert process.returncode == 0, output
    return folder


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(programs, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = start(programs, folder)
    complete = folder / "checkpoints" / "12" / checkpoint.DIGESTS
    signal_when(complete.exists, process, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert plot.read(folder)[-1]["kind"] != "final"
    process = start(programs, folder, "--resume")
    output = finish(process)
    assert process.returncode == 0, output
    resumed = [r for r in plot.read(folder) if r["kind"] == "resume"]
    assert 12 <= resumed[0]["step"] < 60
    assert numbers(folder) == numbers(uninterrupted)


@pytest.mark.slow
def test_a_signal_saves_and_the_run_resumes_bit_for_bit(
    programs, uninterrupted, tmp_path
):
    folder = tmp_path / "run"
    metrics = folder / "metrics.jsonl"

    def has_begun():
        return metrics.exists() and '"kind": "train"' in metrics.read_text()

    often = ("--checkpoint-every", "1000")  # No checkpoint but that of the signal.
    process = start(programs, folder, *often, module=False)
    output = signal_when(has_begun, process, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM after step" in output
    assert "--resume" in output
    process = start(programs, folder, *often, "--resume", module=False)
    output = finish(process)
    assert process.returncode == 0, output
    assert next(r for r in plot.read(folder) if r["kind"] == "resume")["step"] > 0
    assert numbers(folder) == numbers(uninterrupted)


def test_eight_devices_train_as_one_does(uninterrupted):
    assert jax.device_count() == 8
    config = configs.from_command_line(
        [word for k, v in FLAGS.items() for word in (f"--{k}", str(v))]
        + ["--out", "none", "--quiet", "--accumulate", "1"]
    )
    result = train.train(config)
    one = [(r["step"], r["loss"]) for r in plot.read(uninterrupted)
           if r["kind"] == "train"]  # fmt: skip
    # The same until rounding has grown: orthogonalization amplifies small directions.
    np.testing.assert_allclose(losses(result)[:5], one[:5], rtol=1e-4)
    assert result["loss"] == pytest.approx(plot.read(uninterrupted)[-1]["loss"], 0.02)
