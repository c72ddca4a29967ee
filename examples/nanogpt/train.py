"""Trains a GPT; reads from top to bottom. From the root of the repository:

python -m examples.nanogpt.train                                # a minute, any machine
python -m examples.nanogpt.train --optimizer adamw --lr 0.002
python -m examples.nanogpt.train --config gpt2-small            # 124M, GPU or TPU
python -m examples.nanogpt.train --mesh data=2,fsdp=4           # on eight devices
python -m examples.nanogpt.train --help
"""

import dataclasses
import inspect
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

if not __package__:  # run as a file: `python examples/nanogpt/train.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import optax_matrix as om
from examples.nanogpt import (
    batches,
    checkpoint,
    configs,
    data,
    model,
    plot,
    processes,
    record,
    sharding,
)
from examples.nanogpt.configs import Config


class State(NamedTuple):
    """What a step changes and a checkpoint holds. The step count is its name."""

    params: nnx.State
    optimizer: optax.ApplyIfFiniteState


# ------------------------------------------------------------------- optimizer


def schedule(peak: Any, config: Config) -> Callable:
    """Linear rise (none by default), stable, then a linear fall to zero."""
    fall = max(1, round(config.cooldown * config.steps))
    stable = optax.linear_schedule(peak, 0.0, fall, config.steps - fall)

    def with_rise(count):
        return jnp.minimum(1.0, (count + 1.0) / config.warmup) * stable(count)

    return with_rise if config.warmup else stable


def make_optimizer(
    config: Config, placement: om.Placement | None = None
) -> optax.GradientTransformationExtraArgs:
    """The named optimizer on raw gradients, which skips a step that is not finite.

    A skipped step leaves parameters and optimizer as they were, schedule included.
    Optax gives up after `max_consecutive_errors`; here that is never.

    Args:
      config: Names it.
      placement: Where the parameters lie, for those that work on whole matrices.
    """
    config = configs.resolve(config)
    settings: dict[str, Any] = dict(config.settings)
    if config.optimizer in om.MATRIX_OPTIMIZERS:
        settings.setdefault("auxiliary_learning_rate", schedule(config.aux_lr, config))
    if "placement" in inspect.signature(om.OPTIMIZERS[config.optimizer]).parameters:
        settings.setdefault("placement", placement)
    settings["learning_rate"] = schedule(config.lr, config)
    optimizer = om.make_optimizer(config.optimizer, **settings)
    if config.clip:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip), optimizer)
    never = np.iinfo(np.int32).max
    return optax.apply_if_finite(optimizer, max_consecutive_errors=never)  # type: ignore


def check_ownership(table: Any, params: nnx.State) -> int:
    """The number of parameters; raises unless the routing table has each leaf once."""
    leaves = jax.tree.leaves(params)
    owned = len(table.rows), sum(row.parameters for row in table.rows)
    if owned != (len(leaves), sum(leaf.size for leaf in leaves)):
        raise RuntimeError(f"leaves and parameters routed: {owned}, not the model's")
    return owned[1]


def initial(
    config: Config, vocab_size: int, mesh: jax.sharding.Mesh
) -> tuple[nnx.GraphDef, optax.GradientTransformation, State]:
    """The model, the optimizer, and both at step 0, made where they will lie."""
    sizes = (vocab_size, config.layers, config.width, config.head_dim)
    dtype = jnp.dtype(configs.compute_dtype(config))

    def make_model() -> model.GPT:
        return model.GPT(*sizes, dtype=dtype, rngs=nnx.Rngs(config.seed))

    graph, shapes = nnx.split(nnx.eval_shape(make_model))
    stored = sharding.shardings(shapes, mesh)
    params = jax.jit(lambda: nnx.state(make_model()), out_shardings=stored)()
    # On explicit axes types say where parameters lie; auto axes hide it from `update`.
    placement = None if sharding.is_explicit(mesh) else om.Placement(params)
    optimizer = make_optimizer(config, placement)
    # Not compiled: zeros like a parameter then lie as it does.
    state = State(params, optimizer.init(params))  # type: ignore
    return graph, optimizer, sharding.place_rest(state, mesh)


# -------------------------------------------------------------------- one step


