"""Paths of optimizers over the level sets of a quadratic function."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_matrix as om

from .common import Widget, combinations, control, steps_control


def walk(
    optimizer: optax.GradientTransformation,
    start: Sequence[float],
    curvatures: Sequence[float],
    noise: jax.Array,
) -> jax.Array:
    """Returns the points of a run on ½ (a x² + b y²) with noisy gradients."""
    curvature, point = jnp.array(curvatures), jnp.array(start)

    def step(carry, kick):
        point, state = carry
        updates, state = optimizer.update(curvature * point + kick, state, point)
        return (optax.apply_updates(point, updates), state), point

    carry = (point, optimizer.init(point))
    return jax.lax.scan(step, carry, noise)[1]


def drawn(points: jax.Array, domain: Sequence[float]) -> list[list[int]]:
    """Returns x and y in hundredths, up to the first point outside of the picture."""
    x, y = np.asarray(points).T
    left, right, low, high = domain
    inside = (x > left) & (x < right) & (y > low) & (y < high)
    end = len(x) if inside.all() else int(np.argmin(inside)) + 1
    x, y = (np.nan_to_num(values, posinf=1e3, neginf=-1e3) for values in (x, y))
    return [[round(100 * float(v)) for v in values[:end]] for values in (x, y)]


def paths(
    name: str,
    title: str,
    controls: Sequence[Widget],
    runs: Mapping[str, Sequence[Any]],
    *,
    series: Sequence[str],
    domain: Sequence[float],
    curvatures: Sequence[float],
    levels: Sequence[float],
    steps: int,
    shown: int,
) -> Widget:
    """Returns a widget of paths over level sets."""
    return {
        **{"name": name, "title": title, "kind": "paths", "series": list(series)},
        "controls": [*controls, steps_control(steps - 1, shown)],
        "domain": list(domain),
        "curvatures": list(curvatures),
        "levels": list(levels),
        "paths": {
            k: [drawn(run, domain) for run in found] for k, found in runs.items()
        },
    }


def kicks(steps: int, scale: float) -> jax.Array:
    """Returns the noise of a run: the same for all widgets but for its scale."""
    return scale * jax.random.normal(jax.random.key(0), (200, 2))[:steps]


def bowl() -> Widget:
    rates, noises = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.05), (0.0, 0.3, 1.0, 2.0)
    curvatures, steps = (1.0, 1.0), 60
    runs = {
        key: [walk(optax.sgd(rate), (-2.5, 1.5), curvatures, kicks(steps, noise))]
        for key, (rate, noise) in combinations(rates, noises).items()
    }
    controls = [
        control("rate", "Learning rate", rates, 2),
        control("noise", "Noise", noises, 2),
    ]
    return paths(
        "bowl",
        "Stochastic gradient descent in a bowl",
        controls,
        runs,
        series=["SGD"],
        domain=(-4.0, 4.0, -2.5, 2.5),
        curvatures=curvatures,
        levels=(0.125, 0.5, 1.125, 2.0, 3.125, 4.5),
        steps=steps,
        shown=40,
    )


def valley() -> Widget:
    betas, rates, noises = (0.0, 0.5, 0.8, 0.9, 0.95), (0.3, 0.9, 1.5, 1.9), (0.0, 0.3)
    curvatures, steps, start = (0.03, 1.0), 80, (-9.0, 1.5)

    def run(noise, rate, beta=None):
        optimizer = optax.sgd(rate, momentum=beta)
        return walk(optimizer, start, curvatures, kicks(steps, noise))

    runs = {
        key: [run(noise, rate), run(noise, rate, beta)]
        for key, (beta, rate, noise) in combinations(betas, rates, noises).items()
    }
    controls = [
        control("beta", "Momentum β", betas, 1),
        control("rate", "Learning rate", rates, 3),
        control("noise", "Noise", noises, 0),
    ]
    return paths(
        "valley",
        "SGD and momentum in a valley",
        controls,
        runs,
        series=["SGD", "momentum"],
        domain=(-10.0, 5.0, -4.0, 4.0),
        curvatures=curvatures,
        levels=(0.05, 0.2, 0.5, 1.0, 2.0, 4.0),
        steps=steps,
        shown=40,
    )


def adam() -> Widget:
    rates, curvatures, steps, start = (0.02, 0.05, 0.08), (1.0, 50.0), 100, (-2.0, 0.5)
    quiet = kicks(steps, 0.0)
    runs = {
        key: [
            walk(optimizer, start, curvatures, quiet)
            for optimizer in (optax.sgd(rate, momentum=0.9), optax.adam(rate))
        ]
        for key, (rate,) in combinations(rates).items()
    }
    return paths(
        "adam",
        "Momentum and Adam in a steep valley",
        [control("rate", "Learning rate", rates, 1)],
        runs,
        series=["momentum", "Adam"],
        domain=(-2.4, 1.0, -0.9, 0.9),
        curvatures=curvatures,
        levels=(0.02, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0),
        steps=steps,
        shown=60,
    )


def signs() -> Widget:
    noises, rates = (0.0, 0.3, 0.6, 1.0, 1.5), (0.02, 0.05, 0.1)
    curvatures, steps, start = (1.0, 10.0), 100, (-2.0, 0.7)
    runs = {
        key: [
            walk(optimizer, start, curvatures, kicks(steps, noise))
            for optimizer in (optax.sign_sgd(rate), optax.adamw(rate, weight_decay=0.0))
        ]
        for key, (noise, rate) in combinations(noises, rates).items()
    }
    controls = [
        control("noise", "Noise", noises, 1),
        control("rate", "Learning rate", rates, 1),
    ]
    return paths(
        "signs",
        "SignSGD and AdamW",
        controls,
        runs,
        series=["SignSGD", "AdamW"],
        domain=(-2.4, 1.2, -1.1, 1.1),
        curvatures=curvatures,
        levels=(0.02, 0.1, 0.5, 1.0, 2.0, 4.0),
        steps=steps,
        shown=60,
    )


def lion() -> Widget:
    noises, betas = (0.0, 0.3, 1.0), (0.0, 0.5, 0.9, 0.98)
    curvatures, steps, start = (1.0, 10.0), 100, (-2.0, 0.7)
    runs = {
        key: [
            walk(optimizer, start, curvatures, kicks(steps, noise))
            for optimizer in (
                optax.lion(0.02, b1=beta, b2=0.99, weight_decay=0.0),
                optax.adamw(0.05, weight_decay=0.0),
            )
        ]
        for key, (noise, beta) in combinations(noises, betas).items()
    }
    controls = [
        control("noise", "Noise", noises, 1),
        control("beta", "Lion's β₁", betas, 2),
    ]
    return paths(
        "lion",
        "Lion and AdamW",
        controls,
        runs,
        series=["Lion", "AdamW"],
        domain=(-2.4, 1.2, -1.1, 1.1),
        curvatures=curvatures,
        levels=(0.02, 0.1, 0.5, 1.0, 2.0, 4.0),
        steps=steps,
        shown=80,
    )


def newton() -> Widget:
    """Gradient descent and damped Newton steps in a valley."""
    rates, dampings = (0.01, 0.03, 0.07), (0.0, 1.0, 10.0, 100.0)
    curvatures, steps, start = (1.0, 25.0), 40, (-2.0, 0.6)

    def loss(point):
        return jnp.sum(jnp.array(curvatures) * point**2) / 2

    def newtons(damping):
        def step(point, _):
            step: Any = om.newton_step(loss, point, damping=damping)
            return optax.apply_updates(point, step), point

        return jax.lax.scan(step, jnp.array(start), None, steps)[1]

    quiet = kicks(steps, 0.0)
    runs = {
        key: [walk(optax.sgd(rate), start, curvatures, quiet), newtons(damping)]
        for key, (rate, damping) in combinations(rates, dampings).items()
    }
    return paths(
        "newton",
        "Gradient descent and Newton's steps",
        [
            control("rate", "Learning rate of gradient descent", rates, 2),
            control("damping", "Damping of Newton", dampings, 1),
        ],
        runs,
        series=["gradient descent", "Newton"],
        domain=(-2.4, 1.0, -0.9, 0.9),
        curvatures=curvatures,
        levels=(0.02, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0),
        steps=steps,
        shown=15,
    )
