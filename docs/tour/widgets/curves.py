"""Curves over steps, and over condition numbers."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_matrix as om

from .common import Choice, Choices, Widget, controls, results, rounded
from .paths import walk

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def curves(
    name: str,
    title: str,
    choices: Choices,
    make: Callable[..., Any],
    *,
    series: Sequence[str],
    x: Sequence[float],
    between: tuple[float, float],
    ylabel: str,
    xlabel: str = "step",
    xlog: bool = False,
    ylog: bool = False,
    end: str = "At the end",
) -> Widget:
    """Returns a widget of curves.

    Args:
      name: Its name.
      title: Its title.
      choices: Its controls.
      make: Returns the values of all series, by the values of the controls.
      series: Their names.
      x: Where the values are.
      between: The range of the values.
      ylabel: What they are.
      xlabel: What x is.
      xlog: Whether its axis is logarithmic.
      ylog: Whether that of the values is.
      end: What the last values are, in a sentence.
    """
    return {
        "kind": "curves",
        "name": name,
        "title": title,
        "series": list(series),
        "controls": controls(choices),
        "x": list(x),
        "range": between,
        "xlabel": xlabel,
        "ylabel": ylabel,
        "xlog": xlog,
        "ylog": ylog,
        "end": end,
        "values": results(choices, lambda **values: rounded(make(**values))),
    }


def over(optimizer: optax.GradientTransformation, gradients: jax.Array, see: Callable):
    """Returns what is seen of (updates, state) in each step of a scalar's gradients."""

    def step(state, gradient):
        updates, state = optimizer.update(gradient, state)
        return state, see(updates, state)

    return jax.lax.scan(step, optimizer.init(jnp.float32(0)), gradients)[1]


def accumulators() -> Widget:
    steps, every = 400, 4
    ones = jnp.ones(steps)

    def found(decay):
        adagrad = optax.scale_by_rss(initial_accumulator_value=0.0)
        rmsprop = optax.scale_by_rms(decay)
        return [
            over(adagrad, ones, lambda _, state: state.sum_of_squares)[::every],
            over(rmsprop, ones, lambda _, state: state.nu)[::every],
        ]

    return curves(
        "accumulators",
        "The accumulators of AdaGrad and RMSProp for a constant gradient of 1",
        {"decay": Choice("Decay β₂", (0.9, 0.95, 0.99, 0.999, 0.9995, 1.0), 2)},
        found,
        series=["AdaGrad", "RMSProp"],
        x=range(1, steps + 1, every),
        between=(1e-4, 1e3),
        ylabel="accumulator",
        ylog=True,
    )


def signal() -> Widget:
    steps, every = 300, 5
    noise = jax.random.normal(jax.random.key(2), (steps,))
    oscillating = jnp.where(jnp.arange(steps) % 2 == 0, 1.0, -1.0)

    def updates(b1, b2, sigma):
        adam = optax.scale_by_adam(b1, b2)
        streams = (jnp.full(steps, 0.3), 0.3 + sigma * noise, oscillating)
        return [over(adam, stream, lambda u, _: u)[::every] for stream in streams]

    return curves(
        "signal",
        "Adam's update for three streams of gradients",
        {
            "b1": Choice("β₁", (0.0, 0.5, 0.9, 0.99), 2),
            "b2": Choice("β₂", (0.9, 0.99, 0.999), 2),
            "sigma": Choice("Noise σ", (0.3, 1.0, 3.0), 1),
        },
        updates,
        series=["0.3", "0.3 with noise", "±1"],
        x=range(1, steps + 1, every),
        between=(-3.5, 3.5),
        ylabel="update",
    )


