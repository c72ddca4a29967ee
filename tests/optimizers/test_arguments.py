"""Absurd arguments raise at construction, with an error that names the argument."""

import inspect
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from tests.transforms.every import OPTIMIZERS, TRANSFORMS

NAN = float("nan")
NO_NUMBERS = ("0.9", True, [0.1], {"a": 0.1}, np.ones(2), 1j, NAN, jnp.float32(NAN))
NO_INTEGERS = ("3", True, 2.5, np.float32(2), [3])
NO_BOOLEANS = ("no", 1, jnp.array(True))
NO_DTYPES = ("int16", "nonsense", "float16", 3)
NO_SETTINGS = ({}, "soap", om.SOAP, om.Preconditioner(), ("stagger", True))
NO_TRANSFORMATIONS = ("adamw", {}, optax.adamw, 3, (optax.identity(),))


def in_unit(*more):
    """What is no decay in [0, 1)."""
    return (*NO_NUMBERS, -0.1, 1, 1.5, *more)


def positive(*more):
    return (*NO_NUMBERS, 0, -1.0, float("inf"), *more)


def not_negative(*more):
    return (*NO_NUMBERS, -1, np.float32(-0.5), *more)


# Only learning rates, weight decays, momenta and strengths may be schedules.
SCHEDULE = optax.constant_schedule(0.5)
BAD = {
    "auxiliary": NO_TRANSFORMATIONS,
    "auxiliary_learning_rate": not_negative(),
    "b2": in_unit(SCHEDULE),
    "bisections": (*NO_INTEGERS, 0, jnp.int32(5)),
    "block_size": (*NO_INTEGERS, 0, -1),
    "coefficients": ("nonsense", [(1.0,)], [], 3, [("3", "2", "1")]),
    "damping": not_negative(SCHEDULE),
    "debias": NO_BOOLEANS,
    "decays": (0.9, "ab", (), (0.9,), ("a", "b"), (0.9, 1.0), (NAN, 0.9)),
    "direction": NO_TRANSFORMATIONS,
    "dtype": ("int8", "nonsense", 3),
    "eps": positive(SCHEDULE),
    "every": (*NO_INTEGERS, 0, -1, SCHEDULE, jnp.float32(2)),
    "exponents": (-0.25, (-0.25,), (0.5, None), ("a", None), (None, None), (NAN, -1)),
    "factor_b2": in_unit(SCHEDULE),
    "factor_dtype": NO_DTYPES,
    "first": NO_TRANSFORMATIONS,
    "fraction": (*NO_NUMBERS, 0.0, -0.1, 1.5, SCHEDULE),
    "floor": not_negative(SCHEDULE),
    "gamma": not_negative(SCHEDULE),
    "graft": ("lion", 3, optax.adam, {}, True),
    "horizon": (*NO_NUMBERS, 0.5, SCHEDULE),
    "initial": positive(SCHEDULE),
    "inner": NO_TRANSFORMATIONS,
    "inward": not_negative(SCHEDULE),
    "learning_rate": not_negative(),
    "limit": positive(SCHEDULE),
    "lower_bound": ("a", True, 0.0, 1.5, NAN, SCHEDULE),
    "magnitude": NO_TRANSFORMATIONS,
    "magnitude_momentum": in_unit(),
    "max_dim": (*NO_INTEGERS, 0),
    "max_failures": (*NO_INTEGERS, 0),
    "max_scale": positive(SCHEDULE),
    "method": ("nonsense", 3, True, om.NewtonSchulz),
    "momentum": in_unit(),
    "mu_dtype": NO_DTYPES,
    "nu_dtype": NO_DTYPES,
    "nesterov": NO_BOOLEANS,
    "normalization": ("max", 3, True),
    "of": ("rows", 2, True),
    "orthogonalize": ("qr", 3, True, om.NewtonSchulz, om.SOAP()),
    "outward": not_negative(SCHEDULE),
    "passes": (*NO_INTEGERS, 0, jnp.int32(5)),
    "per": ("row", 2, True),
    "placement": ({"kernel": jnp.ones((3, 2))}, "x", 3, jax.P("x"), om.Placement),
    "poles": (*NO_INTEGERS, 0, jnp.int32(5)),
    "polish": (*NO_INTEGERS, -1, jnp.int32(5)),
    "precision": ("best", 3.5),
    "precondition": NO_TRANSFORMATIONS,
    "preconditioner": NO_SETTINGS,
    "radius": positive(SCHEDULE),
    "refresh": (*NO_INTEGERS, 0, -1, SCHEDULE, jnp.float32(2)),
    "svd_every": (*NO_INTEGERS, 0, -1, SCHEDULE, jnp.float32(2)),
    "residual_bound": positive(SCHEDULE),
    "rms": positive(SCHEDULE),
    "root": ("svd", 3, True),
    "safety": ("a", 0.5, NAN, True),
    "second": NO_TRANSFORMATIONS,
    "shape_scale": ("square", True, 1),
    "stagger": NO_BOOLEANS,
    "start": (*NO_INTEGERS, -1, SCHEDULE),
    "step": not_negative(SCHEDULE),
    "steps": (*NO_INTEGERS, 0, jnp.int32(5)),
    "strength": not_negative(),
    "tangent": NO_BOOLEANS,
    "to": ("two", 2, True),
    "variance": ("mid", True, 1),
    "weight": (*NO_NUMBERS, -0.1, 1.1, SCHEDULE),
    "weight_decay": not_negative(),
    "weights": (0.9, "ab", (), (0.9,), ("a", "b"), (0.9, -1.0), (NAN, 0.9)),
}
# Trees and functions of trees, which `init` checks against the parameters.
CHECKED_LATER = {"layout", "routing", "weight_decay_mask"}
SETTINGS = {
    kind.__name__: kind
    for kind in (
        *(om.SOAP, om.KL, om.Shampoo),
        *(om.NewtonSchulz, om.Halley, om.Zolotarev, om.MUD, om.Exact, om.LargestSlices),
    )
}
REQUIRED = {
    "add_cautious_weight_decay": {"weight_decay": 0.1},
    "ema_lookahead": {"inner": optax.identity()},
    "float32_statistics": {"inner": optax.identity()},
    "graft_to": {"magnitude": optax.identity(), "direction": optax.identity()},
    "precondition_then_orthogonalize": {"precondition": optax.identity()},
    "spectral_norm_cap": {"limit": 1.0},
    "svd_supplement": {"every": 2},
    "tail_average": {"inner": optax.identity(), "start": 1},
    "weight_normalized": {
        "direction": optax.identity(),
        "magnitude": optax.identity(),
    },
    "switch_at": {"step": 1, "first": optax.identity(), "second": optax.identity()},
    "NewtonSchulz": {"coefficients": "polar_express"},
}


