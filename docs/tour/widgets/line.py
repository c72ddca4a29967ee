"""A line through points."""

import jax
import jax.numpy as jnp
import optax

from .common import Widget, combinations, control, rounded, steps_control


def fit() -> Widget:
    """A line through 24 points by SGD with batches of different sizes."""
    rates, sizes, steps = (0.005, 0.02, 0.05, 0.15), (1, 4, 12, 24), 40
    keys = jax.random.split(jax.random.key(1), 3)
    x = jnp.round(jax.random.uniform(keys[0], (24,), minval=-3.0, maxval=3.0), 2)
    y = jnp.round(0.8 * x + 0.7 * jax.random.normal(keys[1], (24,)), 2)
    orders = jnp.stack(
        [jax.random.permutation(key, 24) for key in jax.random.split(keys[2], steps)]
    )

    def slopes(rate, size):
        optimizer = optax.sgd(rate)

        def step(carry, order):
            slope, state = carry
            here = order[:size]
            gradient = jnp.mean(2 * x[here] * (slope * x[here] - y[here]))
            updates, state = optimizer.update(gradient, state, slope)
            return (optax.apply_updates(slope, updates), state), slope

        slope = jnp.float32(-0.8)
        return jax.lax.scan(step, (slope, optimizer.init(slope)), orders)[1]

    return {
        **{"name": "fit", "title": "Fitting a line by SGD", "kind": "fit"},
        "controls": [
            control("rate", "Learning rate", rates, 2),
            control("size", "Batch size", sizes, 0),
            steps_control(steps - 1, 20),
        ],
        "sizes": sizes,
        "points": [x.tolist(), y.tolist()],
        "orders": orders.tolist(),
        "slopes": {
            key: rounded(slopes(*values), 4)
            for key, values in combinations(rates, sizes).items()
        },
    }
