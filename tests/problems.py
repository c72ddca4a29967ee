"""Trees that reach the matrix path, gradients of chosen spectra, steps over both."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp


def with_spectrum(shape, singular_values, seed=0):
    """A float64 NumPy matrix with these singular values and random vectors."""
    rng = np.random.default_rng(seed)
    m, n = shape
    u, _ = np.linalg.qr(rng.standard_normal((m, m)))
    v, _ = np.linalg.qr(rng.standard_normal((n, n)))
    k = min(m, n)
    return (u[:, :k] * np.asarray(singular_values, np.float64)) @ v[:, :k].T


def normal(shape, seed=0, dtype=jnp.float32):
    """Standard normal entries, the same in every dtype up to rounding."""
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, dtype)


def matrix_tree(dtype=jnp.float32, seed=0):
    """Hidden matrices tall, wide, single-row, stacked; None; and auxiliary leaves."""
    shapes = {
        "tall": {"kernel": (12, 5), "bias": (5,)},
        "wide": {"kernel": (4, 9)},
        "column": {"kernel": (6, 1)},
        "experts": {"kernel": (3, 6, 4)},
        "norm": {"scale": (5,)},
        "embed": {"embedding": (11, 5)},
    }
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    filled = [normal(s, seed * 100 + i, dtype) for i, s in enumerate(leaves)]
    return jax.tree.unflatten(treedef, filled) | {"frozen": None}


def matrices_only(dtype=jnp.float32, seed=0):
    """The same without auxiliary leaves: what a single transform can take."""
    tree = matrix_tree(dtype, seed)
    kept = ("tall", "wide", "column", "experts")
    return {k: {"kernel": tree[k]["kernel"]} for k in kept} | {"frozen": None}


def run(tx, params, grads):
    """The iterates of `params` over gradient trees, and the last state."""

    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    state, iterates = tx.init(params), []
    for grad in grads:
        params, state = step(params, state, grad)
        iterates.append(params)
    return iterates, state


def unroll(tx, updates, params=None):
    """What `tx` makes of a sequence of updates at fixed parameters; the last state."""
    state, out = tx.init(updates[0] if params is None else params), []
    for u in updates:
        u, state = tx.update(u, state, params)
        out.append(u)
    return out, state


def restored(state, path):
    """A state after it was saved by Orbax and restored with its own types."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return checkpointer.restore(path, abstract)


def printed_by(code):
    """What a Python program prints that may have another number of devices."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=pathlib.Path(__file__).parents[1],
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout
