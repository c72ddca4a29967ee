"""Tunix's GRPO with a small random Qwen2, where the extra is installed."""

# The extras `tunix` and `gym` need not be installed.
# pyright: reportMissingImports=false

import dataclasses
import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optax_matrix as om

pytest.importorskip("tunix", reason="the extra `tunix` is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tunix.models.qwen2 import model as qwen2

    from examples.rl import tunix_qwen
    from examples.rl.tunix_qwen import Config, Problem

# Warnings of other libraries are ignored.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.core]


class Letters:
    """A tokenizer of characters, after padding and the end token."""

    PAD, END = 0, 1
    text = "0123456789#+?= \nabcdefghijklmnopqrstuvwxyzT.,"

    def encode(self, text, **_):
        return [2 + self.text.index(letter) for letter in text if letter in self.text]

    def decode(self, ids, **_):
        return "".join(self.text[int(i) - 2] for i in ids if int(i) > 1)

    def bos_id(self):
        return None

    def eos_id(self):
        return self.END

    def pad_id(self):
        return self.PAD

    def dedup_bos_ids(self, ids):
        return ids


@pytest.fixture(autouse=True)
def ranks():
    """Allows rank promotion, which conftest.py forbids, also in Tunix's threads."""
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_rank_promotion", "raise")


def tiny():
    """Returns a small Qwen2 without the zeros that Tunix initializes its MLPs with."""
    config = qwen2.ModelConfig(
        num_layers=2,
        vocab_size=2 + len(Letters.text),
        embed_dim=32,
        hidden_dim=48,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    model = qwen2.Qwen2(config, rngs=nnx.Rngs(0))
    for layer in model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            kernel = getattr(layer.mlp, name).kernel
            noise = jax.random.normal(jax.random.key(len(name)), kernel[...].shape)
            kernel[...] = 0.2 * noise
    model.embedder.input_embedding[...] *= 0.3
    return model


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "file"
    rows = [{"question": f"{n}+{n}?", "answer": f"#### {n}"} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Config(
        data=str(path),
        lr=1e-2,
        steps=4,
        prompts=4,
        samples=4,
        at_once=2,
        prompt_tokens=80,
        response_tokens=6,
        out=str(tmp_path / "out"),
        checkpoint_every=2,
    )


def test_projections_are_routed_as_matrices():
    make = lambda: qwen2.Qwen2(qwen2.ModelConfig.qwen2p5_0p5b(), rngs=nnx.Rngs(0))  # noqa: E731
    table = om.describe(nnx.state(nnx.eval_shape(make), nnx.Param), tunix_qwen.layout)
    views = {row.path: row.view for row in table.rows if row.view}
    assert len(views) == 24 * 7
    assert views["layers/0/attn/q_proj/w"] == "1 × (896 → 896)"
    assert views["layers/0/attn/k_proj/w"] == "1 × (896 → 128)"
    assert views["layers/0/attn/o_proj/w"] == "1 × (896 → 896)"
    assert views["layers/23/mlp/down_proj/kernel"] == "1 × (4864 → 896)"
    assert table.totals["total"] == 494_032_768


def test_responses_differ_between_calls_and_keep_their_ends(config):
    learner = tunix_qwen.make_learner(config, tiny(), Letters())
    rollout = learner.rl_cluster.rollout
    settings = learner.rl_cluster.get_rollout_config("train")
    first, second = (rollout.generate(["12+3?"] * 64, settings) for _ in range(2))
    assert any(
        len(a) != len(b) for a, b in zip(first.tokens, second.tokens, strict=True)
    )
    lengths = {len(row) for row in first.tokens}
    assert max(lengths) == 6 and len(lengths) > 1
    for row in first.tokens:
        assert Letters.END not in row[:-1]
        assert row[-1] == Letters.END or len(row) == 6


def numbers(config, name):
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    return [line["value"] for line in map(json.loads, lines) if line["name"] == name]


def test_training_raises_the_reward_and_continues(config, monkeypatch):
    def letters(response, problem, well_formed):
        assert problem.question.endswith("?") and well_formed == 0.1
        return sum(letter.isdigit() for letter in response) / 6

    monkeypatch.setattr(tunix_qwen.problems, "reward", letters)
    change = {"steps": 16, "checkpoint_every": 8, "test": config.data}
    change |= {"test_problems": 4, "test_every": 8}
    config = dataclasses.replace(config, **change)
    learner = tunix_qwen.train(config, tiny(), Letters())
    rewards = numbers(config, "rewards/train/mean")
    assert len(rewards) == 16
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.2
    assert numbers(config, "rewards/eval/mean")[-1] > rewards[0] + 0.2

    again = tunix_qwen.make_learner(config, tiny(), Letters())
    trainers = (each.rl_cluster.actor_trainer for each in (learner, again))
    trained, restored = (
        jax.tree.leaves([nnx.state(trainer.model), nnx.state(trainer.optimizer)])
        for trainer in trainers
    )
    for a, b in zip(trained, restored, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_continues_with_the_problems_that_are_left(config, monkeypatch):
    asked = []

    def note(response, problem, well_formed):
        asked.append(problem.question)
        return float(len(response))

    monkeypatch.setattr(tunix_qwen.problems, "reward", note)
    monkeypatch.setattr(
        tunix_qwen.problems,
        "load",
        lambda source, count, seed: [
            Problem(f"{n}?", "", lambda answer: 0.0) for n in range(count)
        ],
    )
    first = dataclasses.replace(config, epochs=2, steps=2, checkpoint_every=10)
    tunix_qwen.train(first, tiny(), Letters())
    assert set(asked) == {f"{n}?" for n in range(8)}
    asked.clear()
    longer = dataclasses.replace(first, steps=3)
    learner = tunix_qwen.train(longer, tiny(), Letters())
    assert set(asked) == {f"{n}?" for n in range(8, 12)}
    assert learner.rl_cluster.global_steps == 3
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    steps = [
        line["step"]
        for line in map(json.loads, lines)
        if line["name"] == "rewards/train/mean"
    ]
    assert sorted(set(steps)) == [0, 1, 2]
    ratios = numbers(config, "actor/train/is_ratio/max")
    assert len(ratios) == 6 and max(ratios[1::2]) > 1.001
    np.testing.assert_allclose(ratios[::2], 1.0, atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": ""}, "`data` must be a file"),
        ({"lr": float("nan")}, "`lr` must be given"),
        ({"optimizer": "moun"}, "`optimizer` must be one of .*got moun"),
        ({"at_once": 3}, "`at_once` must divide `prompts` = 4, got 3"),
        ({"test_problems": 5}, "`at_once` must divide `test_problems` = 5, got 2"),
        ({"clip": -1.0}, "`clip` must be finite and at least 0"),
        ({"samples": 1}, "`samples` must be finite and at least 2, got 1"),
        ({"test_every": 0}, "`test_every` must be finite and at least 1"),
        ({"settings": {"momentum": 2.0}}, "`momentum`"),
    ],
)
def test_bad_flags_are_named(config, fields, message):
    with pytest.raises(ValueError, match=message):
        tunix_qwen.check(dataclasses.replace(config, **fields))


def test_prompts_that_would_be_cut_are_named(config):
    config = dataclasses.replace(config, prompt_tokens=40)
    with pytest.raises(ValueError, match=r"problem 0 \(\d\+\d\? ...\) has \d+ tokens"):
        tunix_qwen.train(config, tiny(), Letters())


def test_a_folder_of_hugging_face_is_loaded(tmp_path, config, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    from safetensors import numpy as safetensors

    model = tiny()
    monkeypatch.setattr(qwen2.ModelConfig, "qwen2p5_0p5b", lambda: model.config)
    names = {"embedder": "model.embed_tokens.weight", "final_norm": "model.norm.weight"}
    weights = {}
    for keys, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        path, array = [str(key) for key in keys], np.asarray(value[...])
        if path[0] != "layers":
            weights[names[path[0]]] = array
            continue
        *_, module, name = path
        if module == "attn":  # q_bias
            hf = f"self_attn.{name[0]}_proj.bias"
        elif name == "kernel":
            hf, array = f"mlp.{module}.weight", array.T
        elif module.endswith("proj"):
            inputs = array.shape[0] if module != "o_proj" else 32
            hf, array = f"self_attn.{module}.weight", array.reshape(inputs, -1).T
        else:
            hf = f"{module}.weight"
        weights[f"model.layers.{path[1]}.{hf}"] = np.ascontiguousarray(array)
    # In bfloat16, as Qwen's.
    halves = {name: array.astype(jnp.bfloat16) for name, array in weights.items()}
    safetensors.save_file(halves, tmp_path / "model.safetensors")
    words = {"<pad>": 0, "<end>": 1, "<user>": 2, "1": 3, "+": 4, "?": 5}
    level = tokenizers.models.WordLevel(words, unk_token="?")
    fast = tunix_qwen.transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(level),
        pad_token="<pad>",
        eos_token="<end>",
        chat_template="<user>{{ messages[0]['content'] }}",
    )
    fast.save_pretrained(tmp_path)

    loaded, tokenizer = tunix_qwen.load_model(str(tmp_path))
    want, found = (jax.tree.leaves(nnx.state(each)) for each in (model, loaded))
    for a, b in zip(want, found, strict=True):
        assert b.dtype == jnp.float32
        np.testing.assert_array_equal(a.astype(jnp.bfloat16), b)
    assert tunix_qwen.prompt_of(tokenizer, "1+1?").startswith("<user>1+1?\nThink")
    few = dataclasses.replace(config, steps=2, epochs=2)
    learner = tunix_qwen.train(few, loaded, tokenizer)
    assert learner.rl_cluster.global_steps == 2
    assert learner.rl_cluster.actor_trainer.train_steps == 4
    fast.pad_token = "<end>"
    fast.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a padding token other than its end token"):
        tunix_qwen.load_model(str(tmp_path))
