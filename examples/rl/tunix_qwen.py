"""Trains Qwen2.5 by Tunix's GRPO, with any optimizer of optax_matrix.

    pip install -e '.[tunix,gym]'
    python -m examples.rl.tunix_qwen --data gsm8k/train.jsonl --lr 1e-6 --out runs/qwen
    python -m examples.rl.tunix_qwen --data gym:basic_arithmetic --lr 1e-6
    python -m examples.rl.tunix_qwen --help

For one device. README.md says which parts of it were run. The comments name what Tunix
0.1.7 does differently from what one would expect.
"""

# The extras `tunix` and `gym` need not be installed.
# pyright: reportMissingImports=false

import argparse
import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import transformers
from flax import nnx
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2 import params as qwen2_params
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout import base_rollout, vanilla_rollout

import optax_matrix as om
from examples import flags
from examples.flags import flag
from examples.nanogpt import configs as nanogpt
from examples.rl import problems
from examples.rl.problems import Problem

Role = rl_cluster.Role
# With a mesh of devices Tunix restores no state that has masked nodes, such as that of
# `optax.partition`.
NO_MESH = jax.sharding.Mesh(np.empty((), dtype=object), ())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run. Every field is a flag."""

    model: str = flag(
        "Qwen/Qwen2.5-0.5B-Instruct", "this model, one of its fine-tunes, or a folder"
    )
    data: str = flag("", "a file in GSM8K's format, or gym:TASK; it must be given")
    test: str = flag("", "problems for evaluation, as `data`; default: none")
    test_problems: int = flag(64, "how many of them")
    test_every: int = flag(50, "steps between evaluations, the first before step 1")
    optimizer: str = flag("hopper", "a name from optax_matrix.OPTIMIZERS")
    lr: float = flag(math.nan, "learning rate; it must be given, because none is tuned")
    settings: dict[str, Any] = flag(  # noqa: RUF009 (copied for each instance)
        {}, 'further arguments of the optimizer, as JSON, such as {"momentum": 0.9}'
    )
    clip: float = flag(1.0, "maximum global norm of a gradient; 0 disables clipping")
    steps: int = flag(200, "steps, each with new prompts")
    prompts: int = flag(8, "prompts per step")
    samples: int = flag(8, "responses per prompt: the size of a group")
    epochs: int = flag(1, "passes over the responses of a step")
    at_once: int = flag(1, "prompts whose groups are in memory at the same time")
    kl: float = flag(0.04, "coefficient of the KL divergence from the first policy")
    prompt_tokens: int = flag(256, "the most tokens of a prompt")
    response_tokens: int = flag(512, "the most tokens of a response")
    format_reward: float = flag(0.1, "reward of an answer after #### that is wrong")
    seed: int = flag(0, "seed of the order of problems and of the responses")
    out: str = flag("", "folder of metrics and checkpoints; a run in it is continued")
    checkpoint_every: int = flag(50, "steps between checkpoints")


# ------------------------------------------------------------------- optimizer


def layout(path: str, leaf: Any) -> Any:
    """Says which axes of Qwen's parameters are the inputs and outputs of a matrix.

    Projections have an axis of heads; the default rules know those of Flax by names
    that are not Qwen's here.
    """
    del leaf
    *_, module, name = path.split("/")
    if name == "kernel":
        return None  # the MLP's: (inputs, outputs), by the default rules
    if name == "w" and module in ("q_proj", "k_proj", "v_proj"):
        return om.MatrixLayout(inputs=0, outputs=(1, 2))
    if name == "w" and module == "o_proj":
        return om.MatrixLayout(inputs=(0, 1), outputs=2)
    return "auxiliary"  # embeddings, the head, norms and biases


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns the optimizer of all parameters, at a constant learning rate."""
    settings = nanogpt.built(config.optimizer, config.settings)
    if config.optimizer in om.MATRIX_OPTIMIZERS:
        settings = {"routing": layout, "auxiliary_learning_rate": config.lr, **settings}
    optimizer = om.make_optimizer(config.optimizer, config.lr, **settings)
    if config.clip:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip), optimizer)
    return optimizer


# ------------------------------------------------------------------- responses


