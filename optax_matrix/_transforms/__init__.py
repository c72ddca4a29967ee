"""Gradient transformations, one per file."""

from optax_matrix._transforms._eigenbases import SOAP
from optax_matrix._transforms._kl import KL
from optax_matrix._transforms._per_matrix import PerMatrixState
from optax_matrix._transforms._preconditioner import Health, Preconditioner
from optax_matrix._transforms._rule_of import rule_of
from optax_matrix._transforms._top_singular import TopVectorState
from optax_matrix._transforms.add_cautious_weight_decay import (
    AddCautiousWeightDecayState,
    add_cautious_weight_decay,
)
from optax_matrix._transforms.ema_lookahead import EmaLookaheadState, ema_lookahead
from optax_matrix._transforms.ema_momentum import EmaMomentumState, ema_momentum
from optax_matrix._transforms.equalize_norms import equalize_norms
from optax_matrix._transforms.float32_statistics import float32_statistics
from optax_matrix._transforms.floor_update_ratio import floor_update_ratio
from optax_matrix._transforms.graft_to import GraftToState, graft_to
from optax_matrix._transforms.hyperball_retract import (
    HyperballRetractState,
    hyperball_retract,
)
from optax_matrix._transforms.kl_shampoo_precondition import kl_shampoo_precondition
from optax_matrix._transforms.kl_soap_precondition import kl_soap_precondition
from optax_matrix._transforms.match_rms import match_rms
from optax_matrix._transforms.mixed_momentum import MixedMomentumState, mixed_momentum
from optax_matrix._transforms.normalize_frobenius import normalize_frobenius
from optax_matrix._transforms.oblique_tangent import (
    ObliqueTangentState,
    oblique_tangent,
)
from optax_matrix._transforms.offload_state import offload_state
from optax_matrix._transforms.orthogonalize import orthogonalize
from optax_matrix._transforms.orthogonalize_cached import orthogonalize_cached
from optax_matrix._transforms.orthogonalize_exact import orthogonalize_exact
from optax_matrix._transforms.orthogonalize_factors import orthogonalize_factors
from optax_matrix._transforms.orthogonalize_halley import orthogonalize_halley
from optax_matrix._transforms.orthogonalize_newton_schulz import (
    orthogonalize_newton_schulz,
)
from optax_matrix._transforms.orthogonalize_with_feedback import (
    OrthogonalizeWithFeedbackState,
    orthogonalize_with_feedback,
)
from optax_matrix._transforms.precondition_then_orthogonalize import (
    precondition_then_orthogonalize,
)
from optax_matrix._transforms.qk_clip import QKProjection, qk_clip
from optax_matrix._transforms.radial_brake import radial_brake
from optax_matrix._transforms.radial_retract import RadialRetractState, radial_retract
from optax_matrix._transforms.scale_by_neuron_variance import (
    ScaleByNeuronVarianceState,
    scale_by_neuron_variance,
)
from optax_matrix._transforms.scale_by_noise import ScaleByNoiseState, scale_by_noise
from optax_matrix._transforms.scale_by_shape import ShapeScale, scale_by_shape
from optax_matrix._transforms.scale_by_sign import scale_by_sign
from optax_matrix._transforms.scale_by_variance import (
    ScaleByVarianceState,
    scale_by_variance,
)
from optax_matrix._transforms.shampoo_precondition import Shampoo, shampoo_precondition
from optax_matrix._transforms.soap_precondition import soap_precondition
from optax_matrix._transforms.spectral_norm_cap import spectral_norm_cap
from optax_matrix._transforms.spectral_sphere_retract import spectral_sphere_retract
from optax_matrix._transforms.stiefel_retract import stiefel_retract
from optax_matrix._transforms.svd_supplement import svd_supplement
from optax_matrix._transforms.switch_at import SwitchAtState, switch_at
from optax_matrix._transforms.tail_average import TailAverageState, tail_average
from optax_matrix._transforms.tangent_orthogonalize import tangent_orthogonalize
from optax_matrix._transforms.weight_normalized import (
    WeightNormalizedState,
    weight_normalized,
)
from optax_matrix._transforms.whiten_momentum import whiten_momentum

__all__ = [
    "KL",
    "SOAP",
    "AddCautiousWeightDecayState",
    "EmaLookaheadState",
    "EmaMomentumState",
    "GraftToState",
    "Health",
    "HyperballRetractState",
    "MixedMomentumState",
    "ObliqueTangentState",
    "OrthogonalizeWithFeedbackState",
    "PerMatrixState",
    "Preconditioner",
    "QKProjection",
    "RadialRetractState",
    "ScaleByNeuronVarianceState",
    "ScaleByNoiseState",
    "ScaleByVarianceState",
    "Shampoo",
    "ShapeScale",
    "SwitchAtState",
    "TailAverageState",
    "TopVectorState",
    "WeightNormalizedState",
    "add_cautious_weight_decay",
    "ema_lookahead",
    "ema_momentum",
    "equalize_norms",
    "float32_statistics",
    "floor_update_ratio",
    "graft_to",
    "hyperball_retract",
    "kl_shampoo_precondition",
    "kl_soap_precondition",
    "match_rms",
    "mixed_momentum",
    "normalize_frobenius",
    "oblique_tangent",
    "offload_state",
    "orthogonalize",
    "orthogonalize_cached",
    "orthogonalize_exact",
    "orthogonalize_factors",
    "orthogonalize_halley",
    "orthogonalize_newton_schulz",
    "orthogonalize_with_feedback",
    "precondition_then_orthogonalize",
    "qk_clip",
    "radial_brake",
    "radial_retract",
    "rule_of",
    "scale_by_neuron_variance",
    "scale_by_noise",
    "scale_by_shape",
    "scale_by_sign",
    "scale_by_variance",
    "shampoo_precondition",
    "soap_precondition",
    "spectral_norm_cap",
    "spectral_sphere_retract",
    "stiefel_retract",
    "svd_supplement",
    "switch_at",
    "tail_average",
    "tangent_orthogonalize",
    "weight_normalized",
    "whiten_momentum",
]
