"""One step, or one Hessian, seen closely."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_matrix as om

from .common import Choice, Widget, controls, results, rounded


def slopes() -> Widget:
    """The same slope in two valleys, and one step of the same length."""
    curvatures = (0.5, 4.0)
    start: Any = jnp.array(0.0)

    def found(rate):
        result = []
        for curvature in curvatures:

            def loss(x, curvature=curvature):
                return x + curvature * x**2 / 2

            sgd = optax.sgd(rate)
            updates, _ = sgd.update(jax.grad(loss)(start), sgd.init(start))
            end: Any = optax.apply_updates(start, updates)
            goal: Any = start + om.newton_step(loss, start)
            result.append(
                {
                    "end": rounded([end, loss(end)]),
                    "goal": rounded([goal, loss(goal)]),
                }
            )
        return result

    choices = {
        "rate": Choice("Learning rate", (0.1, 0.25, 0.4, 0.5, 0.8, 1.2, 2.0, 3.0), 4)
    }
    return {
        **{"name": "slopes", "title": "One slope, two curvatures", "kind": "slopes"},
        "series": [f"curvature {curvature}" for curvature in curvatures],
        **{"controls": controls(choices), "curvatures": curvatures},
        "values": results(choices, found),
    }


def hessian() -> Widget:
    """The level sets of a quadratic function of two numbers, by its Hessian."""

    def found(xx, yy, xy):
        def loss(w):
            return (xx * w[0] ** 2 + yy * w[1] ** 2) / 2 + xy * w[0] * w[1]

        zero = jnp.zeros(2)
        columns: Any = [om.hessian_vector_product(loss, zero, v) for v in jnp.eye(2)]
        values, vectors = jnp.linalg.eigh(jnp.stack(columns))
        return {"values": rounded(values), "vectors": rounded(vectors.T)}

    diagonal = (-1.0, 0.5, 1.0, 2.0, 4.0)
    choices = {
        "xx": Choice("H₁₁", diagonal, 3),
        "yy": Choice("H₂₂", diagonal, 2),
        "xy": Choice("H₁₂", (-2.0, -1.0, 0.0, 1.0, 2.0), 3),
    }
    return {
        **{"name": "hessian", "title": "A Hessian's level sets", "kind": "hessian"},
        **{"series": ["steepest", "flattest"], "controls": controls(choices)},
        "values": results(choices, found),
    }


def circle() -> Widget:
    """A step from a weight on a circle, and its retraction."""
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
        }

    choices = {
        "eta": Choice("Learning rate η", (0.1, 0.3, 0.6, 1.0), 1),
        "gamma": Choice("Radial part γ", gammas, 5),
    }
    return {
        **{"name": "circle", "title": "A step on the hyperball", "kind": "circle"},
        "series": ["step", "where it ends", "retraction"],
        **{"controls": controls(choices), "values": results(choices, found)},
    }