class Rollout(vanilla_rollout.VanillaRollout):
    """Samples with a new seed in every call, and leaves end tokens in responses.

    Tunix's own rollout uses one seed in all calls, so every step would have the same
    noise, and removes end tokens, so that nothing would teach when to end.
    """

    def __init__(
        self, rollout_actor: Any, tokenizer: Any, mesh: Any, rollout_config: Any
    ):
        del mesh
        sizes = ("num_layers", "num_kv_heads", "head_dim")
        of_model = {name: getattr(rollout_actor.config, name) for name in sizes}
        cache = base_rollout.CacheConfig(rollout_config.kv_cache_size, **of_model)
        super().__init__(rollout_actor, tokenizer, cache)
        self.rng = np.random.default_rng(rollout_config.seed)

    def generate(
        self, prompts: list[str], rollout_config: Any, **kwargs: Any
    ) -> base_rollout.RolloutOutput:
        seed = int(self.rng.integers(2**31))
        config = dataclasses.replace(rollout_config, seed=seed)
        found = super().generate(prompts, config, **kwargs)
        longest = config.max_tokens_to_generate
        found.tokens = [with_end(row, self.eos_id(), longest) for row in found.tokens]
        return found


def with_end(tokens: np.ndarray, end: int, longest: int) -> np.ndarray:
    """Returns a response with its end token, unless it was cut off."""
    return np.append(tokens, end) if len(tokens) < longest else tokens


def prompt_of(tokenizer: Any, question: str) -> str:
    """Returns what the model is given, in the format of its chats if it has one."""
    text = f"{question}\n{problems.INSTRUCTION}"
    if not getattr(tokenizer, "chat_template", None):
        return text
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def inputs_of(
    config: Config, tokenizer: Any, given: Sequence[Problem], size: int
) -> list[dict[str, Any]]:
    """Returns batches of `size` prompts with their problems.

    Raises:
      ValueError: If a prompt is longer than `prompt_tokens`. Tunix would fail in the
        step that samples from it.
    """
    prompts = [prompt_of(tokenizer, problem.question) for problem in given]
    for place, prompt in enumerate(prompts):
        length = len(tokenizer.encode(prompt))
        if length > config.prompt_tokens:
            raise ValueError(
                f"problem {place} ({given[place].question[:60]} ...) has {length} "
                f"tokens, more than `prompt_tokens` = {config.prompt_tokens}: raise it"
            )
    # Arrays, because Tunix repeats these along axis 0 but descends into lists.
    every = {"prompts": np.array(prompts), "problem": np.array(given, object)}
    return [
        {name: values[i : i + size] for name, values in every.items()}
        for i in range(0, len(given), size)
    ]


# --------------------------------------------------------------------- metrics


