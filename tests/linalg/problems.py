"""Inputs shared by the tests of the polar methods."""

from functools import partial

import jax
import numpy as np

from optax_matrix import _linalg
from optax_matrix._linalg import MUD, Exact, Halley, NewtonSchulz, Zolotarev
from tests.references import polar as reference

# Unequal sides, so that a swapped axis cannot pass; one row; one column; stacks.
SHAPES = [(4, 9), (9, 4), (5, 5), (1, 7), (7, 1), (2, 1, 4, 9)]

# One of each kind, none at its default where that would hide an argument.
METHODS = [
    NewtonSchulz(),
    NewtonSchulz(method="gram"),
    NewtonSchulz(coefficients="polar_express", normalization="schatten4"),
    NewtonSchulz(coefficients="aol"),
    Halley(lower_bound=1e-2, steps=2),
    Halley(lower_bound=1e-2, polish=1),
    Zolotarev(),
    MUD(passes=2),
    Exact(),
    Exact(method="eigh"),
]

# AOL and MUD rescale single inputs or outputs, so they keep no rotation.
ROTATABLE = [m for m in METHODS if m.transposable]


def spectrum(kind, k):
    """The k singular values of a named kind, the largest 1."""
    if kind == "rank-deficient":
        return np.where(np.arange(k) < (k + 1) // 2, 1.0, 0.0)
    return np.geomspace(1.0, 1.0 / float(kind), k)


def gaussian(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def matrix(m, n, kind, seed=0):
    rng = np.random.default_rng(seed)
    return reference.with_spectrum(rng, m, n, spectrum(kind, min(m, n)))


@partial(jax.jit, static_argnums=0)
def run(method, x):
    """`method.polar(x)`, compiled once for each method, shape and type."""
    return method.polar(x)


def power_step(a, q, sort=True):
    """A step of orthogonal iteration, and the positions that columns had in `q`."""
    product, order = _linalg.power_product(a, q, sort)
    return _linalg.q_factor(product), order
