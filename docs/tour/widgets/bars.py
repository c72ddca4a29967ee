"""Bars side by side."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_matrix as om

from .common import Widget, combinations, control, rounded
from .curves import over

SIZES = (0.01, 0.1, 1.0, 10.0, 100.0)


def bars(
    name: str,
    title: str,
    controls: Sequence[Widget],
    values: dict[str, Any],
    *,
    series: Sequence[str],
    labels: Sequence[str],
    between: tuple[float, float],
    xlabel: str,
    ylabel: str,
    ylog: bool = False,
) -> Widget:
    """Returns a widget of bars."""
    return {
        **{"name": name, "title": title, "kind": "bars", "series": list(series)},
        **{"controls": list(controls), "labels": list(labels), "range": between},
        **{"xlabel": xlabel, "ylabel": ylabel, "ylog": ylog},
        "values": {key: rounded(found) for key, found in values.items()},
    }


def decay() -> Widget:
    """What is left of weights whose gradients alternate, with different sizes."""
    decays, rates = (0.01, 0.03, 0.1, 0.3), (0.003, 0.01, 0.03)
    noise = jnp.array(SIZES)[:, None] * jnp.array([1.0, -1.0] * 100)

    def left(optimizer):
        def step(carry, gradient):
            weights, state = carry
            updates, state = optimizer.update(gradient, state, weights)
            return (optax.apply_updates(weights, updates), state), None

        weights = jnp.ones(len(SIZES))
        carry = (weights, optimizer.init(weights))
        return jax.lax.scan(step, carry, noise.T)[0][0]

    values = {
        key: [
            left(om.make_optimizer(name, rate, weight_decay=strength))
            for name in ("adam_l2", "adamw")
        ]
        for key, (strength, rate) in combinations(decays, rates).items()
    }
    return bars(
        "decay",
        "What is left of a weight of 1 after 200 steps",
        [
            control("decay", "Weight decay", decays, 2),
            control("rate", "Learning rate", rates, 1),
        ],
        values,
        series=["Adam + L2", "AdamW"],
        labels=[str(size) for size in SIZES],
        between=(0.0, 1.2),
        xlabel="size of the gradients, which alternate in sign",
        ylabel="weight",
    )


def steps() -> Widget:
    """How far one step of learning rate 1 goes for gradients of different sizes."""
    noises = (0.0, 1.0, 3.0)
    noise = jax.random.normal(jax.random.key(3), (500,))

    def length(optimizer, size, ratio):
        found = over(optimizer, size * (1 + ratio * noise), lambda u, _: jnp.abs(u))
        return jnp.mean(found[-200:])

    optimizers = {
        "SGD": optax.identity(),
        "Adam": optax.scale_by_adam(),
        "SignSGD": om.scale_by_sign(),
    }
    values = {
        key: [[length(tx, s, ratio) for s in SIZES] for tx in optimizers.values()]
        for key, (ratio,) in combinations(noises).items()
    }
    return bars(
        "steps",
        "The mean length of a step for five sizes of gradients",
        [control("noise", "Noise, in sizes of the gradient", noises, 0)],
        values,
        series=list(optimizers),
        labels=[str(size) for size in SIZES],
        between=(1e-3, 1e3),
        xlabel="size of the gradient",
        ylabel="length of a step, learning rate 1",
        ylog=True,
    )
