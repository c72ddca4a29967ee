"""One step, seen closely."""

from typing import Any

import jax.numpy as jnp
import optax

import optax_matrix as om

from .common import Widget, combinations, control, rounded


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
