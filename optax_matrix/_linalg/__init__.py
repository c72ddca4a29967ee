"""Polar factors, roots and eigenbases: pure functions on arrays (..., m, n)."""

from optax_matrix._linalg.coefficients import (
    TABLES,
    CoefficientTable,
    resolve,
)
from optax_matrix._linalg.eigenbases import eigenbasis, power_product, q_factor
from optax_matrix._linalg.exact import exact_polar
from optax_matrix._linalg.halley import (
    halley,
    halley_flops,
    halley_weights,
    spd_inverse,
)
from optax_matrix._linalg.newton_schulz import (
    block_gain,
    gram_factor,
    gram_is_cheaper,
    newton_schulz,
    newton_schulz_flops,
    restart_points,
)
from optax_matrix._linalg.numerics import at_least_float32
from optax_matrix._linalg.polar import (
    Exact,
    Halley,
    NewtonSchulz,
    PolarMethod,
    as_method,
)
from optax_matrix._linalg.roots import (
    Root,
    RootMethod,
    inverse_root_by_newton,
    power_by_eigh,
)

__all__ = [
    "TABLES",
    "CoefficientTable",
    "Exact",
    "Halley",
    "NewtonSchulz",
    "PolarMethod",
    "Root",
    "RootMethod",
    "as_method",
    "at_least_float32",
    "block_gain",
    "eigenbasis",
    "exact_polar",
    "gram_factor",
    "gram_is_cheaper",
    "halley",
    "halley_flops",
    "halley_weights",
    "inverse_root_by_newton",
    "newton_schulz",
    "newton_schulz_flops",
    "power_by_eigh",
    "power_product",
    "q_factor",
    "resolve",
    "restart_points",
    "spd_inverse",
]
