"""Scales learning rates from those of a small model, and checks activations."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


def step_sizes(before: nnx.State, after: nnx.State) -> dict[str, float]:
    r"""Returns geometric means over the matrices of the blocks, of the last step.

    ``spectral`` is the spectral norm over :math:`\sqrt{n/m}`, for m inputs and n
    outputs; ``stable_rank`` is the squared ratio of the Frobenius to that norm.
    """
    found = []
    pairs = zip(*(jax.tree.leaves(x["blocks"]) for x in (before, after)), strict=True)
    for old, new in pairs:
        if new.ndim == 2:
            sigma = np.linalg.svd(np.asarray(new - old, np.float64), compute_uv=False)
            m, n = new.shape
            rank = np.sum(sigma**2) / sigma[0] ** 2
            found.append((sigma[0] / np.sqrt(n / m), rank))
    spectral, rank = np.exp(np.mean(np.log(found), axis=0)).tolist()
    return {"spectral": spectral, "stable_rank": rank}


def coordinates(arm: Arm, config: Config) -> dict[str, Any]:
    """Returns a coordinate check over widths, at a constant learning rate.

    With it are the sizes of the last step of each width, see `step_sizes`.
    """
    config = dataclasses.replace(config, cooldown=0.0)
    sizes: list[dict[str, float]] = []

    def run(width: int) -> Sequence[Any]:
        wide = dataclasses.replace(config, width=width)
        trial = Trial(wide, arm.make(arm.start, wide))
        steps, before = [activations(trial)], []
        for _ in range(UPDATES):
            # Copies, because the step donates its arguments.
            before.append(jax.tree.map(jnp.copy, trial.state.params))
            trial.advance(1)
            steps.append(activations(trial))
        sizes.append(step_sizes(before[-1], trial.state.params))
        return steps

    check = om.diagnostics.coordinate_check(run, WIDTHS)
    return {
        "changes": {name: x.tolist() for name, x in check.changes.items()},
        "exponents": {name: x.tolist() for name, x in check.exponents.items()},
        "steps": {name: [size[name] for size in sizes] for name in sizes[0]},
    }
