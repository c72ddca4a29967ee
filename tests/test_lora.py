"""The example that adapts a GPT by LoRA."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from examples.nanogpt import batches, configs, data, lora, model, sharding

CONFIG = dataclasses.replace(
    configs.TINY, layers=1, width=32, head_dim=16, context=16, batch_size=4,
    val_windows=8, steps=4, quiet=True,
)  # fmt: skip


def made(rank=2):
    gpt = model.GPT(256, CONFIG.layers, CONFIG.width, CONFIG.head_dim, rngs=nnx.Rngs(0))
    flat = nnx.to_flat_state(nnx.state(gpt, nnx.Param))
    before = {path: np.array(leaf[...]) for path, leaf in flat}
    lora.add_factors(gpt, rank, nnx.Rngs(1))
    return gpt, before


def windows(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be\n" * 400)
    mesh = sharding.make_mesh("", "auto", jax.devices()[:1])
    return batches.Batches(data.load(str(path)), CONFIG, mesh)


def test_factors_change_nothing_at_first():
    gpt, _ = made()
    plain = model.GPT(
        256, CONFIG.layers, CONFIG.width, CONFIG.head_dim, rngs=nnx.Rngs(0)
    )
    tokens = np.arange(8)[None]
    np.testing.assert_array_equal(gpt(tokens), plain(tokens))
    shapes = {leaf.shape for leaf in jax.tree.leaves(nnx.state(gpt, nnx.LoRAParam))}
    assert shapes == {(32, 2), (2, 32), (2, 128), (128, 2)}


@pytest.mark.parametrize(
    "name", ["lora_muon", pytest.param("adamw", marks=pytest.mark.slow)]
)
def test_only_the_factors_are_trained_and_the_loss_falls(name, tmp_path):
    gpt, before = made()
    optimizer = lora.make_optimizer(name, lora.LEARNING_RATES[name], 12)
    first, last = lora.adapt(gpt, windows(tmp_path), optimizer, 12, quiet=True)
    assert last < first - 0.05
    after = {
        tuple(key for key in path if key != "base_module"): np.asarray(leaf[...])
        for path, leaf in nnx.to_flat_state(nnx.state(gpt, nnx.Param))
    }
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value)
    moved = [x for path, x in after.items() if path[-1] == "lora_b"]
    assert len(moved) == 6 and all(np.abs(x).max() > 0 for x in moved)


@pytest.mark.slow
def test_a_base_is_trained(monkeypatch):
    monkeypatch.setattr(lora.data, "stdlib_text", lambda: b"to be or not\n" * 400)
    mesh = sharding.make_mesh("", "auto", jax.devices()[:1])
    config = configs.resolve(CONFIG)
    gpt = lora.trained_base(config, mesh)
    assert gpt(np.arange(8)[None]).shape == (1, 8, 256)
    assert len(lora.jax_text()) > 1e6
