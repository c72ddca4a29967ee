"""Trains every matrix optimizer at once, with a checkpoint after every step.

The program that `test_robustness.py` kills, as one process or as two:

    python -m tests.killed FOLDER STEPS
    python -m tests.killed FOLDER STEPS COORDINATOR PROCESS

Each optimizer trains a copy of the same parameters. A run continues after the newest
checkpoint in its folder. At the end it writes every array to a file.
"""

import inspect
import pickle
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import serialize_executable
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_matrix as om
from examples.nanogpt import configs, processes, sharding

FINAL = "final.npz"
SHAPES = {
    "embed": {"embedding": (16, 8)},
    "up": {"kernel": (8, 16), "bias": (16,)},
    "mix": {"kernel": (8, 8)},
}
# How two processes share them.
SPECS = {
    "embed": {"embedding": P("x")},
    "up": {"kernel": P("x"), "bias": P()},
    "mix": {"kernel": P(None, "x")},
}
# The rate depends on the step, and periods are short, so that kills fall inside them.
RATE = optax.cosine_decay_schedule(0.01, 100)
SETTINGS = {"refresh": 4, "start": 2, "svd_every": 3, "weight_decay": 0.1}


def make_optimizers(placement):
    """Returns every matrix optimizer by name, with those of SETTINGS that it has."""
    made = {}
    for name in sorted(om.MATRIX_OPTIMIZERS):
        arguments = inspect.signature(om.OPTIMIZERS[name]).parameters
        settings = {k: v for k, v in SETTINGS.items() if k in arguments}
        made[name] = om.make_optimizer(name, RATE, placement=placement, **settings)
    return made


def noise(step):
    """Returns a tree like the parameters that depends on the step alone."""
    shapes, tree = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.fold_in(jax.random.key(7), step), len(shapes))
    return tree.unflatten(map(jax.random.normal, keys, shapes))


def programs(mesh):
    """Returns two functions: of the first parameters and states, and of one step."""
    shardings = mesh and jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    optimizers = make_optimizers(mesh and om.Placement(shardings))

    def start():
        params = noise(0)
        if mesh:
            params = jax.lax.with_sharding_constraint(params, shardings)
        return {name: (params, tx.init(params)) for name, tx in optimizers.items()}

    def step(runs, count):
        found = {}
        for name, (params, state) in runs.items():
            grads = jax.tree.map(lambda p, n: p + n, params, noise(count))
            updates, state = optimizers[name].update(grads, state, params)
            found[name] = optax.apply_updates(params, updates), state
        return found

    return start, step


def compiled(function, *arguments, path=None):
    """Compiles a function, or loads what an earlier start compiled from `path`.

    JAX's compilation cache is written by the first of several processes only. If the
    second one compiles again, the order of their collectives may differ, and they wait
    for each other forever.
    """
    if path is None:
        return function.lower(*arguments).compile()
    if path.exists():
        # Tracing a factorization registers LAPACK, which a program only refers to.
        jax.jit(jnp.linalg.eigvalsh).lower(jnp.eye(2))
        return serialize_executable.deserialize_and_load(
            *pickle.loads(path.read_bytes())
        )
    program = function.lower(*arguments).compile()
    path.write_bytes(pickle.dumps(serialize_executable.serialize(program)))
    return program


def train(folder, steps, mesh):
    """Returns the parameters and states after so many steps."""
    start, step = programs(mesh)
    paths = {}
    if mesh:
        me = jax.process_index()
        paths = {f: folder.parent / f"{f.__name__}.{me}" for f in (start, step)}
    runs = compiled(jax.jit(start), path=paths.get(start))()
    places = jax.tree.map(lambda leaf: leaf.sharding, runs)
    step_fn = jax.jit(step, out_shardings=places)
    step_fn = compiled(step_fn, runs, 1, path=paths.get(step))
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False
    )
    with ocp.CheckpointManager(folder, options=options) as manager:
        begun = manager.latest_step() or 0
        if begun:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, runs)
            runs = manager.restore(begun, args=ocp.args.StandardRestore(like))
        for done in range(begun + 1, steps + 1):
            # Orbax communicates, too, so the step must have ended.
            runs = jax.block_until_ready(step_fn(runs, done))
            manager.save(done, args=ocp.args.StandardSave(runs))
            manager.wait_until_finished()
    return runs


def main(folder, steps, coordinator=None, process=None):
    given = {}
    if coordinator:
        given = {"coordinator": coordinator, "processes": 2, "process": int(process)}
    with processes.joined(configs.Config(distributed=bool(coordinator), **given)):
        mesh, folder = None, Path(folder).resolve()
        if coordinator:
            mesh = jax.make_mesh((jax.device_count(),), ("x",), (AxisType.Auto,))
        runs = train(folder, int(steps), mesh)
        whole = sharding.fetch(runs, mesh) if mesh else jax.device_get(runs)
        if processes.is_first():
            leaves = jax.tree_util.tree_leaves_with_path(whole)
            np.savez(folder / FINAL, **{jax.tree_util.keystr(k): x for k, x in leaves})


if __name__ == "__main__":
    main(*sys.argv[1:])
