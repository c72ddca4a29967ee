"""All optimizers by name, from SGD to the record of modded-nanogpt."""

import reprlib
import types
from collections.abc import Callable, Mapping
from typing import Any

import optax

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
from optax_matrix._optimizers.shampoo import distributed_shampoo, shampoo
from optax_matrix._optimizers.soap import kl_soap, soap, soap_muon
from optax_matrix._optimizers.spectral_sphere import spectral_sphere
from optax_matrix._optimizers.spel import spel
from optax_matrix._optimizers.track3 import track3

Factory = Callable[..., optax.GradientTransformation]


def momentum(
    learning_rate: optax.ScalarOrSchedule, momentum: float = 0.9
) -> optax.GradientTransformation:
    """`optax.sgd` with heavy-ball momentum."""
    return optax.sgd(learning_rate, momentum=momentum)


def adam_l2(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float = 1e-4, **settings: Any
) -> optax.GradientTransformation:
    """`optax.adam` with an L2 penalty: the decay is added to the gradient.

    Unlike AdamW's decay it passes through the moments, so that parameters with large
    gradients decay less.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.adam(learning_rate, **settings)
    )


_ELEMENTWISE: Mapping[str, Factory] = {
    "sgd": optax.sgd,
    "momentum": momentum,
    "adagrad": optax.adagrad,
    "rmsprop": optax.rmsprop,
    "adam": optax.adam,
    "adam_l2": adam_l2,
    "adamw": optax.adamw,
    "sign_sgd": optax.sign_sgd,
    "lion": optax.lion,
}
_MATRIX: Mapping[str, Factory] = {
    factory.__name__: factory
    for factory in (
        muon,
        muonw,
        muonh,
        adamh,
        adamuon,
        normuon,
        dion,
        muown,
        hopper,
        halley_muon,
        muon_vs,
        muon_nsr,
        muon_squared,
        mano,
        shampoo,
        distributed_shampoo,
        soap,
        kl_soap,
        soap_muon,
        nanochat_muon,
        track3,
        spectral_sphere,
        spel,
    )
}

MATRIX_OPTIMIZERS: frozenset[str] = frozenset(_MATRIX)
"""The names of the matrix optimizers, which take `routing` and `auxiliary`."""

OPTIMIZERS: Mapping[str, Factory] = types.MappingProxyType({**_ELEMENTWISE, **_MATRIX})
"""Factories by name; each takes the learning rate first."""


def make_optimizer(
    name: str, learning_rate: optax.ScalarOrSchedule, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    """Builds an optimizer by name.

    Args:
      name: A key of `OPTIMIZERS`.
      learning_rate: A number or a schedule, in the units of that optimizer.
      **settings: The other arguments of its factory.

    Returns:
      The optimizer.

    Raises:
      ValueError: For an unknown name, listing the known ones.
      TypeError: For a setting that its factory does not take.

    Example:
      >>> tx = make_optimizer("muon", 0.02, auxiliary_learning_rate=3e-3)
    """
    if not isinstance(name, str) or name not in OPTIMIZERS:
        raise ValueError(
            f"`name` must be one of {', '.join(OPTIMIZERS)}, got {reprlib.repr(name)}."
        )
    return optax.with_extra_args_support(OPTIMIZERS[name](learning_rate, **settings))
