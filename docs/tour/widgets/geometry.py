"""One step, or one Hessian, seen closely."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_matrix as om

from .common import Choice, Widget, controls, results, rounded


def slopes() -> Widget:
    """The same slope in two valleys, and one step of the same length."""
    curvatures = (0.5, 4.0)
    start: Any = jnp.array(0.0)
    xs, ys = (-3.2, 0.6), (-1.2, 2.2)
    points = np.linspace(*xs, 77)

    def valley(curvature):
        return lambda w: w + curvature * w**2 / 2

    def step(rate):
        ends = []
        for loss in map(valley, curvatures):
            sgd = optax.sgd(rate)
            updates, _ = sgd.update(jax.grad(loss)(start), sgd.init(start))
            end: Any = optax.apply_updates(start, updates)
            goal: Any = start + om.newton_step(loss, start)
            places = {"end": end, "goal": goal}
            ends.append({k: rounded([w, loss(w)]) for k, w in places.items()})
        return ends

    rates = (0.1, 0.25, 0.4, 0.5, 0.8, 1.2, 2.0, 3.0)
    choices = {"rate": Choice("Learning rate", rates, 4)}
    return {
        "kind": "slopes",
        "name": "slopes",
        "title": "One slope, two curvatures",
        "series": [f"curvature {curvature}" for curvature in curvatures],
        "controls": controls(choices),
        "xs": xs,
        "ys": ys,
        "xlabel": "w",
        "ylabel": "loss",
        "points": rounded(points),
        "curves": [rounded(valley(curvature)(points)) for curvature in curvatures],
        "values": results(choices, step),
    }


def hessian() -> Widget:
    """The level sets of a quadratic function of two numbers, by its Hessian."""

    def axes(xx, yy, xy):
        def loss(w):
            return (xx * w[0] ** 2 + yy * w[1] ** 2) / 2 + xy * w[0] * w[1]

        zero = jnp.zeros(2)
        columns: Any = [om.hessian_vector_product(loss, zero, v) for v in jnp.eye(2)]
        values, vectors = jnp.linalg.eigh(jnp.stack(columns))
        return {
            "values": rounded(jnp.round(values, 5)),
            "vectors": rounded(vectors.T),
        }

    diagonal = (-1.0, 0.5, 1.0, 2.0, 4.0)
    choices = {
        "xx": Choice("H₁₁", diagonal, 3),
        "yy": Choice("H₂₂", diagonal, 2),
        "xy": Choice("H₁₂", (-2.0, -1.0, 0.0, 1.0, 2.0), 3),
    }
    return {
        "kind": "hessian",
        "name": "hessian",
        "title": "A Hessian's level sets",
        "series": ["steepest", "flattest"],
        "controls": controls(choices),
        "xs": (-2.0, 2.0),
        "ys": (-2.0, 2.0),
        "levels": (0.125, 0.5, 1.0, 2.0, 4.0, 8.0),
        "values": results(choices, axes),
    }


def circle() -> Widget:
    """A step from a weight on a circle, and its retraction."""
    retract = om.hyperball_retract()
    weight = jnp.array([[1.0, 0.0]])

    def step(eta, gamma):
        update = eta * jnp.array([[gamma, (1 - gamma**2) ** 0.5]])
        updates, _ = retract.update(update, retract.init(weight), weight)
        end: Any = optax.apply_updates(weight, updates)[0]  # type: ignore
        return {
            "tip": rounded((weight + update)[0]),
            "end": rounded(end),
            "turn": rounded(float(jnp.arctan2(end[1], end[0]))),
        }

    gammas = (-1.0, -0.6, -0.3, -0.1, 0.0, 0.1, 0.3, 0.6, 1.0)
    choices = {
        "eta": Choice("Learning rate η", (0.1, 0.3, 0.6, 1.0), 1),
        "gamma": Choice("Radial part γ", gammas, 4),
    }
    return {
        "kind": "circle",
        "name": "circle",
        "title": "A step on the hyperball",
        "series": ["step", "where it ends", "retraction"],
        "controls": controls(choices),
        "xs": (-0.7, 2.3),
        "ys": (-1.5, 1.5),
        "values": results(choices, step),
    }
