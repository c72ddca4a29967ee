"""Trains the base that reinforcement learning starts from, once, and keeps it."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import optax_matrix as om
from examples.nanogpt import model, record
from examples.nanogpt.model import GPT
from examples.rl import policy, task

LAYERS, WIDTH, HEAD_DIM = 2, 96, 24
BATCH, RATE, AUXILIARY_RATE = 128, 0.02, 3e-3
FOLDER = Path("runs/rl-base")
# A digest of the sources that determine a base, when this process read them.
SOURCES = (task.__file__, policy.__file__, __file__, model.__file__)
VERSION = hashlib.sha256(b"".join(Path(f).read_bytes() for f in SOURCES)).hexdigest()


def make_model(seed: int) -> GPT:
    """Returns a GPT whose embedding is small, so that small steps can change it.

    What the model computes does not depend on the scale, because a norm follows.
    """
    gpt = GPT(len(task.WORDS), LAYERS, WIDTH, HEAD_DIM, rngs=nnx.Rngs(seed))
    gpt.embed.embedding[...] *= 0.05
    return gpt


def train(steps: int, seed: int, quiet: bool) -> tuple[nnx.GraphDef, nnx.State]:
    """Trains on demonstrations, the wrong habits among them.

    Args:
      steps: Steps of 128 demonstrations.
      seed: Seed of parameters and demonstrations.
      quiet: Whether to show no progress.
    """
    graph, params = nnx.split(make_model(seed))
    schedule = optax.linear_schedule(1.0, 0.0, steps)
    optimizer = om.muon(
        lambda count: RATE * schedule(count),
        auxiliary_learning_rate=lambda count: AUXILIARY_RATE * schedule(count),
    )

    @jax.jit
    def step(params, state, rows):
        loss = lambda params: policy.imitation(graph, params, rows, task.PROMPT)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    rows = task.corpus(steps * BATCH, seed).reshape(steps, BATCH, -1)
    with tqdm(rows, desc="warm-up", disable=quiet) as bar:
        for count, given in enumerate(bar):
            params, state, value = step(params, state, given)
            if count % 10 == 0:
                bar.set_postfix_str(f"loss {float(value):.3f}")
    return graph, params


def load(
    steps: int, seed: int, *, quiet: bool, say: Callable[[str], Any]
) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns the base, trained now unless it is in the folder `runs/rl-base`."""
    graph, like = nnx.split(nnx.eval_shape(lambda: make_model(seed)))
    leaves, tree = jax.tree.flatten(like)
    names = [f"arr_{place}" for place in range(len(leaves))]  # those of savez
    path = FOLDER / f"{VERSION[:12]}-{steps}-{seed}.npz"
    if path.exists():
        damaged = f"{path} is damaged: delete it, and it is made again"
        try:
            with path.open("rb") as opened, np.load(opened) as file:
                arrays = [file[name] for name in names]
            about = json.loads(path.with_suffix(".json").read_text())
            saved = about["sha256"]
        except Exception as error:  # NumPy raises many unrelated types
            raise ValueError(damaged) from error
        digest = record.digest(arrays)
        if digest != saved:
            raise ValueError(damaged)
        say(f"base {path}, sha256 {digest}")
        return graph, jax.tree.unflatten(tree, [jnp.asarray(x) for x in arrays])
    graph, params = train(steps, seed, quiet)
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    FOLDER.mkdir(parents=True, exist_ok=True)
    about = {"sha256": record.digest(arrays), **record.environment()}
    path.with_suffix(".json").write_text(json.dumps(about) + "\n")
    # Several processes may make the same base; each renames what is complete.
    partial = path.with_suffix(f".{os.getpid()}")
    with partial.open("wb") as file:
        np.savez(file, *arrays)
    partial.replace(path)
    return graph, params
