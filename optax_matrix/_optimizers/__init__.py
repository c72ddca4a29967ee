"""The named optimizers: chains of transforms, each its own definition."""

from optax_matrix._optimizers.dion import dion
from optax_matrix._optimizers.halley_muon import halley_muon
from optax_matrix._optimizers.hopper import adamuon, hopper
from optax_matrix._optimizers.hyperball import adamh, muonh
from optax_matrix._optimizers.mano import mano
from optax_matrix._optimizers.muon import muon, muonw
from optax_matrix._optimizers.muon_squared import muon_squared
from optax_matrix._optimizers.muon_vs import muon_nsr, muon_vs
from optax_matrix._optimizers.muown import muown
from optax_matrix._optimizers.nanochat import nanochat_muon
from optax_matrix._optimizers.normuon import normuon
from optax_matrix._optimizers.registry import (
    MATRIX_OPTIMIZERS,
    OPTIMIZERS,
    make_optimizer,
)
from optax_matrix._optimizers.shampoo import distributed_shampoo, shampoo
from optax_matrix._optimizers.soap import kl_soap, soap, soap_muon
from optax_matrix._optimizers.spectral_sphere import spectral_sphere
from optax_matrix._optimizers.spel import spel
from optax_matrix._optimizers.track3 import track3

__all__ = [
    "MATRIX_OPTIMIZERS",
    "OPTIMIZERS",
    "adamh",
    "adamuon",
    "dion",
    "distributed_shampoo",
    "halley_muon",
    "hopper",
    "kl_soap",
    "make_optimizer",
    "mano",
    "muon",
    "muon_nsr",
    "muon_squared",
    "muon_vs",
    "muonh",
    "muonw",
    "muown",
    "nanochat_muon",
    "normuon",
    "shampoo",
    "soap",
    "soap_muon",
    "spectral_sphere",
    "spel",
    "track3",
]
