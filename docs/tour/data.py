"""Computes the numbers of the tour's widgets, by Optax and this library.

python docs/tour/data.py

Each widget is a file in docs/tour/data. Controls are lists of values, and the file has
the result of every combination, so that no optimizer is written a second time in
JavaScript.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_matrix as om

FOLDER = Path(__file__).parent / "data"
Widget = dict[str, Any]


def control(name: str, label: str, values: Sequence[Any], value: int) -> Widget:
    """Returns a control that chooses one of some values, and where it begins."""
    texts = [str(each) for each in values]
    return {"name": name, "label": label, "texts": texts, "value": value}


def steps_control(most: int, value: int) -> Widget:
    """Returns the control of how many steps are shown."""
    return {"name": "step", "label": "Step", "max": most, "value": value, "step": True}


def combinations(*choices: Sequence[Any]) -> dict[str, tuple[Any, ...]]:
    """Returns all combinations of values, by the places of the values."""
    places = itertools.product(*(range(len(each)) for each in choices))
    return {
        ",".join(map(str, place)): tuple(
            values[i] for values, i in zip(choices, place, strict=True)
        )
        for place in places
    }


def rounded(values: Any, digits: int = 3) -> Any:
    """Returns nested lists of numbers with some significant digits."""
    if isinstance(values, float | int):
        return float(f"{values:.{digits}g}")
    return [rounded(value, digits) for value in np.asarray(values).tolist()]


# ------------------------------------------------------------------------ paths


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


# ------------------------------------------------------------------------- fit


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


# ---------------------------------------------------------------------- curves


def curves(
    name: str,
    title: str,
    controls: Sequence[Widget],
    values: dict[str, Any],
    *,
    series: Sequence[str],
    x: Sequence[float],
    between: tuple[float, float],
    ylabel: str,
    xlabel: str = "step",
    ylog: bool = False,
) -> Widget:
    """Returns a widget of curves."""
    return {
        **{"name": name, "title": title, "kind": "curves", "series": list(series)},
        **{"controls": list(controls), "x": list(x), "range": between},
        **{"xlabel": xlabel, "ylabel": ylabel, "ylog": ylog},
        "values": {key: rounded(found) for key, found in values.items()},
    }


def over(optimizer: optax.GradientTransformation, gradients: jax.Array, see: Callable):
    """Returns what is seen of (updates, state) in each step of a scalar's gradients."""

    def step(state, gradient):
        updates, state = optimizer.update(gradient, state)
        return state, see(updates, state)

    return jax.lax.scan(step, optimizer.init(jnp.float32(0)), gradients)[1]


def accumulators() -> Widget:
    decays, every = (0.9, 0.95, 0.99, 0.999, 0.9995), 4
    ones = jnp.ones(400)
    total = over(
        optax.scale_by_rss(initial_accumulator_value=0.0),
        ones,
        lambda _, state: state.sum_of_squares,
    )
    values = {
        key: [
            total[::every],
            over(optax.scale_by_rms(decay), ones, lambda _, state: state.nu)[::every],
        ]
        for key, (decay,) in combinations(decays).items()
    }
    return curves(
        "accumulators",
        "The accumulators of AdaGrad and RMSProp for a constant gradient of 1",
        [control("decay", "Decay β₂", decays, 2)],
        values,
        series=["AdaGrad", "RMSProp"],
        x=list(range(1, 401, every)),
        between=(1e-4, 1e3),
        ylabel="accumulator",
        ylog=True,
    )


def signal() -> Widget:
    b1s, b2s, sigmas, every = (
        (0.0, 0.5, 0.9, 0.99),
        (0.9, 0.99, 0.999),
        (0.3, 1.0, 3.0),
        5,
    )
    noise = jax.random.normal(jax.random.key(2), (300,))
    oscillating = jnp.where(jnp.arange(300) % 2 == 0, 1.0, -1.0)

    def ratios(b1, b2, sigma):
        adam = optax.scale_by_adam(b1, b2)
        streams = (jnp.full(300, 0.3), 0.3 + sigma * noise, oscillating)
        return [over(adam, stream, lambda u, _: u)[::every] for stream in streams]

    return curves(
        "signal",
        "Adam's update for three streams of gradients",
        [
            control("b1", "β₁", b1s, 2),
            control("b2", "β₂", b2s, 2),
            control("sigma", "Noise σ", sigmas, 1),
        ],
        {k: ratios(*values) for k, values in combinations(b1s, b2s, sigmas).items()},
        series=["0.3", "0.3 with noise", "±1"],
        x=list(range(1, 301, every)),
        between=(-3.5, 3.5),
        ylabel="update",
    )


def spectrum() -> Widget:
    """Singular values before and after polar methods."""
    skews = (0.0, 0.5, 1.0, 2.0, 3.0)
    methods = {
        "Newton-Schulz, 1 step": om.NewtonSchulz(1),
        **{f"Newton-Schulz, {k} steps": om.NewtonSchulz(k) for k in (2, 3, 4, 5)},
        "Polar Express, 5 steps": om.NewtonSchulz(coefficients="polar_express"),
        "Halley, bound 0.01": om.Halley(1e-2),
        "exact": om.Exact(),
    }
    index = jnp.arange(32)

    def found(skew, method):
        before = 10.0 ** (-skew * index / 31)
        before = before / jnp.linalg.norm(before)
        after = jnp.linalg.svd(method.polar(jnp.diag(before)), compute_uv=False)
        return [before, after]

    widget = curves(
        "spectrum",
        "Singular values of an update before and after orthogonalization",
        [
            control("skew", "Skew: decades of singular values", skews, 3),
            control("method", "Method", list(methods), 4),
        ],
        {
            key: found(skew, methods[name])
            for key, (skew, name) in combinations(skews, list(methods)).items()
        },
        series=["before", "after"],
        x=list(range(1, 33)),
        between=(1e-4, 2.0),
        xlabel="singular value, by size",
        ylabel="singular value",
        ylog=True,
    )
    return widget


