"""Paths of optimizers over the level sets of a quadratic function."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_matrix as om

from .common import Choice, Choices, Widget, controls, results, rounded, steps_control

Pair = tuple[float, float]
# A series is a function, and the controls that are its arguments.
Series = tuple[tuple[str, ...], Callable[..., jax.Array]]


def kicks(steps: int, scale: float = 0.0) -> jax.Array:
    """Returns the noise of a run: the same for all widgets but for its scale."""
    return scale * jax.random.normal(jax.random.key(0), (200, 2))[:steps]


def walk(
    optimizer: optax.GradientTransformation,
    start: Pair,
    curvatures: Pair,
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


def drawn(
    points: jax.Array, curvatures: Pair, xs: Pair, ys: Pair
) -> tuple[list[int], list[int], list[float | None]]:
    """Returns x and y in hundredths, and losses, up to the first point outside.

    The loss of that point is None.
    """
    x, y = np.asarray(points, np.float64).T
    inside = (x > xs[0]) & (x < xs[1]) & (y > ys[0]) & (y < ys[1])
    end = len(x) if inside.all() else int(np.argmin(inside)) + 1
    losses = (curvatures[0] * x**2 + curvatures[1] * y**2) / 2
    x, y = (
        [round(100 * v) for v in np.nan_to_num(each, posinf=1e3, neginf=-1e3).tolist()]
        for each in (x, y)
    )
    seen = rounded(np.where(inside, losses, np.nan), 2)
    return x[:end], y[:end], seen[:end]


def paths(
    name: str,
    title: str,
    choices: Choices,
    series: Mapping[str, Series],
    *,
    xs: Pair,
    ys: Pair,
    curvatures: Sequence[Pair],
    levels: Sequence[float],
    steps: int,
    shown: int,
    **more: Any,
) -> Widget:
    """Returns a widget of paths over level sets.

    Args:
      name: Its name.
      title: Its title.
      choices: Its controls. The one named `curvature` chooses the level sets.
      series: What is drawn, by name.
      xs: The left and the right end of the picture.
      ys: The lower and the upper end.
      curvatures: Those of the level sets, one pair for each value of `curvature`.
      levels: The values on the level sets.
      steps: The length of the paths.
      shown: How much of them is shown first.
      **more: More fields of the data.
    """

    def every(by: Sequence[str], run: Callable[..., jax.Array]) -> dict[str, Any]:
        def path(**values):
            pair = (curvatures[0][0], values.get("curvature", curvatures[0][1]))
            return drawn(run(**values), pair, xs, ys)

        return results(choices, path, by)

    return {
        "kind": "paths",
        "name": name,
        "title": title,
        "series": list(series),
        "controls": [*controls(choices), steps_control(steps - 1, shown)],
        "xs": xs,
        "ys": ys,
        "curvatures": curvatures,
        "levels": levels,
        "by": [by for by, _ in series.values()],
        "paths": [every(by, run) for by, run in series.values()],
        **more,
    }


def bowl() -> Widget:
    steps, curvatures = 60, (1.0, 1.0)

    def sgd(rate, noise):
        return walk(optax.sgd(rate), (-2.5, 1.5), curvatures, kicks(steps, noise))

    return paths(
        "bowl",
        "Stochastic gradient descent in a bowl",
        {
            "rate": Choice(
                "Learning rate", (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.05), 2
            ),
            "noise": Choice("Noise", (0.0, 0.3, 1.0, 2.0), 2),
        },
        {"SGD": (("rate", "noise"), sgd)},
        xs=(-4.0, 4.0),
        ys=(-2.5, 2.5),
        curvatures=[curvatures],
        levels=(0.125, 0.5, 1.125, 2.0, 3.125, 4.5),
        steps=steps,
        shown=40,
    )


def valley() -> Widget:
    steps, curvatures, start = 80, (0.03, 1.0), (-9.0, 1.5)

    def run(rate, noise, beta=None):
        optimizer = optax.sgd(rate, momentum=beta)
        return walk(optimizer, start, curvatures, kicks(steps, noise))

    return paths(
        "valley",
        "SGD and momentum in a valley",
        {
            "beta": Choice("Momentum β", (0.0, 0.5, 0.8, 0.9, 0.95), 1),
            "rate": Choice("Learning rate", (0.3, 0.9, 1.5, 1.9), 3),
            "noise": Choice("Noise", (0.0, 0.3), 0),
        },
        {
            "SGD": (("rate", "noise"), run),
            "momentum": (("beta", "rate", "noise"), run),
        },
        xs=(-10.0, 5.0),
        ys=(-4.0, 4.0),
        curvatures=[curvatures],
        levels=(0.05, 0.2, 0.5, 1.0, 2.0, 4.0),
        steps=steps,
        shown=40,
    )


def adam() -> Widget:
    steps, curvatures = 100, (1.0, 50.0)

    def run(make):
        def found(rate):
            return walk(make(rate), (-2.0, 0.5), curvatures, kicks(steps))

        return ("rate",), found

    return paths(
        "adam",
        "Momentum and Adam in a steep valley",
        {"rate": Choice("Learning rate", (0.02, 0.05, 0.08), 1)},
        {
            "momentum": run(lambda rate: optax.sgd(rate, momentum=0.9)),
            "Adam": run(optax.adam),
        },
        xs=(-2.4, 1.0),
        ys=(-0.9, 0.9),
        curvatures=[curvatures],
        levels=(0.02, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0),
        steps=steps,
        shown=60,
    )


def _noisy(
    name: str,
    title: str,
    choices: Choices,
    series: Mapping[str, tuple[tuple[str, ...], Callable[..., Any]]],
    shown: int,
) -> Widget:
    """Returns a widget of optimizers, made from controls, in a valley with noise."""
    steps, curvatures = 100, (1.0, 10.0)

    def run(by, make):
        def found(noise, **values):
            optimizer = make(**values)
            return walk(optimizer, (-2.02, 0.72), curvatures, kicks(steps, noise))

        return ("noise", *by), found

    return paths(
        name,
        title,
        choices,
        {each: run(by, make) for each, (by, make) in series.items()},
        xs=(-2.4, 1.2),
        ys=(-1.1, 1.1),
        curvatures=[curvatures],
        levels=(0.02, 0.1, 0.5, 1.0, 2.0, 4.0),
        steps=steps,
        shown=shown,
    )


def signs() -> Widget:
    return _noisy(
        "signs",
        "SignSGD and Adam",
        {
            "noise": Choice("Noise", (0.0, 0.3, 0.6, 1.0, 1.5), 1),
            "rate": Choice("Learning rate", (0.02, 0.05, 0.1), 1),
        },
        {
            "SignSGD": (("rate",), lambda rate: optax.sign_sgd(rate)),
            "Adam": (("rate",), lambda rate: optax.adam(rate)),
        },
        shown=60,
    )


def lion() -> Widget:
    return _noisy(
        "lion",
        "Lion and Adam",
        {
            "noise": Choice("Noise", (0.0, 0.3, 1.0), 1),
            "beta": Choice("Lion's β₁", (0.0, 0.5, 0.9, 0.98), 2),
        },
        {
            "Lion": (("beta",), lambda beta: optax.lion(0.02, beta, weight_decay=0.0)),
            "Adam": ((), lambda: optax.adam(0.05)),
        },
        shown=80,
    )


def newton() -> Widget:
    """Gradient descent and damped Newton steps in valleys."""
    steps, starts = 30, [(x, y) for y in (-0.6, 0.2, 0.6) for x in (-2.0, -1.0, 0.6)]

    @jax.jit
    def descent(rate, curvature, start):
        return walk(optax.sgd(rate), start, (1.0, curvature), kicks(steps))

    @jax.jit
    def newtons(damping, curvature, start):
        def loss(point):
            return jnp.sum(jnp.array((1.0, curvature)) * point**2) / 2

        def step(point, _):
            update: Any = om.newton_step(loss, point, damping=damping)
            return optax.apply_updates(point, update), point

        return jax.lax.scan(step, jnp.array(start), None, steps)[1]

    curvatures = (1.0, 5.0, 25.0)
    return paths(
        "newton",
        "Gradient descent and Newton's steps",
        {
            "rate": Choice("Learning rate of gradient descent", (0.01, 0.03, 0.07), 2),
            "damping": Choice("Damping of Newton", (0.0, 1.0, 10.0, 100.0), 1),
            "curvature": Choice("Curvature across", curvatures, 2),
            "start": Choice("Start", starts, 6, [f"({x}, {y})" for x, y in starts]),
        },
        {
            "gradient descent": (("rate", "curvature", "start"), descent),
            "Newton": (("damping", "curvature", "start"), newtons),
        },
        xs=(-2.4, 1.0),
        ys=(-0.9, 0.9),
        curvatures=[(1.0, curvature) for curvature in curvatures],
        levels=(0.02, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0),
        steps=steps,
        shown=15,
        starts=starts,
    )