@contextlib.contextmanager
def recording(path: Path):
    """Appends what Tunix measures to a file, a line for each number.

    Tunix reports to all listeners of `jax.monitoring`, as JAX itself does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:

        def write(event: str, value: float, **about: Any) -> None:
            if not event.startswith("/jax"):
                line = {"step": about.get("step"), "name": event, "value": float(value)}
                file.write(json.dumps(line) + "\n")
                file.flush()

        jax.monitoring.register_scalar_listener(write)
        try:
            yield
        finally:
            jax.monitoring.unregister_scalar_listener(write)


# --------------------------------------------------------------------- the run


def load_model(name: str) -> tuple[nnx.Module, Any]:
    """Returns Qwen2.5-0.5B and its tokenizer, downloaded unless `name` is a folder.

    Raises:
      ValueError: If padding is the end token, which Tunix would then mask.
    """
    folder = name
    if not Path(name).is_dir():
        folder = huggingface_hub.snapshot_download(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise ValueError(
            f"the tokenizer of {name} must have a padding token other than its end "
            f"token, got {tokenizer.pad_token!r} and {tokenizer.eos_token!r}: take the "
            "Instruct model"
        )
    # Activations are bfloat16, as the file is; small steps need float32 parameters.
    # Rematerialization ends in an error of NNX with flax 0.12.8.
    config = dataclasses.replace(qwen2.ModelConfig.qwen2p5_0p5b(), dtype=jnp.bfloat16)
    model = qwen2_params.create_model_from_safe_tensors(
        folder, config, dtype=jnp.float32
    )
    return model, tokenizer


def make_learner(config: Config, model: nnx.Module, tokenizer: Any) -> GRPOLearner:
    """Returns a learner that has restored the last checkpoint of `out`, if any."""
    out = Path(config.out).absolute() if config.out else None
    total = config.prompt_tokens + config.response_tokens
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=make_optimizer(config),
        eval_every_n_steps=config.test_every * config.epochs,
        max_steps=config.steps * config.epochs,
        mini_batch_size=config.prompts,
        train_micro_batch_size=config.at_once,
        checkpoint_root_directory=str(out / "checkpoints") if out else None,
        checkpointing_options=ocp.CheckpointManagerOptions(
            save_interval_steps=config.checkpoint_every * config.epochs, max_to_keep=2
        ),
    )
    rollout = base_rollout.RolloutConfig(
        # With another temperature, Tunix's log-probabilities of the policy that sampled
        # would be those of another policy.
        temperature=1.0,
        max_tokens_to_generate=config.response_tokens,
        max_prompt_length=config.prompt_tokens,
        kv_cache_size=total + 1,
        seed=config.seed,  # type: ignore
    )
    cluster = rl_cluster.RLCluster(
        actor=model,
        reference=nnx.clone(model) if config.kl else None,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(
                (Role.ACTOR, Role.REFERENCE, Role.ROLLOUT), NO_MESH
            ),
            rollout_engine=Rollout,
            training_config=training,
            rollout_config=rollout,
        ),
    )

    def reward(completions: list[str], problem: Sequence[Problem], **_: Any):
        pairs = zip(completions, problem, strict=True)
        return [problems.reward(*pair, config.format_reward) for pair in pairs]

    learner = GRPOLearner(
        cluster,
        GRPOConfig(
            num_generations=config.samples,
            num_iterations=config.epochs,
            beta=config.kl,
            kl_loss_mode="low_var_kl",  # k3; the default may be negative
        ),
        reward,
    )
    names = ("kl", "pg_clipfrac", "entropy", "is_ratio/max", "log_ratio/abs_mean")
    cluster.actor_trainer.with_rl_metrics_to_log(dict.fromkeys(names, np.mean))
    # Tunix does not store what sampling depends on; its last checkpoint lacks the step.
    cluster.global_steps = cluster.actor_trainer.train_steps // config.epochs
    cluster.rollout.rng = np.random.default_rng((config.seed, cluster.global_steps))
    return learner


def train(config: Config, model: nnx.Module, tokenizer: Any) -> GRPOLearner:
    """Trains a model, and returns its learner."""
    count = config.steps * config.prompts
    given = problems.load(config.data, count, config.seed)
    inputs = inputs_of(config, tokenizer, given, config.prompts)
    test = None
    if config.test:
        held = problems.load(config.test, config.test_problems, config.seed + 1)
        test = inputs_of(config, tokenizer, held, config.at_once)
    learner = make_learner(config, model, tokenizer)
    # Tunix skips as many batches as it has made updates, of which each batch has
    # `epochs`; a batch that was not finished is taken again.
    done = -(-learner.rl_cluster.actor_trainer.train_steps // config.epochs)
    inputs = inputs[:done] * config.epochs + inputs[done:]
    log = contextlib.nullcontext()
    if config.out:
        log = recording(Path(config.out) / "metrics.jsonl")
    with log:
        learner.train(inputs, test)
    return learner


LEAST = {"clip": 0.0, "kl": 0.0, "format_reward": 0.0, "samples": 2, "seed": 0}
LEAST |= dict.fromkeys(("steps", "prompts", "epochs", "at_once", "test_problems"), 1)
LEAST |= dict.fromkeys(("test_every", "checkpoint_every"), 1)
LEAST |= dict.fromkeys(("prompt_tokens", "response_tokens"), 1)


def check(config: Config) -> Config:
    """Returns a configuration that can be trained, or says what is wrong with it."""
    if not config.data:
        raise ValueError("`data` must be a file in GSM8K's format, or gym:TASK")
    if not 0 <= config.lr < math.inf:
        raise ValueError(
            f"`lr` must be given, finite and at least 0, got {config.lr}; the updates "
            "of hopper have the size of AdamW's, for which 1e-6 is usual"
        )
    if config.optimizer not in om.OPTIMIZERS:
        known = ", ".join(sorted(om.OPTIMIZERS))
        raise ValueError(f"`optimizer` must be one of {known}; got {config.optimizer}")
    for name, least in LEAST.items():
        if not least <= getattr(config, name) < math.inf:
            raise ValueError(
                f"`{name}` must be finite and at least {least}, got "
                f"{getattr(config, name)}"
            )
    for name in ("prompts", "test_problems"):
        if getattr(config, name) % config.at_once:
            raise ValueError(
                f"`at_once` must divide `{name}` = {getattr(config, name)}, got "
                f"{config.at_once}"
            )
    make_optimizer(config)  # checks its settings
    return config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add(parser, Config(), {"optimizer": sorted(om.OPTIMIZERS)})
    try:
        config = check(Config(**vars(parser.parse_args())))
    except ValueError as error:
        parser.error(str(error))
    train(config, *load_model(config.model))


if __name__ == "__main__":
    main()
