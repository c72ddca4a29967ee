"""Teaches word problems by GRPO or DAPO. Read it from top to bottom; run it so:

python -m examples.rl.train --out runs/hopper
python -m examples.rl.train --optimizer adam --algorithm grpo
python -m examples.rl.train --optimizer hopper --then adam --switch 0.5
python -m examples.rl.train --help
"""

import dataclasses
import functools
import inspect
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import optax_matrix as om
from examples.nanogpt import checkpoint, record
from examples.nanogpt import configs as nanogpt
from examples.rl import base, configs, evaluate, loss, policy, task
from examples.rl.configs import Config
from examples.rl.loss import Batch


class State(NamedTuple):
    """What a step updates and a checkpoint stores."""

    params: nnx.State
    optimizer: Any
    best: nnx.State  # the parameters with the highest score on validation problems
    best_score: jax.Array
    best_step: jax.Array


# ------------------------------------------------------------------- optimizer


def named(config: Config, name: str, peak: float, settings: Mapping[str, Any]):
    """Returns an optimizer at a constant learning rate after a linear warmup.

    Matrices and the other parameters have the same learning rate, which fits both
    because the updates of matrices have the RMS of Adam's.
    """

    def rate(count):
        return peak * jnp.minimum(1.0, (count + 1) / max(config.warmup, 1))

    settings = nanogpt.built(name, settings)
    if name in om.MATRIX_OPTIMIZERS:
        settings.setdefault("auxiliary_learning_rate", rate)
        if "shape_scale" in inspect.signature(om.OPTIMIZERS[name]).parameters:
            settings.setdefault("shape_scale", "rms")
    return om.make_optimizer(name, rate, **settings)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns the optimizer of a run, which may be two, one after the other."""
    assert config.lr is not None
    first = named(config, config.optimizer, config.lr, config.settings)
    if config.then:
        assert config.then_lr is not None
        second = named(config, config.then, config.then_lr, {})
        updates = config.steps * config.epochs * config.minibatches
        first = om.switch_at(round(config.switch * updates), first, second)
    if config.clip:
        first = optax.chain(optax.clip_by_global_norm(config.clip), first)
    return first


# ------------------------------------------------------------------- responses


class Rollout(NamedTuple):
    """Responses of one round, with what they earned."""

    batch: Batch  # all groups, in order
    signal: np.ndarray  # for each group, whether its rewards differ
    metrics: dict[str, float]


@functools.partial(jax.jit, static_argnums=(0, 5))
def _both(graph, params, reference, prompts, keys, temperature):
    """Samples, and returns log-probabilities under the reference as well."""
    found = policy.sample(graph, params, prompts, keys, task.RESPONSE, temperature)
    log_probs = policy.log_probs(graph, reference, prompts, found.tokens, temperature)
    return found, log_probs


def respond(
    config: Config, graph: nnx.GraphDef, state: State, reference: nnx.State, *at: int
) -> Rollout:
    """Samples a group of responses to each of some prompts, and grades them.

    Prompts and keys depend on the seed and on `at`, the step and the round, alone. So
    all optimizers get the same ones.
    """
    # The last number keeps the seeds of different things apart.
    rng = np.random.default_rng((config.seed, *at, 2))
    problems = task.problems("train", rng)
    given = [next(problems) for _ in range(config.groups)]
    prompts = np.repeat(task.prompts_of(given), config.samples, axis=0)
    key = functools.reduce(jax.random.fold_in, at, jax.random.key(config.seed))
    of_groups = jax.random.split(key, config.groups)
    keys = jax.vmap(lambda k: jax.random.split(k, config.samples))(of_groups)
    where = (jnp.asarray(prompts), keys.reshape(-1))
    found, ref = _both(graph, state.params, reference, *where, config.temperature)

    repeated = [problem for problem in given for _ in range(config.samples)]
    texts = [task.decode(row) for row in np.asarray(found.tokens)]
    grades = [task.grade(*t, p.answer) for t, p in zip(texts, repeated, strict=True)]
    correct = np.array([grade.correct for grade in grades], np.float64)
    formed = np.array([grade.well_formed for grade in grades])
    lengths = np.asarray(found.mask).sum(1)
    ended = np.array([ended for _, ended in texts])
    aim = configs.objective(config)
    rewards = correct + config.format_reward * (formed & (correct == 0))
    rewards += loss.overlong_penalty(lengths, ended, task.RESPONSE, aim.overlong)
    groups = rewards.reshape(config.groups, config.samples)
    gain = loss.advantages(groups, aim.scale).reshape(-1)

    mask, tokens = np.asarray(found.mask), np.asarray(found.mask).sum()
    gap = np.asarray(found.log_probs - ref)  # of the policy over the reference
    k3 = np.asarray(loss.k3(found.log_probs, ref))
    inside = gap[mask > 0]
    metrics = {
        "reward": rewards.mean(),
        "correct": correct.mean(),
        "format": formed.mean(),
        "nonsense": np.mean([grade.nonsense for grade in grades]),
        "length": lengths.mean(),
        "entropy": np.sum(np.asarray(found.entropy) * mask) / tokens,
        "kl_k1": np.sum(gap * mask) / tokens,
        "kl_k3": np.sum(k3 * mask) / tokens,
        "kl_p99": np.quantile(np.abs(inside), 0.99),
        "kl_largest": np.abs(inside).max(),
    }
    gain = jnp.asarray(gain, jnp.float32)
    batch = Batch(where[0], found.tokens, found.mask, gain, found.log_probs, ref)
    batch = jax.tree.map(np.asarray, batch)
    signal = np.ptp(groups, axis=1) > 0
    return Rollout(batch, signal, {k: float(v) for k, v in metrics.items()})


def collect(
    config: Config, graph: nnx.GraphDef, state: State, reference: nnx.State, step: int
) -> tuple[Batch, dict[str, float]]:
    """Returns the responses that a step learns from, and the metrics of the step.

    With more than one round, groups whose rewards are all equal are replaced by those
    of later rounds (DAPO's dynamic sampling); what is still missing after the last
    round is filled with groups of the first. The metrics are those of the first round,
    which is not chosen by its rewards.
    """

    def groups(rollout: Rollout, signal: bool) -> list[Batch]:
        """Returns the groups that have a signal, or those that have none."""
        size = config.samples
        return [
            jax.tree.map(lambda x, g=g: x[g * size : (g + 1) * size], rollout.batch)
            for g in np.flatnonzero(rollout.signal == signal)
        ]

    assert config.rounds is not None
    first = respond(config, graph, state, reference, step, 0)
    kept, rounds = groups(first, signal=True), 1
    while len(kept) < config.groups and rounds < config.rounds:
        more = respond(config, graph, state, reference, step, rounds)
        kept, rounds = kept + groups(more, signal=True), rounds + 1
    kept += groups(first, signal=False)
    batch = jax.tree.map(lambda *x: np.concatenate(x), *kept[: config.groups])
    signal = float(first.signal.mean())
    return batch, {**first.metrics, "signal": signal, "rounds": rounds}


# -------------------------------------------------------------------- one step


def make_update(graph: nnx.GraphDef, optimizer: Any, config: Config) -> Any:
    """Returns a compiled update from (params, state, batch), with what it measures."""
    aim = configs.objective(config)

    def objective(params: nnx.State, batch: Batch):
        now = policy.log_probs(
            graph, params, batch.prompts, batch.tokens, config.temperature
        )
        value, clipped = loss.policy_loss(now, batch, aim)
        ratio = jnp.where(batch.mask > 0, jnp.abs(now - batch.old), jnp.nan)
        return value, (clipped, ratio)

    @jax.jit
    def update(params, state, batch: Batch):
        (value, (clipped, ratio)), grads = jax.value_and_grad(objective, has_aux=True)(
            params, batch
        )
        updates, state = optimizer.update(grads, state, params)
        matrices = [u for u in jax.tree.leaves(updates["blocks"]) if u.ndim == 2]
        ranks = [om.diagnostics.participation_ratio(u) for u in matrices]
        found = {
            "loss": value,
            "clip_fraction": clipped,
            "ratio_p99": jnp.nanquantile(ratio, 0.99),
            "ratio_largest": jnp.nanmax(ratio),
            "gradient_norm": optax.tree.norm(grads),
            "update_rms": jnp.sqrt(
                sum(jnp.sum(u**2) for u in matrices) / sum(u.size for u in matrices)
            ),
            "update_rank": jnp.mean(jnp.stack([jnp.ravel(r)[0] for r in ranks])),
        }
        return optax.apply_updates(params, updates), state, found

    return update


def minibatches(config: Config, batch: Batch, step: int):
    """Yields the minibatches of all passes over the responses of a step."""
    count = config.groups * config.samples
    for epoch in range(config.epochs):
        rng = np.random.default_rng((config.seed, step, epoch, 1))
        for places in np.array_split(rng.permutation(count), config.minibatches):
            yield jax.tree.map(lambda x, p=places: x[p], batch)


# --------------------------------------------------------------------- the run


def train(config: Config) -> dict[str, Any]:
    """Trains, and returns the final record, with all other records under `records`."""
    config = configs.resolve(config)
    say = (lambda _: None) if config.quiet else tqdm.write
    folder = Path(config.out) if config.out else None
    log = record.Record(
        folder,
        resume=config.resume,
        overwrite=config.overwrite,
        source=Path(__file__).parent,
    )
    graph, reference = base.load(
        config.base_steps, config.base_seed, quiet=config.quiet, say=say
    )
    optimizer = make_optimizer(config)
    state = State(
        reference,
        optimizer.init(reference),  # type: ignore
        reference,
        jnp.float32(-1),
        jnp.int32(0),
    )
    wanted = folder and (config.checkpoint_every or config.resume)
    saved = checkpoint.Checkpoints(folder / "checkpoints" if wanted else None)  # type: ignore
    start, base_digest = 0, record.digest(reference)
    if config.resume:
        log.check_same(configs.identity(config), base_digest)
        start, state = saved.restore(state, say)
        log.rewind(start)
    log.add(
        "resume" if config.resume else "run",
        step=start,
        config=dataclasses.asdict(config),
        data_sha256=base_digest,
        **record.environment(),
    )
    update = make_update(graph, optimizer, config)
    held = task.held_out("validation", config.eval_problems)
    done, stopped = start, None
    with (
        saved,
        checkpoint.Interruption() as interruption,
        tqdm(
            total=config.steps,
            initial=start,
            disable=config.quiet,
            desc=config.optimizer,
        ) as bar,
    ):
        if not log.last("val"):
            log.add("val", step=0, **evaluate.greedy(graph, state.params, held))
        for done in range(start + 1, config.steps + 1):
            batch, metrics = collect(config, graph, state, reference, done - 1)
            params, inner, found = state.params, state.optimizer, []
            for part in minibatches(config, batch, done - 1):
                params, inner, measured = update(params, inner, part)
                found.append(measured)
            state = state._replace(params=params, optimizer=inner)
            for name in found[0]:
                values = [float(each[name]) for each in found]
                largest = name in ("ratio_p99", "ratio_largest")
                metrics[name] = max(values) if largest else float(np.mean(values))
            log.add("train", step=done, **metrics)
            bar.update()
            bar.set_postfix_str(f"correct {metrics['correct']:.2f}")
            end = done == config.steps
            if end or done % config.eval_every == 0:
                result = evaluate.greedy(graph, state.params, held)
                log.add("val", step=done, **result)
                score = jnp.float32(result["all"])
                if score > state.best_score:
                    state = state._replace(
                        best=state.params, best_score=score, best_step=jnp.int32(done)
                    )
            stopped = interruption.signal
            if stopped or end or saved.due(done, config.checkpoint_every):
                saved.save(done, state)
            if stopped:
                break
    if stopped and done < config.steps:
        hint = saved.hint() if saved else "no checkpoint was saved"
        say(f"stopped by {stopped.name} after step {done}; {hint}")
        return {"stopped": stopped.name, "step": done, "records": log.records}

    result = {"step": done, "weights_sha256": record.digest(state.params)}
    result |= {"best_step": int(state.best_step), **scores(config, graph, state)}
    log.add("final", **result)
    say(
        f"{config.optimizer}, learning rate {config.lr}, seed {config.seed}: "
        f"{result['best']['all']:.3f} of the test problems right after step "
        f"{result['best_step']}, the best on the validation problems"
    )
    return {**result, "stopped": None, "records": log.records, "state": state}


def scores(config: Config, graph: nnx.GraphDef, state: State) -> dict[str, Any]:
    """Scores the best and the last parameters on the test problems."""
    held = task.held_out("test", config.test_problems)
    few = task.held_out("test", config.eval_problems)  # for samples, which cost more
    how = {"seed": config.seed, "temperature": config.temperature}
    return {
        "best": {
            **evaluate.greedy(graph, state.best, held),
            **evaluate.sampled(graph, state.best, few, **how),
        },
        "last": evaluate.greedy(graph, state.params, held),
    }


def main() -> None:
    result = train(configs.from_command_line())
    if result["stopped"]:
        sys.exit(128 + signal.Signals[result["stopped"]])


if __name__ == "__main__":
    main()
