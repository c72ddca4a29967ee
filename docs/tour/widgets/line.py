"""A line through points by SGD."""

import jax
import jax.numpy as jnp
import optax

from .common import Choice, Widget, controls, results, rounded, steps_control


def fit() -> Widget:
    """A line through 24 points by SGD with batches of different sizes."""
    steps, count = 40, 24
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.uniform(keys[0], (count,), minval=-3.0, maxval=3.0)
    x = jnp.round(x, 2)
    y = jnp.round(0.8 * x + 0.7 * jax.random.normal(keys[1], (count,)), 2)
    orders = jnp.stack(
        [jax.random.permutation(key, count) for key in jax.random.split(keys[2], steps)]
    )

    def loss(slope):
        return jnp.mean((slope * x - y) ** 2)

    def run(rate, size):
        optimizer = optax.sgd(rate)

        def step(carry, order):
            slope, state = carry
            here = order[:size]
            gradient = jnp.mean(2 * x[here] * (slope * x[here] - y[here]))
            updates, state = optimizer.update(gradient, state, slope)
            return (optax.apply_updates(slope, updates), state), (slope, loss(slope))

        slope = jnp.float32(-0.8)
        return rounded(jax.lax.scan(step, (slope, optimizer.init(slope)), orders)[1], 4)

    choices = {
        "rate": Choice("Learning rate", (0.005, 0.02, 0.05, 0.15), 2),
        "size": Choice("Batch size", (1, 4, 12, count), 0),
    }
    slopes = jnp.linspace(-1.2, 2.8, 81)
    best = jnp.sum(x * y) / jnp.sum(x**2)
    return {
        "kind": "fit",
        "name": "fit",
        "title": "Fitting a line by SGD",
        "series": [],
        "controls": [*controls(choices), steps_control(steps - 1, 20)],
        "xs": (-3.2, 3.2),
        "ys": (-4.5, 4.5),
        "slopes": (-1.2, 2.8),
        "losses": (0.0, 12.0),
        "sizes": choices["size"].values,
        "points": [x.tolist(), y.tolist()],
        "orders": orders.tolist(),
        "curve": [rounded(slopes), rounded(jax.vmap(loss)(slopes))],
        "best": rounded([best, loss(best)]),
        "runs": results(choices, run),
    }