def factories():
    for name in TRANSFORMS:
        yield name, getattr(om, name)
    yield from OPTIMIZERS.items()
    yield from SETTINGS.items()


# The name of a factory and of an argument, and whether it takes None.
CASES = [
    (name, argument, type(None) in typing.get_args(parameter.annotation))
    for name, factory in factories()
    for argument, parameter in inspect.signature(factory).parameters.items()
    if argument not in CHECKED_LATER
]


@pytest.mark.parametrize("name, argument, takes_none", CASES)
def test_absurd_arguments_raise_at_construction_by_name(name, argument, takes_none):
    factory = dict(factories())[name]
    shown = re.escape(f"`{argument}`")
    bad = BAD[argument] if takes_none else (*BAD[argument], None)
    for value in bad:
        with pytest.raises((TypeError, ValueError), match=shown) as raised:
            factory(**REQUIRED.get(name, {}) | {argument: value})
            pytest.fail(f"{name}({argument}={value!r}) raised nothing")
        assert len(str(raised.value)) < 500


@pytest.mark.parametrize("name, argument", [c[:2] for c in CASES if c[2]])
def test_none_is_accepted_where_the_signature_says_so(name, argument):
    dict(factories())[name](**REQUIRED.get(name, {}) | {argument: None})


def test_muon_sphere_must_orthogonalize():
    with pytest.raises(TypeError, match="`orthogonalize` must be one of"):
        om.spectral_sphere(tangent=False, orthogonalize=None)  # type: ignore
