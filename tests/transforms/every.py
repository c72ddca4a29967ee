"""Every public transformation and matrix optimizer, with arguments where needed."""

import inspect
from collections.abc import Callable

import optax
import pytest

import optax_matrix as om

MADE = {
    "add_cautious_weight_decay": lambda: om.add_cautious_weight_decay(0.1),
    "ema_lookahead": lambda: om.ema_lookahead(om.ema_momentum()),
    "float32_statistics": lambda: om.float32_statistics(optax.scale_by_adam()),
    "graft_to": lambda: om.graft_to(om.ema_momentum(), om.normalize_frobenius()),
    "offload_state": lambda: om.offload_state(om.ema_momentum()),
    "precondition_then_orthogonalize": lambda: om.precondition_then_orthogonalize(
        om.soap_precondition()
    ),
    "spectral_norm_cap": lambda: om.spectral_norm_cap(1.0),
    "tail_average": lambda: om.tail_average(om.ema_momentum(), start=1),
    "weight_normalized": lambda: om.weight_normalized(
        om.ema_momentum(), optax.scale_by_adam()
    ),
    "svd_supplement": lambda: om.svd_supplement(2),
    "switch_at": lambda: om.switch_at(1, om.match_rms(), om.ema_momentum()),
}


def _is_transformation(name):
    module = getattr(getattr(om, name), "__module__", "")
    return module.startswith("optax_matrix._transforms") and inspect.isfunction(
        getattr(om, name)
    )


# These need extra arguments or pairs of leaves: their own files have all their tests.
APART = {"qk_clip", "orthogonalize_factors"}
TRANSFORMS: dict[str, Callable[..., optax.GradientTransformation]] = {
    name: MADE[name] if name in MADE else getattr(om, name)
    for name in om.__all__
    if _is_transformation(name) and name not in APART
}
OPTIMIZERS = {name: om.OPTIMIZERS[name] for name in sorted(om.MATRIX_OPTIMIZERS)}

# Chains of others in which one stage is another, with tests of its own.
VARIANTS = {
    *("muon_vs", "muon_nsr", "muon_squared", "mano", "dion", "muown"),
    *("spectral_sphere", "spel", "halley_muon"),
}
# Their learning rate is a spectral norm; AdamW's default is 0.15 times that.
SPECTRAL = {
    *("muon", "muonw", "normuon", "muonh", "adamh", "soap_muon", "track3"),
    *("nanochat_muon", "muon_squared", "dion", "spectral_sphere", "spel"),
}


def case(name, *rest, slow=VARIANTS):
    """A parameter, marked slow if its name is in `slow`."""
    return pytest.param(name, *rest, marks=[pytest.mark.slow] if name in slow else [])