def spectrum() -> Widget:
    """Singular values before and after polar methods."""
    size = 32
    methods = {
        "Newton-Schulz, 1 step": om.NewtonSchulz(1),
        **{f"Newton-Schulz, {k} steps": om.NewtonSchulz(k) for k in (2, 3, 4, 5)},
        "Polar Express, 8 steps": om.NewtonSchulz(coefficients="polar_express"),
        "Halley, bound 0.01": om.Halley(1e-2),
        "exact": om.Exact(),
    }

    def found(skew, method):
        before = 10.0 ** (-skew * jnp.arange(size) / (size - 1))
        before = before / jnp.linalg.norm(before)
        after = methods[method].polar(jnp.diag(before))
        return [before, jnp.linalg.svd(after, compute_uv=False)]

    return curves(
        "spectrum",
        "Singular values of an update before and after orthogonalization",
        {
            "skew": Choice(
                "Skew: decades of singular values", (0.0, 0.5, 1.0, 2.0, 3.0), 3
            ),
            "method": Choice("Method", list(methods), 4),
        },
        found,
        series=["before", "after"],
        x=range(1, size + 1),
        between=(1e-4, 2.0),
        xlabel="singular value, by size",
        ylabel="singular value",
        ylog=True,
        end="The smallest",
    )


def condition() -> Widget:
    """Steps to a loss, by the ratio of the curvatures."""
    goals, most = (1e-2, 1e-4, 1e-6), 4000
    ratios = [round(10.0 ** (i / 4), 2) for i in range(13)]

    def needed(optimizer, ratio):
        curvatures = (1.0, ratio)
        points = walk(optimizer, (1.0, 1.0 / ratio), curvatures, jnp.zeros((most, 2)))
        losses = jnp.sum(jnp.array(curvatures) * points**2, axis=1) / 2
        below = losses[None] < jnp.array(goals)[:, None]
        # The last time that it is above, because momentum oscillates.
        return most - jnp.argmax(jnp.cumsum(~below[:, ::-1], axis=1) > 0, axis=1)

    def newtons(ratio):
        def loss(point):
            return jnp.sum(jnp.array((1.0, ratio)) * point**2) / 2

        point: Any = jnp.array((1.0, 1.0 / ratio))
        count = 0
        while loss(point) >= min(goals):
            point = optax.apply_updates(point, om.newton_step(loss, point))
            count += 1
        return [count] * len(goals)

    plain, heavy = [], []
    for ratio in ratios:
        root = ratio**0.5
        plain.append(needed(optax.sgd(2 / (1 + ratio)), ratio))
        beta, rate = ((root - 1) / (root + 1)) ** 2, (2 / (1 + root)) ** 2
        heavy.append(needed(optax.sgd(rate, momentum=beta), ratio))
    counts = np.array([plain, heavy, [newtons(ratio) for ratio in ratios]])
    return curves(
        "condition",
        "Steps to a loss, each method with its best constants",
        {"goal": Choice("Loss to reach", goals, 1)},
        lambda goal: counts[..., goals.index(goal)],
        series=["gradient descent", "momentum", "Newton"],
        x=ratios,
        between=(0.8, 10_000.0),
        xlabel="largest curvature over the smallest",
        ylabel="steps",
        xlog=True,
        ylog=True,
        end="At a ratio of 1,000",
    )


def squeeze() -> Widget:
    """The spectra of weights in training, from the runs of docs/convergence.md."""
    lines = (RESULTS / "convergence_dynamics.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    arms = {"adamw": "AdamW", "muonw": "MuonW", "muonh": "MuonH"}
    arms["spectral_sphere"] = "spectral sphere"

    def mean(arm, measure):
        found = [run["points"] for run in runs if run["arm"] == arm]
        rows = [[point["weights"][measure] for point in points] for points in found]
        return np.mean(rows, axis=0)

    return curves(
        "squeeze",
        "Spectra of the weights of a small GPT, relative to orthogonal matrices",
        {
            "measure": Choice(
                "Measure",
                ("entropy", "participation"),
                1,
                ("spectral entropy", "participation ratio"),
            )
        },
        lambda measure: [mean(arm, measure) for arm in arms],
        series=list(arms.values()),
        x=[point["step"] for point in runs[0]["points"]],
        between=(0.0, 1.0),
        ylabel="relative to an orthogonal matrix",
    )