# ------------------------------------------------------------------------ bars


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


SIZES = (0.01, 0.1, 1.0, 10.0, 100.0)


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


# ------------------------------------------------------------------- curvature


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
    rows = (plain, heavy, [newtons(ratio) for ratio in ratios])
    values = {
        str(i): [[int(found[i]) for found in row] for row in rows]
        for i in range(len(goals))
    }
    widget = curves(
        "condition",
        "Steps to a loss, each method with its best constants",
        [control("goal", "Loss to reach", goals, 1)],
        values,
        series=["gradient descent", "momentum", "Newton"],
        x=ratios,
        between=(0.8, 10_000.0),
        xlabel="largest curvature over the smallest",
        ylabel="steps",
        ylog=True,
    )
    return {**widget, "xlog": True}


# -------------------------------------------------------------------- matrices


def maps() -> Widget:
    """The update of one matrix by three optimizers."""
    skews, counts, size = (0.0, 1.0, 2.0), (1, 10, 50), 8
    keys = jax.random.split(jax.random.key(4), 3)
    left, right = (
        jnp.linalg.qr(jax.random.normal(k, (size, size)))[0] for k in keys[:2]
    )
    noise = jax.random.normal(keys[2], (max(counts), size, size))
    methods = {
        "gradient": optax.identity(),
        "AdamW": optax.scale_by_adam(0.9, 0.95),
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
            note = f"σ₁ / σ₈ = {ratio:.2g}" if ratio < 1e6 else "σ₈ ≈ 0"
            result.append({"entries": rounded(update["mlp"], 2), "note": note})
        return result

    return {
        **{"name": "maps", "title": "One update by four rules", "kind": "maps"},
        "series": list(methods),
        "controls": [
            control("skew", "Skew: decades of singular values", skews, 1),
            control("count", "Steps", counts, 1),
        ],
        "values": {
            key: found(*values) for key, values in combinations(skews, counts).items()
        },
    }


def memory() -> Widget:
    """How many associations a matrix has learned, the frequent ones first."""
    skews, steps, size = (0.0, 1.0, 2.0), 100, 32
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
        [control("skew", "Skew of frequencies", skews, 2)],
        {
            key: [best(make, skew) for make in makes.values()]
            for key, (skew,) in combinations(skews).items()
        },
        series=list(makes),
        x=list(range(steps)),
        between=(0.0, 1.0),
        ylabel="share of 32 associations that are recalled",
    )


# ------------------------------------------------------------------- hyperball


def circle() -> Widget:
    """A step from a weight on a circle, and its retraction."""
    etas = (0.1, 0.3, 0.6, 1.0)
    gammas = (-1.0, -0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    retract = om.hyperball_retract()
    weight = jnp.array([[1.0, 0.0]])

    def found(eta, gamma):
        step = eta * jnp.array([[gamma, (1 - gamma**2) ** 0.5]])
        updates, _ = retract.update(step, retract.init(weight), weight)
        end: Any = optax.apply_updates(weight, updates)[0]  # type: ignore
        return {
            "tip": rounded((weight + step)[0]),
            "end": rounded(end),
            "turn": rounded(float(jnp.arctan2(end[1], end[0]))),
            "asked": eta,
        }

    return {
        **{"name": "circle", "title": "A step on the hyperball", "kind": "circle"},
        "series": ["step", "where it ends", "retraction"],
        "controls": [
            control("eta", "Learning rate η", etas, 1),
            control("gamma", "Radial part γ", gammas, 5),
        ],
        "values": {
            key: found(*values) for key, values in combinations(etas, gammas).items()
        },
    }


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def squeeze() -> Widget:
    """The spectra of weights in training, from the runs of docs/convergence.md."""
    lines = (RESULTS / "convergence_dynamics.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    arms = {"adamw": "AdamW", "muonw": "MuonW", "muonh": "MuonH"}
    arms["spectral_sphere"] = "spectral sphere"
    measures = {"spectral entropy": "entropy", "participation ratio": "participation"}

    def mean(arm, measure):
        found = [run["points"] for run in runs if run["arm"] == arm]
        rows = [[point["weights"][measure] for point in points] for points in found]
        return np.mean(rows, axis=0)

    return curves(
        "squeeze",
        "Spectra of the weights of a small GPT, relative to orthogonal matrices",
        [control("measure", "Measure", list(measures), 1)],
        {
            key: [mean(arm, measures[name]) for arm in arms]
            for key, (name,) in combinations(list(measures)).items()
        },
        series=list(arms.values()),
        x=[point["step"] for point in runs[0]["points"]],
        between=(0.0, 1.0),
        ylabel="relative to an orthogonal matrix",
    )


# ------------------------------------------------------------------------ race


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


WIDGETS: dict[str, Callable[[], Widget]] = {
    make.__name__: make
    for make in (
        *(bowl, fit, valley, accumulators, adam, signal, decay, signs, lion, steps),
        *(newton, condition, spectrum, maps, memory, circle, squeeze, race),
    )
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, make in WIDGETS.items():
        text = json.dumps(make(), separators=(",", ":"), ensure_ascii=False)
        (FOLDER / f"{name}.json").write_text(text + "\n")
        print(f"{name}: {len(text)} bytes")


if __name__ == "__main__":
    main()
