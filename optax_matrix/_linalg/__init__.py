"""Polar factors, roots and eigenbases: pure functions on arrays (..., m, n)."""

from optax_matrix._linalg.balanced import Balanced
from optax_matrix._linalg.coefficients import (
    TABLES,
    CoefficientTable,
    resolve,
)
from optax_matrix._linalg.eigenbases import (
    eigenbasis,
    positive_q_factor,
    power_product,
    q_factor,
)
from optax_matrix._linalg.exact import exact_polar
from optax_matrix._linalg.largest_slices import LargestSlices
from optax_matrix._linalg.minimax import polar_express_rows
from optax_matrix._linalg.newton_schulz import (
    block_gain,
    gram_factor,
    gram_is_cheaper,
    newton_schulz,
    newton_schulz_flops,
    restart_points,
)
from optax_matrix._linalg.numerics import at_least_float32, is_tall, unit_frobenius
from optax_matrix._linalg.packed import pack, unpack
from optax_matrix._linalg.polar import Exact, NewtonSchulz, PolarMethod, as_method
from optax_matrix._linalg.rational import spd_inverse, zolotarev
from optax_matrix._linalg.roots import (
    Root,
    RootMethod,
    inverse_root_by_newton,
    power_by_eigh,
)
from optax_matrix._linalg.triangular import MUD, Halley, Zolotarev

__all__ = [
    "MUD",
    "TABLES",
    "Balanced",
    "CoefficientTable",
    "Exact",
    "Halley",
    "LargestSlices",
    "NewtonSchulz",
    "PolarMethod",
    "Root",
    "RootMethod",
    "Zolotarev",
    "as_method",
    "at_least_float32",
    "block_gain",
    "eigenbasis",
    "exact_polar",
    "gram_factor",
    "gram_is_cheaper",
    "inverse_root_by_newton",
    "is_tall",
    "newton_schulz",
    "newton_schulz_flops",
    "pack",
    "polar_express_rows",
    "positive_q_factor",
    "power_by_eigh",
    "power_product",
    "q_factor",
    "resolve",
    "restart_points",
    "spd_inverse",
    "unit_frobenius",
    "unpack",
    "zolotarev",
]