def loss_fn(params: nnx.State, graph: nnx.GraphDef, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats a token of windows (B, T + 1)."""
    logits = nnx.merge(graph, params)(windows[:, :-1])  # (B, T, V)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return jnp.mean(losses)


def make_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh | None = None,
    like: State | None = None,
) -> jax.stages.Wrapped:
    """Compiled: state and windows (A, B, T + 1) to the next state and the mean loss.

    Args:
      graph: The model without its parameters.
      optimizer: Takes the mean gradient.
      mesh: Of state and windows, None on one device.
      like: A state that lies as the next one shall.
    """
    on_mesh = sharding.spread(loss_fn, mesh)

    def step(state: State, windows: jax.Array) -> tuple[State, jax.Array]:
        def add_micro_batch(total, micro_batch):  # (B, T + 1)
            found = jax.value_and_grad(on_mesh)(state.params, graph, micro_batch)
            return jax.tree.map(jnp.add, total, found), None

        count = windows.shape[0]  # of micro-batches (A, B, T + 1)
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        if count == 1:
            total, _ = add_micro_batch(zero, windows[0])
        else:
            total, _ = jax.lax.scan(add_micro_batch, zero, windows)
        loss, grads = jax.tree.map(lambda x: x / count, total)
        updates, inner = optimizer.update(grads, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), inner), loss  # type: ignore

    stored = like and jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(step, donate_argnums=0, out_shardings=(stored, None))


# --------------------------------------------------------------------- the run


def train(config: Config) -> dict[str, Any]:
    """Trains, and returns the final record, with all others under `records`.

    Ctrl-C and SIGTERM end the run after the step in progress, with a checkpoint, and
    then `stopped` is their name. `seconds` are those of this process, spent in steps.
    """
    config = configs.resolve(config)
    mesh = sharding.make_mesh(config.mesh, config.mesh_axes)
    batches.micro_batch_size(config, mesh)  # Or raises, before a file is written.
    return train_on(mesh, config)


def train_on(mesh: jax.sharding.Mesh, config: Config) -> dict[str, Any]:
    """`train` on a given mesh, which may be of some devices only."""
    quiet = config.quiet or not processes.is_first()
    say = (lambda _: None) if quiet else tqdm.write

    # Output and data; a resumed run takes the tokenizer that it was begun with.
    folder = Path(config.out) if config.out else None
    writes = processes.is_first()
    log = record.Record(
        folder, resume=config.resume, overwrite=config.overwrite, writes=writes
    )
    dataset = data.load(
        config.data,
        tokenizer=log.tokenizer or config.tokenizer,
        bpe_vocab=config.bpe_vocab,
        folder=config.data_dir,
        shards=config.shards,
    )
    if folder and writes and dataset.tokenizer:
        dataset.tokenizer.save(folder / "tokenizer.json")

    windows = batches.Batches(dataset, config, mesh)

    # Model, optimizer, and what they were at the last checkpoint
    graph, optimizer, state = initial(config, dataset.vocab_size, mesh)
    table = om.describe(state.params)
    parameters = check_ownership(table, state.params)
    wanted = config.checkpoint_every or config.resume
    keep = folder / "checkpoints" if folder and wanted else None
    saved = checkpoint.Checkpoints(keep)
    start = 0
    if config.resume:
        log.check_same(configs.identity(config), dataset.sha256)
        start = saved.latest() or 0
        if not start:
            say("no complete checkpoint: begins again at step 0")
        state = saved.restore(start, state) if start else state
        log.rewind(start)

    # What this run is, before anything happens
    about = {
        "parameters": parameters,
        "compute_dtype": configs.compute_dtype(config),
        "tokens": {"train": len(dataset.train), "val": len(dataset.val)},
        "data_sha256": dataset.sha256,
        **record.environment(),
    }
    beside = f"data sha256 {dataset.sha256}, Python {about['python']}"
    takes_all = f"{config.optimizer} takes all {len(table.rows)} leaves"
    say(str(table) if config.optimizer in om.MATRIX_OPTIMIZERS else takes_all)
    for name, value in {**dataclasses.asdict(config), **about}.items():
        say(f"{name:>20}  {value}")
    about["config"] = dataclasses.asdict(config)
    log.add("resume" if config.resume else "run", step=start, **about)

    # Compiled first, so that the clock below measures steps
    begin = time.perf_counter()
    step_fn = make_step(graph, optimizer, mesh, like=state)
    step_fn = step_fn.lower(state, windows.train(start)).compile()
    on_mesh = sharding.spread(loss_fn, mesh)
    eval_fn = jax.jit(lambda params, windows: on_mesh(params, graph, windows))
    compile_seconds = time.perf_counter() - begin

    rate = schedule(config.lr, config)
    tokens_a_step = config.batch_size * config.context
    seconds, timed, speed, skipped = 0.0, 0, 0.0, int(state.optimizer.total_notfinite)
    mark, marked, done, stopped = time.perf_counter(), start, start, None
    with (
        saved,
        checkpoint.Interruption() as interruption,
        tqdm(total=config.steps, initial=start, disable=quiet) as bar,
    ):
        for done in range(start + 1, config.steps + 1):
            state, loss = step_fn(state, windows.train(done - 1))
            bar.update()
            end, report = done == config.steps, done % config.log_every == 0
            if report or jax.process_count() == 1:
                stopped = processes.agreed(interruption.signal)
            validate = end or done % config.val_every == 0
            save = stopped or end or saved.due(done, config.checkpoint_every)
            if not (validate or save or report):
                continue

            value = float(loss)  # waits for the device
            seconds, timed = seconds + time.perf_counter() - mark, timed + done - marked
            speed = tokens_a_step * timed / seconds
            before, skipped = skipped, int(state.optimizer.total_notfinite)
            if skipped > before:
                say(f"step {done}: {skipped} steps skipped, their gradient not finite")
            om.diagnostics.check_refreshes(state.optimizer)
            log.add(
                "train",
                step=done,
                loss=value,
                learning_rate=float(rate(done - 1 - skipped)),
                skipped=skipped,
                tokens=done * tokens_a_step,
                tokens_per_second=round(speed),
            )
            bar.set_postfix_str(f"loss {value:.4f}, {speed:,.0f} tokens/s")
            if validate:
                value = sum(float(eval_fn(state.params, w)) for w in windows.val)
                value /= len(windows.val)
                log.add("val", step=done, loss=value)
                say(f"step {done}: validation loss {value:.4f} ({beside})")
            if save:
                saved.save(done, state)
            if stopped:
                break
            mark, marked = time.perf_counter(), done

    if stopped and done < config.steps:
        way = saved.hint() if saved else "without a checkpoint"
        say(f"stopped by {stopped.name} after step {done}, {way}")
        return {"stopped": stopped.name, "step": done, "records": log.records}

    # A sample, the result, and a plot
    weights = sharding.fetch(state.params, mesh)
    if config.sample and dataset.tokenizer and writes:
        prompt = jnp.asarray(dataset.tokenizer.encode(config.prompt.encode()))
        gpt, key = nnx.merge(graph, weights), jax.random.key(config.seed)
        how = (config.sample, config.context, config.temperature, key)
        tokens = model.generate(gpt, prompt, *how)
        text = dataset.tokenizer.decode(tokens.tolist())
        say(f"--- sample ---\n{config.prompt}{text}\n---")
    result = {
        "step": done,
        "loss": log.last("val")["loss"],
        "train_loss": log.last("train")["loss"],
        "skipped": skipped,
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "tokens_per_second": round(speed),
        "weights_sha256": record.digest(weights),
        "data_sha256": dataset.sha256,
        "python": about["python"],
    }
    log.add("final", **result)
    if folder and writes:
        plot.plot([folder, *config.compare], folder / "loss.png")
    say(
        f"{config.optimizer}, lr {config.lr}, seed {config.seed}: validation loss "
        f"{result['loss']:.4f} after {done} steps, {skipped} of them skipped, in "
        f"{seconds:.1f} s and {compile_seconds:.1f} s to compile ({beside})"
    )
    return {**result, "stopped": None, "records": log.records}


def main() -> None:
    # Before the processes meet: then none finds the folder that another has made.
    config = configs.from_command_line()
    with processes.joined(config):
        result = train(config)
    if result["stopped"]:
        sys.exit(128 + signal.Signals[result["stopped"]])


if __name__ == "__main__":
    main()
