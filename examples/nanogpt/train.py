"""Trains a GPT. Read it from top to bottom; run it in the root of the repository:

python -m examples.nanogpt.train                           # a minute on two CPU cores
python -m examples.nanogpt.train --optimizer adamw --lr 0.002
python -m examples.nanogpt.train --config gpt2-small       # 124M parameters, GPU or TPU
python -m examples.nanogpt.train --mesh data=2,fsdp=4      # on eight devices
python -m examples.nanogpt.train --help
"""

import dataclasses
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
    """The state that a step updates and that a checkpoint stores."""

    params: nnx.State
    optimizer: optax.ApplyIfFiniteState


# ------------------------------------------------------------------- optimizer


def schedule(peak: Any, config: Config) -> Callable:
    """Returns a schedule: linear warmup, a constant rate, then linear decay to zero."""
    decay = max(1, round(config.cooldown * config.steps))
    stable = optax.linear_schedule(peak, 0.0, decay, config.steps - decay)

    def with_warmup(count):
        return jnp.minimum(1.0, (count + 1.0) / config.warmup) * stable(count)

    return with_warmup if config.warmup else stable


def make_optimizer(
    config: Config, placement: om.Placement | None = None
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of `config`, which skips steps with non-finite gradients.

    A skipped step changes neither the parameters nor the optimizer state, including the
    step count of the schedule. The number of consecutive skipped steps is not limited.

    Args:
      config: Configuration with the name and the settings of the optimizer.
      placement: Shardings of the parameters, for optimizers that need whole matrices.
    """
    config = configs.resolve(config)
    settings = configs.built(config.optimizer, config.settings)
    if config.optimizer in om.MATRIX_OPTIMIZERS:
        settings.setdefault("auxiliary_learning_rate", schedule(config.aux_lr, config))
        settings.setdefault("placement", placement)
    rate = schedule(config.lr, config)
    optimizer = om.make_optimizer(config.optimizer, rate, **settings)
    if config.clip:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip), optimizer)
    if config.qk_clip:
        optimizer = optax.chain(optimizer, om.qk_clip(attention, config.qk_clip))
    never = np.iinfo(np.int32).max
    return optax.apply_if_finite(optimizer, max_consecutive_errors=never)  # type: ignore


def attention(path: str, leaf: Any) -> om.QKProjection | None:
    """Describes how a parameter contributes to the attention logits."""
    del leaf
    layer, _, projection = path.removesuffix("/kernel").rpartition("/")
    return om.QKProjection(layer, axes=1) if projection in ("q", "k") else None


def check_ownership(table: Any, params: nnx.State) -> int:
    """Counts the parameters; raises unless each leaf is in the routing table once."""
    leaves = jax.tree.leaves(params)
    owned = len(table.rows), sum(row.parameters for row in table.rows)
    if owned != (len(leaves), sum(leaf.size for leaf in leaves)):
        raise RuntimeError(
            f"the routing table has {owned[0]} leaves and {owned[1]} parameters, "
            "unlike the model"
        )
    return owned[1]


def initial(
    config: Config, vocab_size: int, mesh: jax.sharding.Mesh
) -> tuple[nnx.GraphDef, optax.GradientTransformation, State]:
    """Returns the model, the optimizer and the initial state, sharded over the mesh."""
    sizes = (vocab_size, config.layers, config.width, config.head_dim)
    dtype = jnp.dtype(configs.compute_dtype(config))

    def make_model() -> model.GPT:
        rngs, normed = nnx.Rngs(config.seed), bool(config.qk_norm)
        return model.GPT(*sizes, qk_norm=normed, dtype=dtype, rngs=rngs)

    graph, shapes = nnx.split(nnx.eval_shape(make_model))
    stored = sharding.shardings(shapes, mesh)
    params = jax.jit(lambda: nnx.state(make_model()), out_shardings=stored)()
    # Array types contain explicit axes, but `update` cannot see shardings on auto axes.
    placement = None if sharding.is_explicit(mesh) else om.Placement(params)
    optimizer = make_optimizer(config, placement)
    # Not compiled, so that zeros_like(parameter) has the sharding of the parameter.
    state = State(params, optimizer.init(params))  # type: ignore
    return graph, optimizer, sharding.place_rest(state, mesh)


# -------------------------------------------------------------------- one step


def loss_fn(params: nnx.State, graph: nnx.GraphDef, windows: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of windows (B, T + 1) in nats per token."""
    return loss_and_max_logits(params, graph, windows)[0]


def loss_and_max_logits(
    params: nnx.State, graph: nnx.GraphDef, windows: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss, and by layer the largest attention logits.

    There are none if the model normalizes queries and keys.
    """
    gpt = nnx.merge(graph, params)
    logits = gpt(windows[:, :-1])  # (B, T, V)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    stored = nnx.to_flat_state(nnx.pop(gpt, model.MaxLogits))
    largest = {"/".join(map(str, path[:-1])): found[...] for path, found in stored}
    return jnp.mean(losses), largest


def make_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh | None = None,
    like: State | None = None,
) -> jax.stages.Wrapped:
    """Returns a compiled step from state and windows (A, B, T + 1).

    It returns the state, the loss, and the largest attention logit, which is None if
    the model normalizes queries and keys.

    Args:
      graph: The model without its parameters.
      optimizer: Optimizer of the mean loss over all micro-batches.
      mesh: Mesh of the state and the windows; None: a single device.
      like: A state with the shardings of the result.
    """
    on_mesh = sharding.spread(loss_and_max_logits, mesh)
    optimizer = optax.with_extra_args_support(optimizer)

    def step(
        state: State, windows: jax.Array
    ) -> tuple[State, jax.Array, jax.Array | None]:
        def add_micro_batch(total, micro_batch):  # (B, T + 1)
            (loss, logits), grads = jax.value_and_grad(on_mesh, has_aux=True)(
                state.params, graph, micro_batch
            )
            return jax.tree.map(jnp.add, total, (loss, grads)), logits

        count = windows.shape[0]  # number of micro-batches
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        if count == 1:
            total, logits = add_micro_batch(zero, windows[0])
        else:
            total, logits = jax.lax.scan(add_micro_batch, zero, windows)
            logits = jax.tree.map(lambda x: x.max(0), logits)
        loss, grads = jax.tree.map(lambda x: x / count, total)
        updates, inner = optimizer.update(
            grads, state.optimizer, state.params, max_logits=logits
        )
        params = optax.apply_updates(state.params, updates)
        largest = jnp.max(jnp.stack([*logits.values()])) if logits else None
        return State(params, inner), loss, largest  # type: ignore

    stored = like and jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(step, donate_argnums=0, out_shardings=(stored, None, None))


# --------------------------------------------------------------------- the run


def train(config: Config) -> dict[str, Any]:
    """Trains, and returns the final record, with all other records under `records`.

    Ctrl-C or SIGTERM stops the run after the current step, with a checkpoint; `stopped`
    is then the name of the signal. `seconds` is the time this process spent in steps.
    """
    config = configs.resolve(config)
    mesh = sharding.make_mesh(config.mesh, config.mesh_axes)
    batches.micro_batch_size(config, mesh)  # Checks it before any file is written.
    return train_on(mesh, config)


def train_on(mesh: jax.sharding.Mesh, config: Config) -> dict[str, Any]:
    """Trains on a given mesh, which may consist of some of the devices only."""
    quiet = config.quiet or not processes.is_first()
    say = (lambda _: None) if quiet else tqdm.write

    # Output and data. A resumed run uses its original tokenizer.
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
    if config.resume:
        log.check_same(configs.identity(config), dataset.sha256, dataset.files)
    if folder and writes and dataset.tokenizer:
        dataset.tokenizer.save(folder / "tokenizer.json")

    windows = batches.Batches(dataset, config, mesh)

    # Model and optimizer, restored from the last checkpoint if the run is resumed
    graph, optimizer, state = initial(config, dataset.vocab_size, mesh)
    table = om.describe(state.params)
    parameters = check_ownership(table, state.params)
    wanted = config.checkpoint_every or config.resume
    keep = folder / "checkpoints" if folder and wanted else None
    saved = checkpoint.Checkpoints(keep)
    start = 0
    if config.resume:
        start, state = saved.restore(state, say)
        say(f"resuming after step {start}" if start else "no checkpoint: restarting")
        log.rewind(start)

    # Description of the run
    about = {
        "parameters": parameters,
        "compute_dtype": configs.compute_dtype(config),
        "tokens": {"train": len(dataset.train), "val": len(dataset.val)},
        "data_sha256": dataset.sha256,
        **record.environment(),
    }
    source = f"data sha256 {dataset.sha256}, Python {about['python']}"
    all_leaves = f"{config.optimizer} trains all {len(table.rows)} leaves"
    say(str(table) if config.optimizer in om.MATRIX_OPTIMIZERS else all_leaves)
    for name, value in {**dataclasses.asdict(config), **about}.items():
        say(f"{name:>20}  {value}")
    about |= {"config": dataclasses.asdict(config), "data_files": dataset.files}
    log.add("resume" if config.resume else "run", step=start, **about)

    # Compile first, so that the timings below are of steps only
    begin = time.perf_counter()
    step_fn = make_step(graph, optimizer, mesh, like=state)
    step_fn = step_fn.lower(state, windows.train(start)).compile()
    on_mesh = sharding.spread(loss_fn, mesh)
    eval_fn = jax.jit(lambda params, windows: on_mesh(params, graph, windows))
    compile_seconds = time.perf_counter() - begin

    rate = schedule(config.lr, config)
    tokens_per_step = config.batch_size * config.context
    seconds, timed, speed, skipped = 0.0, 0, 0.0, int(state.optimizer.total_notfinite)
    mark, marked, done, stopped = time.perf_counter(), start, start, None
    with (
        saved,
        checkpoint.Interruption() as interruption,
        tqdm(total=config.steps, initial=start, disable=quiet) as bar,
    ):
        for done in range(start + 1, config.steps + 1):
            state, loss, max_logit = step_fn(state, windows.train(done - 1))
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
            speed = tokens_per_step * timed / seconds
            before, skipped = skipped, int(state.optimizer.total_notfinite)
            if skipped > before:
                say(f"step {done}: {skipped} steps skipped with non-finite gradients")
            om.diagnostics.check_refreshes(state.optimizer)
            watched = {} if max_logit is None else {"max_logit": float(max_logit)}
            log.add(
                "train",
                step=done,
                loss=value,
                learning_rate=float(rate(done - 1 - skipped)),
                skipped=skipped,
                tokens=done * tokens_per_step,
                tokens_per_second=round(speed),
                **watched,
            )
            bar.set_postfix_str(f"loss {value:.4f}, {speed:,.0f} tokens/s")
            if validate:
                value = sum(float(eval_fn(state.params, w)) for w in windows.val)
                value /= len(windows.val)
                log.add("val", step=done, loss=value)
                say(f"step {done}: validation loss {value:.4f} ({source})")
            if save:
                saved.save(done, state)
            if stopped:
                break
            mark, marked = time.perf_counter(), done

    if stopped and done < config.steps:
        hint = saved.hint() if saved else "no checkpoint was saved"
        say(f"stopped by {stopped.name} after step {done}; {hint}")
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
        f"{result['loss']:.4f} after {done} steps ({skipped} skipped), {seconds:.1f} s "
        f"of training and {compile_seconds:.1f} s of compilation ({source})"
    )
    return {**result, "stopped": None, "records": log.records}


def main() -> None:
    # Before the processes connect, so that all choose the same new output folder.
    config = configs.from_command_line()
    with processes.joined(config):
        result = train(config)
    if result["stopped"]:
        sys.exit(128 + signal.Signals[result["stopped"]])


if __name__ == "__main__":
    main()
