"""Bars side by side."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_matrix as om

from .common import Choice, Choices, Widget, controls, results, rounded
from .curves import over


def bars(
    name: str,
    title: str,
    choices: Choices,
    make: Callable[..., Any],
    *,
    series: Sequence[str],
    labels: Sequence[str],
    between: tuple[float, float],
    xlabel: str,
    ylabel: str,
    ylog: bool = False,
) -> Widget:
    """Returns a widget of bars; arguments are as for `curves`, with a label a group."""
    return {
        "kind": "bars",
        "name": name,
        "title": title,
        "series": list(series),
        "controls": controls(choices),
        "labels": list(labels),
        "range": between,
        "xlabel": xlabel,
        "ylabel": ylabel,
        "ylog": ylog,
        "values": results(choices, lambda **values: rounded(make(**values))),
    }


def scenarios() -> Widget:
    """Adam's update for six kinds of gradients, and what it tends to."""
    count = 50_000
    noise = jax.random.normal(jax.random.key(6), (count // 2,))
    # Exactly of mean 0 and variance 1 in the half that counts.
    noise = jnp.tile((noise - jnp.mean(noise)) / jnp.std(noise), 2)
    flip = jnp.where(jnp.arange(count) % 2 == 0, 1.0, -1.0)
    streams = {  # and the signal over the root of the mean square
        "clean": (jnp.full(count, 0.3), 1.0),
        "noisy": (0.3 + noise, 0.3 / 1.09**0.5),
        "weak": (0.1 + noise, 0.1 / 1.01**0.5),
        "noise": (noise, 0.0),
        "flipping": (flip, 0.0),
        "loud": (jnp.full(count, 100.0), 1.0),
    }

    def statistics(beta):
        adam = optax.scale_by_adam(beta, beta)
        updates = jnp.stack(
            [over(adam, stream, lambda u, _: u) for stream, _ in streams.values()]
        )
        late = updates[:, count // 2 :]
        limits = [limit for _, limit in streams.values()]
        found = [limits, jnp.mean(late, axis=1), jnp.std(late, axis=1)]
        return jnp.round(jnp.array(found), 4)

    return bars(
        "scenarios",
        "Adam's update for six kinds of gradients",
        {"beta": Choice("β₁ = β₂", (0.9, 0.99, 0.999, 0.9999), 0)},
        statistics,
        series=["limit", "mean of updates", "their standard deviation"],
        labels=list(streams),
        between=(0.0, 1.1),
        xlabel="gradients",
        ylabel="update",
    )


def decay() -> Widget:
    """What is left of weights whose gradients alternate, with different sizes."""
    sizes = (0.01, 0.1, 1.0, 10.0, 100.0)
    gradients = jnp.array([1.0, -1.0] * 100)[:, None] * jnp.array(sizes)

    def left(optimizer):
        def step(carry, gradient):
            weights, state = carry
            updates, state = optimizer.update(gradient, state, weights)
            return (optax.apply_updates(weights, updates), state), None

        weights = jnp.ones(len(sizes))
        carry = (weights, optimizer.init(weights))
        return jax.lax.scan(step, carry, gradients)[0][0]

    return bars(
        "decay",
        "What is left of a weight of 1 after 200 steps",
        {
            "decay": Choice("Weight decay", (0.01, 0.03, 0.1, 0.3), 2),
            "rate": Choice("Learning rate", (0.003, 0.01, 0.03), 1),
        },
        lambda decay, rate: [
            left(om.make_optimizer(name, rate, weight_decay=decay))
            for name in ("adam_l2", "adamw")
        ],
        series=["Adam + L2", "AdamW"],
        labels=[str(size) for size in sizes],
        between=(0.0, 1.2),
        xlabel="size of the gradients, which alternate in sign",
        ylabel="weight",
    )


def steps() -> Widget:
    """How far one step of learning rate 1 goes for gradients of different sizes."""
    noise = jax.random.normal(jax.random.key(3), (500,))
    optimizers = {
        "SGD": optax.identity(),
        "momentum": optax.trace(0.9),
        "Adam": optax.scale_by_adam(),
        "Lion": optax.scale_by_lion(),
    }

    def lengths(ratio, noisy):
        def length(optimizer, size):
            gradients = size * (1 + noisy * noise)
            found = over(optimizer, gradients, lambda u, _: jnp.abs(u))
            return jnp.mean(found[-200:])

        sizes = [ratio ** (place / 4) for place in range(-2, 3)]
        return [[length(tx, size) for size in sizes] for tx in optimizers.values()]

    return bars(
        "steps",
        "The mean length of a step for five sizes of gradients",
        {
            "ratio": Choice(
                "Largest size over smallest",
                (1.0, 1e2, 1e4, 1e6),
                2,
                ("1", "100", "10⁴", "10⁶"),
            ),
            "noisy": Choice("Noise, in sizes of the gradient", (0.0, 1.0, 3.0), 0),
        },
        lengths,
        series=list(optimizers),
        labels=["smallest", "small", "middle", "large", "largest"],
        between=(1e-4, 1e5),
        xlabel="size of the gradient; the middle one is 1",
        ylabel="length of a step, learning rate 1",
        ylog=True,
    )
