"""All rungs of the ladder on one problem."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_matrix as om

from .common import Widget, control
from .curves import curves


def race() -> Widget:
    """All rungs of the ladder on one problem, each at its best of twelve rates."""
    rungs = ("sgd", "momentum", "adagrad", "rmsprop", "adam", "sign_sgd", "lion")
    rungs += ("muon", "shampoo", "soap", "muonh")
    seeds, steps, size = (0, 1, 2), 120, 24

    def run(name, rate, seed):
        keys = jax.random.split(jax.random.key(10 + seed), 4)
        # Two layers and a target with skewed singular values, seen through skewed data.
        scales = 10.0 ** (-1.5 * jnp.arange(size) / (size - 1))
        turn = jnp.linalg.qr(jax.random.normal(keys[0], (size, size)))[0]
        target = turn * scales
        data = jax.random.normal(keys[1], (256, size)) * scales**0.5
        params = {
            "first": {"kernel": jax.random.normal(keys[2], (size, size)) / size**0.5},
            "second": {"kernel": jax.random.normal(keys[3], (size, size)) / size**0.5},
        }
        optimizer = om.make_optimizer(name, lambda count: rate * (1 - count / steps))

        def loss(params):
            gaps = data @ params["first"]["kernel"] @ params["second"]["kernel"]
            return jnp.mean((gaps - data @ target) ** 2)

        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), None, steps)[1]

    values = {}
    for place, name in enumerate(rungs):
        every = [
            jnp.stack([run(name, 10.0**power, seed) for seed in seeds])
            for power in np.arange(-4.0, 2.0, 0.5)
        ]
        # The best rate on seed 0 is that of the others too.
        best = min(every, key=lambda r: float(jnp.nan_to_num(r[0, -1], nan=jnp.inf)))
        for seed in seeds:
            losses = jnp.nan_to_num(best[seed], nan=1e3, posinf=1e3)[::3]
            values[f"{place},{seed}"] = losses
    widget = curves(
        "race",
        "Two rungs of the ladder on a linear network of two layers",
        [
            control("first", "First", rungs, 4),
            control("second", "Second", rungs, 7),
            control("seed", "Seed", seeds, 0),
        ],
        values,
        series=rungs,
        x=list(range(0, steps, 3)),
        between=(1e-7, 1e1),
        ylabel="loss",
        ylog=True,
    )
    return {**widget, "chosen": ["first", "second"]}
