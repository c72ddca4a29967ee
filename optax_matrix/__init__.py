"""Matrix-aware optimizers for JAX, as composable Optax transformations."""

from optax_matrix import diagnostics
from optax_matrix._accounting import describe_placement
from optax_matrix._layout import MatrixLayout
from optax_matrix._linalg import Exact, Halley, NewtonSchulz
from optax_matrix._optimizers import (
    MATRIX_OPTIMIZERS,
    OPTIMIZERS,
    adamh,
    adamuon,
    hopper,
    make_optimizer,
    muon,
    muonh,
    muonw,
    normuon,
)
from optax_matrix._placement import Placement
from optax_matrix._routing import describe, partition, route
from optax_matrix._transforms import (
    add_cautious_weight_decay,
    ema_momentum,
    floor_update_ratio,
    hyperball_retract,
    match_rms,
    normalize_frobenius,
    orthogonalize,
    orthogonalize_exact,
    orthogonalize_halley,
    orthogonalize_newton_schulz,
    scale_by_neuron_variance,
    scale_by_shape,
    scale_by_variance,
    switch_at,
)

__all__ = [
    "MATRIX_OPTIMIZERS",
    "OPTIMIZERS",
    "Exact",
    "Halley",
    "MatrixLayout",
    "NewtonSchulz",
    "Placement",
    "adamh",
    "adamuon",
    "add_cautious_weight_decay",
    "describe",
    "describe_placement",
    "diagnostics",
    "ema_momentum",
    "floor_update_ratio",
    "hopper",
    "hyperball_retract",
    "make_optimizer",
    "match_rms",
    "muon",
    "muonh",
    "muonw",
    "normalize_frobenius",
    "normuon",
    "orthogonalize",
    "orthogonalize_exact",
    "orthogonalize_halley",
    "orthogonalize_newton_schulz",
    "partition",
    "route",
    "scale_by_neuron_variance",
    "scale_by_shape",
    "scale_by_variance",
    "switch_at",
]
