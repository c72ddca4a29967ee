"""Matrices: their updates, and what one can store."""

import jax
import jax.numpy as jnp
import optax

import optax_matrix as om

from .common import Choice, Widget, controls, results, rounded
from .curves import curves


def maps() -> Widget:
    """The update of one matrix by four rules."""
    counts, size = (1, 10, 50), 8
    keys = jax.random.split(jax.random.key(4), 3)
    left, right = (
        jnp.linalg.qr(jax.random.normal(k, (size, size)))[0] for k in keys[:2]
    )
    noise = jax.random.normal(keys[2], (max(counts), size, size))
    methods = {
        "gradient": optax.identity(),
        "Adam": optax.scale_by_adam(0.9, 0.95),
        "Muon": optax.chain(om.ema_momentum(0.9), om.orthogonalize("newton_schulz")),
        "Shampoo": om.shampoo_precondition(0.9, refresh=1),
    }

    def found(skew, count):
        signal = (left * 10.0 ** (-skew * jnp.arange(size) / (size - 1))) @ right.T
        result = []
        for optimizer in methods.values():
            weights = {"mlp": jnp.ones((size, size))}
            state = optimizer.init(weights)
            update = weights
            for kick in noise[:count]:
                gradient = {"mlp": signal + 0.02 * kick}
                update, state = optimizer.update(gradient, state, weights)
            sigmas = om.diagnostics.singular_values(update["mlp"])[0]
            ratio = float(sigmas[0] / sigmas[-1])
            digits = f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}"
            note = f"σ₁ / σ₈ = {digits}" if ratio < 1e6 else "σ₈ ≈ 0"
            result.append({"entries": rounded(update["mlp"], 2), "note": note})
        return result

    choices = {
        "skew": Choice("Skew: decades of singular values", (0.0, 1.0, 2.0), 1),
        "count": Choice("Steps", counts, 1),
    }
    return {
        "kind": "maps",
        "name": "maps",
        "title": "One update by four rules",
        "series": list(methods),
        "controls": controls(choices),
        "values": results(choices, found),
    }


def memory() -> Widget:
    """How many associations a matrix has learned, the frequent ones first."""
    steps, size = 100, 32
    keys = jax.random.split(jax.random.key(5), 2)
    inputs, outputs = (
        x / jnp.linalg.norm(x, axis=1, keepdims=True)
        for x in (jax.random.normal(key, (size, size)) for key in keys)
    )
    makes = {
        "SGD": optax.sgd,
        "Adam": lambda rate: optax.adam(rate, b2=0.95),
        "Muon": lambda rate: optax.chain(
            om.ema_momentum(0.9),
            om.orthogonalize("newton_schulz"),
            optax.scale_by_learning_rate(rate),
        ),
    }
    rates = [10.0 ** (k / 2) for k in range(-8, 5)]

    def run(make, rate, skew):
        weight = 1.0 / jnp.arange(1, size + 1) ** skew
        weight = weight / weight.sum()
        optimizer = make(rate)

        def loss(matrix):
            gaps = inputs @ matrix - outputs
            return jnp.sum(weight[:, None] * gaps**2)

        def step(carry, _):
            matrix, state = carry
            recalled = jnp.argmax(inputs @ matrix @ outputs.T, axis=1)
            share = jnp.mean(recalled == jnp.arange(size))
            updates, state = optimizer.update(jax.grad(loss)(matrix), state, matrix)
            return (optax.apply_updates(matrix, updates), state), share

        matrix = jnp.zeros((size, size))
        return jax.lax.scan(step, (matrix, optimizer.init(matrix)), None, steps)[1]

    def best(make, skew):
        """The run of the rate with the highest mean over the steps."""
        return max(
            (run(make, rate, skew) for rate in rates), key=lambda r: float(r.mean())
        )

    return curves(
        "memory",
        "Associations that a matrix recalls, each optimizer at its best of 13 rates",
        {"skew": Choice("Skew of frequencies", (0.0, 1.0, 2.0), 2)},
        lambda skew: [best(make, skew) for make in makes.values()],
        series=list(makes),
        x=range(steps),
        between=(0.0, 1.0),
        ylabel="share of 32 associations that are recalled",
    )
