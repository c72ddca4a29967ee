"""Defines the settings of a run and the command line."""

import argparse
import dataclasses
import math
from typing import Any

import optax_matrix as om
from examples import flags
from examples.flags import flag
from examples.rl.loss import DAPO, GRPO, Objective
from examples.rl.task import RESPONSE

# Learning rates to begin with; none is the best of a sweep, and only those of adam and
# hopper were run on this task (README.md).
# The matrix optimizers' updates have the RMS of Adam's, so that their rates are alike.
LEARNING_RATES = {"sgd": 5e-3, "adam": 1e-4, "hopper": 1e-4, "adamuon": 3e-4}
LEARNING_RATES |= {"muon": 3e-4, "adamw": 1e-4}
ALGORITHMS = {"dapo": DAPO, "grpo": GRPO}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run. Every field is a flag of `train.py`."""

    # Optimization
    optimizer: str = flag("hopper", "a name from optax_matrix.OPTIMIZERS")
    lr: float | None = flag(
        None, "learning rate; default: see LEARNING_RATES in configs.py"
    )
    settings: dict[str, Any] = flag(  # noqa: RUF009 (copied for each instance)
        {}, 'further arguments of the optimizer, as JSON, such as {"momentum": 0.9}'
    )
    then: str = flag("", "the optimizer that takes over during the run; default: none")
    then_lr: float | None = flag(None, "its learning rate; default: as for `lr`")
    switch: float = flag(0.5, "the fraction of the steps after which it does")
    steps: int = flag(200, "steps, each with new prompts")
    warmup: int = flag(10, "updates of linear warmup of the learning rate")
    clip: float = flag(1.0, "maximum global norm of a gradient; 0 disables clipping")
    epochs: int = flag(1, "passes over the responses of a step")
    minibatches: int = flag(2, "updates per pass")
    # Sampling
    groups: int = flag(16, "prompts per step")
    samples: int = flag(8, "responses per prompt: the size of a group")
    temperature: float = flag(1.0, "temperature of sampling and of the policy")
    # Objective
    algorithm: str = flag("dapo", "dapo or grpo: the defaults of the next flags")
    clip_low: float | None = flag(None, "ratios below 1 - this earn no more")
    clip_high: float | None = flag(None, "ratios above 1 + this earn no more")
    kl: float | None = flag(None, "coefficient of the KL divergence; 0 is without")
    token_level: int | None = flag(None, "1: tokens weigh the same; 0: responses do")
    scale: int | None = flag(None, "1: advantages are divided by their deviation")
    rounds: int | None = flag(
        None, "how often a step may sample, to replace groups without a signal"
    )
    overlong: int | None = flag(
        None, "last tokens over which the reward falls by 1; 0 is without"
    )
    format_reward: float = flag(0.1, "reward of a well-formed response that is wrong")
    # The base, and what differs from run to run
    base_steps: int = flag(600, "steps of the supervised warm-up")
    base_seed: int = flag(0, "seed of the warm-up")
    seed: int = flag(0, "seed of prompts and responses")
    # Reporting
    eval_every: int = flag(25, "steps between evaluations on the validation problems")
    eval_problems: int = flag(64, "validation problems of each kind")
    test_problems: int = flag(
        256, "test problems of each kind, for the last evaluation"
    )
    checkpoint_every: int = flag(50, "steps between checkpoints; 0 disables them")
    out: str | None = flag(None, "folder of metrics and checkpoints; default: none")
    resume: bool = flag(False, "continue the run in the output folder exactly")
    overwrite: bool = flag(False, "delete the contents of the output folder first")
    quiet: bool = flag(False, "print nothing")


# Fields that may differ between a run and its continuation.
PRESENTATION = {"out", "resume", "overwrite", "quiet", "checkpoint_every"}
POSITIVE = (
    *("steps", "epochs", "minibatches", "groups", "samples", "temperature"),
    *("base_steps", "eval_every", "eval_problems", "test_problems", "rounds"),
)
NOT_NEGATIVE = (
    *("lr", "warmup", "clip", "kl", "clip_low", "clip_high", "checkpoint_every"),
)
# A number, its range, and the reason for it.
LIMITS = (
    ("switch", 0.0, 1.0, "as a fraction of the steps"),
    ("token_level", 0, 1, "as a truth value"),
    ("scale", 0, 1, "as a truth value"),
    ("overlong", 0, RESPONSE, "the most tokens of a response"),
    ("format_reward", 0.0, 1.0, "because a right response earns 1"),
    ("eval_problems", 1, 1000, "because no more are held out of each kind"),
    ("test_problems", 1, 1000, "because no more are held out of each kind"),
    ("seed", 0, 2**31 - 1, "as seeds are"),
    ("base_seed", 0, 2**31 - 1, "as seeds are"),
)


def identity(config: Config) -> dict[str, Any]:
    """Returns the fields that determine the numbers of a run."""
    fields = dataclasses.asdict(config)
    return {name: fields[name] for name in fields if name not in PRESENTATION}


def rate_of(optimizer: str) -> float:
    """Returns the default learning rate of an optimizer."""
    if optimizer not in LEARNING_RATES:
        raise ValueError(
            f"`{optimizer}` has no default learning rate: pass `--lr`, or add it to "
            "LEARNING_RATES in examples/rl/configs.py"
        )
    return LEARNING_RATES[optimizer]


def resolve(config: Config) -> Config:
    """Checks a configuration, and fills in learning rate and objective."""
    for name in filter(None, (config.optimizer, config.then)):
        if name not in om.OPTIMIZERS:
            raise ValueError(
                f"the optimizer must be one of {', '.join(sorted(om.OPTIMIZERS))}; got "
                f"{name!r}"
            )
    if config.algorithm not in ALGORITHMS:
        raise ValueError(f"`algorithm` must be dapo or grpo, got {config.algorithm!r}")
    if config.lr is None:
        config = dataclasses.replace(config, lr=rate_of(config.optimizer))
    if config.then and config.then_lr is None:
        config = dataclasses.replace(config, then_lr=rate_of(config.then))
    preset = dataclasses.asdict(ALGORITHMS[config.algorithm])
    missing = {k: v for k, v in preset.items() if getattr(config, k) is None}
    config = dataclasses.replace(config, **missing)
    for name in POSITIVE:
        if not 0 < getattr(config, name) < math.inf:
            given = getattr(config, name)
            raise ValueError(f"`{name}` must be positive and finite, got {given}")
    rates = ("then_lr",) if config.then else ()
    for name in (*NOT_NEGATIVE, *rates):
        if not 0 <= getattr(config, name) < math.inf:
            given = getattr(config, name)
            raise ValueError(f"`{name}` must be finite and at least 0, got {given}")
    if config.groups * config.samples % config.minibatches:
        raise ValueError(
            f"`minibatches` must divide the {config.groups * config.samples} responses "
            f"of a step, got {config.minibatches}"
        )
    for name, low, high, why in LIMITS:
        if not low <= getattr(config, name) <= high:
            given = getattr(config, name)
            raise ValueError(f"`{name}` must be in [{low}, {high}], {why}; got {given}")
    if config.then_lr is not None and not config.then:
        raise ValueError("`then_lr` is the learning rate of `then`, which is missing")
    if config.resume and not config.out:
        raise ValueError("`resume` continues the run in the folder `out`: name it")
    if config.samples < 2:
        raise ValueError("`samples` must be at least 2: one response has no advantage")
    return config


def objective(config: Config) -> Objective:
    """Returns the objective of a resolved configuration."""
    fields = [field.name for field in dataclasses.fields(Objective)]
    values = {name: getattr(config, name) for name in fields}
    for name in ("token_level", "scale"):
        values[name] = bool(values[name])
    return Objective(**values)


def from_command_line(arguments: list[str] | None = None) -> Config:
    """Returns the configuration of the command line; exits if a flag is invalid."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.rl.train",
        description="Teaches word problems to a small GPT by reinforcement learning.",
    )
    optimizers = sorted(om.OPTIMIZERS)
    choices = {"optimizer": optimizers, "then": optimizers, "algorithm": ALGORITHMS}
    flags.add(parser, Config(), choices)
    config = Config(**vars(parser.parse_args(arguments)))
    try:
        return resolve(config)
    except ValueError as error:
        parser.error(str(error))
