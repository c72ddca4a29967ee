"""Scales learning rates from those of a small model, and checks activations."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

import optax_matrix as om
from benchmarks.convergence.arms import Arm, Stage, Values
from benchmarks.trial import Trial
from examples.nanogpt import model
from examples.nanogpt.configs import Config

BASE = {"width": 64, "layers": 1}
WIDTHS = (64, 128, 256, 512)
UPDATES = 10


def shapes(config: Config) -> nnx.State:
    """Returns the shapes of the parameters of a byte-level model."""
    sizes = (256, config.layers, config.width, config.head_dim)
    return nnx.state(nnx.eval_shape(lambda: model.GPT(*sizes, rngs=nnx.Rngs(0))))


def scaled(arm: Arm, unit: Any, *, over_depth: bool) -> Arm:
    """Returns an arm whose learning rates are scaled from those of the base model.

    Over width they are scaled leaf by leaf (μP), and over depth all alike (HyperP).
    """

    def make(values: Values, config: Config) -> Stage:
        base = dataclasses.replace(config, width=BASE["width"])
        depth = config.layers / BASE["layers"]
        deep = om.hyperp_factor(depth_ratio=depth) if over_depth else 1.0

        def at(factor: float) -> Stage:
            rate = values["learning_rate"] * factor * deep
            auxiliary = config.aux_lr * factor * deep
            return arm.make(
                {**values, "learning_rate": rate},
                dataclasses.replace(config, aux_lr=auxiliary),
            )

        factors = om.width_factors(shapes(config), shapes(base), unit)
        return om.with_learning_rate_factors(at, factors)

    return dataclasses.replace(arm, make=make)


def activations(trial: Trial) -> dict[str, jax.Array]:
    """Returns what each module passes on, for some windows of the validation text."""
    gpt, tokens = (
        nnx.merge(trial.graph, trial.state.params),
        trial.windows.val[0][:, :-1],
    )
    found = {"embedding": gpt.norm1(gpt.embed(tokens))}
    x = found["embedding"]
    for block in gpt.blocks:
        x = block(x)
    return {**found, "blocks": x, "head": gpt.head(gpt.norm2(x))}


def coordinates(arm: Arm, config: Config) -> dict[str, Any]:
    """Returns a coordinate check over widths, at a constant learning rate."""
    config = dataclasses.replace(config, cooldown=0.0)

    def run(width: int) -> Sequence[Any]:
        wide = dataclasses.replace(config, width=width)
        trial = Trial(wide, arm.make(arm.start, wide))
        steps = [activations(trial)]
        for _ in range(UPDATES):
            trial.advance(1)
            steps.append(activations(trial))
        return steps

    check = om.diagnostics.coordinate_check(run, WIDTHS)
    return {
        "changes": {name: x.tolist() for name, x in check.changes.items()},
        "exponents": {name: x.tolist() for name, x in check.exponents.items()},
    }
