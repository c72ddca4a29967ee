"""All rungs of the ladder on one problem."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_matrix as om

from .common import Choice, Widget
from .curves import curves

RUNGS = (
    *("sgd", "momentum", "adagrad", "rmsprop", "adam", "adamw", "sign_sgd", "lion"),
    *("muon", "shampoo", "soap", "muonh"),
)
# With Optax's defaults, AdamW's path is that of Adam, and AdaGrad's that of SGD.
SETTINGS = {
    "adamw": {"weight_decay": 0.1},
    "adagrad": {"initial_accumulator_value": 0.0},
}
STEPS, EVERY, SIZE = 120, 3, 24


@functools.partial(jax.jit, static_argnums=0)
def run(name: str, rate: float, seed: int) -> jax.Array:
    """Returns the losses of a rung on a linear network of two layers."""
    keys = jax.random.split(jax.random.key(10 + seed), 4)
    # A target with skewed singular values, seen through skewed data.
    scales = 10.0 ** (-1.5 * jnp.arange(SIZE) / (SIZE - 1))
    target = jnp.linalg.qr(jax.random.normal(keys[0], (SIZE, SIZE)))[0] * scales
    data = jax.random.normal(keys[1], (256, SIZE)) * scales**0.5
    params = {
        layer: {"kernel": jax.random.normal(key, (SIZE, SIZE)) / SIZE**0.5}
        for layer, key in zip(("first", "second"), keys[2:], strict=True)
    }
    schedule = optax.linear_schedule(rate, 0.0, STEPS)
    optimizer = om.make_optimizer(name, schedule, **SETTINGS.get(name, {}))

    def loss(params):
        outputs = data @ params["first"]["kernel"] @ params["second"]["kernel"]
        return jnp.mean((outputs - data @ target) ** 2)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (params, optimizer.init(params)), None, STEPS)[1]


def race() -> Widget:
    """Each rung at its best of twelve rates for seed 0."""
    seeds = (0, 1, 2)
    best = {}
    for name in RUNGS:
        every = [
            jnp.stack([run(name, 10.0**power, seed) for seed in seeds])
            for power in np.arange(-4.0, 2.0, 0.5)
        ]
        best[name] = min(
            every, key=lambda losses: np.nan_to_num(losses[0, -1], nan=np.inf)
        )
    widget = curves(
        "race",
        "The ladder on a linear network of two layers",
        {"seed": Choice("Seed", seeds, 0)},
        lambda seed: [best[name][seed, ::EVERY] for name in RUNGS],
        series=RUNGS,
        x=range(0, STEPS, EVERY),
        between=(1e-7, 1e1),
        ylabel="loss",
        ylog=True,
    )
    shown = [RUNGS.index(name) for name in ("sgd", "adam", "muon", "muonh")]
    rungs = {"name": "series", "label": "Optimizers", "many": True, "value": shown}
    return {**widget, "controls": [{**rungs, "texts": RUNGS}, *widget["controls"]]}
