"""Orthogonalization as pure functions on arrays (..., m, n)."""

from optax_matrix._linalg.coefficients import (
    TABLES,
    CoefficientTable,
    resolve,
)
from optax_matrix._linalg.exact import exact_polar
from optax_matrix._linalg.halley import halley, halley_weights
from optax_matrix._linalg.newton_schulz import (
    gram_factor,
    gram_is_cheaper,
    newton_schulz,
    newton_schulz_flops,
    restart_points,
)
from optax_matrix._linalg.polar import (
    Exact,
    Halley,
    NewtonSchulz,
    PolarMethod,
    as_method,
)

__all__ = [
    "TABLES",
    "CoefficientTable",
    "Exact",
    "Halley",
    "NewtonSchulz",
    "PolarMethod",
    "as_method",
    "exact_polar",
    "gram_factor",
    "gram_is_cheaper",
    "halley",
    "halley_weights",
    "newton_schulz",
    "newton_schulz_flops",
    "resolve",
    "restart_points",
]
