"""Orthogonalization as pure functions on arrays (..., m, n)."""

from optax_matrix._linalg.coefficients import (
    TABLES,
    CoefficientTable,
    resolve,
)
from optax_matrix._linalg.exact import exact_polar
from optax_matrix._linalg.halley import halley, halley_flops, halley_weights
from optax_matrix._linalg.newton_schulz import (
    block_gain,
    gram_factor,
    gram_is_cheaper,
    newton_schulz,
    newton_schulz_flops,
    restart_points,
)
from optax_matrix._linalg.numerics import Parts
from optax_matrix._linalg.polar import (
    Exact,
    Halley,
    NewtonSchulz,
    PartwiseMethod,
    PolarMethod,
    as_method,
)

__all__ = [
    "TABLES",
    "CoefficientTable",
    "Exact",
    "Halley",
    "NewtonSchulz",
    "Parts",
    "PartwiseMethod",
    "PolarMethod",
    "as_method",
    "block_gain",
    "exact_polar",
    "gram_factor",
    "gram_is_cheaper",
    "halley",
    "halley_flops",
    "halley_weights",
    "newton_schulz",
    "newton_schulz_flops",
    "resolve",
    "restart_points",
]
