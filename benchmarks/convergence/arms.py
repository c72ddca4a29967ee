"""What is compared: optimizers by name, and chains around polar methods."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

import optax_matrix as om
from examples.nanogpt import train
from examples.nanogpt.configs import Config

Stage = optax.GradientTransformation
Values = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the things that are compared.

    Attributes:
      make: Returns the optimizer of all parameters, given tuned values and the run.
      start: The values of the first trial; each of them is tuned.
      polar: What orthogonalizes, if one method does so in every update.
    """

    make: Callable[[Values, Config], Stage]
    start: Values
    polar: om.PolarMethod | None = None


# ----------------------------------------------------------------- polar methods


@dataclasses.dataclass(frozen=True)
class Freon:
    """Raises singular values to the power 1 - 2c, by SVD (arXiv:2605.11181).

    Attributes:
      c: 0 keeps them, 1/2 is the polar factor, and more than 1/2 reverses their order.
      floor: Smaller values, relative to the largest, count as this.
    """

    c: float
    floor: float = 1e-3

    def polar(self, x: Array) -> Array:
        u, s, vt = jnp.linalg.svd(x, full_matrices=False)
        largest = s[..., :1]
        s = jnp.maximum(s, self.floor * largest)
        return jnp.where(largest > 0, u * s[..., None, :] ** (1 - 2 * self.c), 0) @ vt


METHODS: Mapping[str, om.PolarMethod] = {
    "jordan": om.NewtonSchulz(),
    "polar_express": om.NewtonSchulz(5, coefficients="polar_express"),
    "exact": om.Exact(),
    "halley": om.Halley(1e-2),
    "halley_1e-3": om.Halley(1e-3),
    "halley_polished": om.Halley(1e-3, polish=2),
    "zolotarev": om.Zolotarev(),
    "express_rows": om.NewtonSchulz(
        coefficients=om.polar_express_rows(0.03, 3),
        method="gram",
        normalization="schatten4",
        precision="highest",
    ),
    "mud": om.MUD(),
    # Controls: one step, a chaotic map (Kaon, arXiv:2605.11181), a reversed spectrum.
    "one_step": om.NewtonSchulz(1),
    "kaon": om.NewtonSchulz(coefficients=[(4.1, -8.2, 4.1)] * 10, precision="highest"),
    "freon": Freon(0.75),
}


def _supplemented(layout: Any) -> Stage:
    polar = om.orthogonalize(METHODS["halley"], layout=layout)
    return optax.chain(polar, om.svd_supplement(4, layout=layout))


# Other stages in their place.
STAGES: Mapping[str, Callable[[Any], Stage]] = {
    "cached": lambda layout: om.orthogonalize_cached(refresh=2, layout=layout),
    "halley_svd": _supplemented,
    "mano": lambda layout: om.oblique_tangent(layout=layout),
    "none": lambda layout: optax.identity(),
}


# ---------------------------------------------------------------------- the arms


def named(
    optimizer: str,
    start: Values,
    *,
    polar: str | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> Arm:
    """Returns an optimizer of the registry.

    Args:
      optimizer: Its name.
      start: Arguments that are tuned, and their values in the first trial.
      polar: The name of the method by which it orthogonalizes.
      fixed: Arguments that are not tuned.
    """

    def make(values: Values, config: Config) -> Stage:
        settings = {**(fixed or {}), **values}
        schedule = train.schedule(settings.pop("learning_rate"), config)
        if optimizer in om.MATRIX_OPTIMIZERS:
            settings["auxiliary_learning_rate"] = train.schedule(config.aux_lr, config)
        return om.make_optimizer(optimizer, schedule, **settings)

    return Arm(make, start, METHODS[polar] if polar else None)


def around(
    orthogonalize: Callable[[Any], Stage],
    values: Values,
    config: Config,
    *,
    entry: bool,
    neuron: bool,
) -> Stage:
    """Returns momentum, a polar method, and variances around it, at a fixed RMS.

    Args:
      orthogonalize: Returns the stage of the polar method, given a layout.
      values: The learning rate and the momentum.
      config: The run.
      entry: Whether the variance of each entry is before the polar method.
      neuron: Whether the variance of each output is after it.
    """

    def matrix(layout: Any) -> Stage:
        stages = [
            om.ema_momentum(values["momentum"]),
            entry and om.scale_by_variance(0.95),
            orthogonalize(layout),
            neuron and om.scale_by_neuron_variance(0.95, layout=layout),
            om.match_rms(0.2, layout=layout),
            optax.scale_by_learning_rate(
                train.schedule(values["learning_rate"], config)
            ),
        ]
        return optax.chain(*[stage for stage in stages if stage])

    rate = train.schedule(config.aux_lr, config)
    auxiliary = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.0)
    return om.partition(matrix, auxiliary)


def chain(method: str, *, entry: bool, neuron: bool) -> Arm:
    """Returns `around` a method, by its name in METHODS or STAGES."""
    polar = METHODS.get(method)

    def orthogonalize(layout: Any) -> Stage:
        if polar is None:
            return STAGES[method](layout)
        return om.orthogonalize(polar, layout=layout)

    def make(values: Values, config: Config) -> Stage:
        return around(orthogonalize, values, config, entry=entry, neuron=neuron)

    return Arm(make, {"learning_rate": 0.024, "momentum": 0.85}, polar)


def record(values: Values, config: Config) -> Stage:
    """Returns the optimizer of docs/record.md, its schedules scaled to the steps."""
    del values

    def at(count: ArrayLike) -> Array:
        return jnp.asarray(count) * (RECORD_STEPS / config.steps)

    def remaining(count: ArrayLike) -> Array:
        return jnp.maximum(0.0, RECORD_STEPS - at(count)) ** 1.2

    def learning_rate(count: ArrayLike) -> Array:
        return jnp.minimum(0.0375, 3.317e-6 * remaining(count))

    def momentum(count: ArrayLike) -> Array:
        rise = jnp.minimum(at(count) / 300, 1.0)
        fall = jnp.clip((at(count) - (RECORD_STEPS - 200)) / 200, 0.0, 1.0)
        return 0.85 + 0.1 * rise - 0.1 * fall

    def strength(count: ArrayLike) -> Array:
        on = (at(count) >= 300) & (at(count) < RECORD_STEPS - 950)
        rate = jnp.minimum(1.0, 1.659e-4 * remaining(count))
        return jnp.where(on, 0.3 * rate, 0.0)

    auxiliary = optax.adamw(train.schedule(config.aux_lr, config))
    matrices = om.track3(learning_rate, momentum=momentum, auxiliary=auxiliary)
    tail = round(config.steps * 2400 / RECORD_STEPS)
    return om.tail_average(om.ema_lookahead(matrices, strength), start=tail)


RECORD_STEPS = 2900
MUON = {"learning_rate": 0.04, "momentum": 0.85}
NORMUON = {"learning_rate": 0.06, "momentum": 0.85, "b2": 0.95}
ADAMUON = {"learning_rate": 3e-3, "momentum": 0.85, "b2": 0.95}
SOAP = {"learning_rate": 6e-3, "momentum": 0.9, "b2": 0.95}
OPTIMIZERS: Mapping[str, Arm] = {
    "adamw": named(
        "adamw", {"learning_rate": 8e-3, "b1": 0.9, "b2": 0.95, "weight_decay": 0.1}
    ),
    "lion": named(
        "lion", {"learning_rate": 1.6e-3, "b1": 0.9, "b2": 0.98, "weight_decay": 0.1}
    ),
    "muon": named("muon", MUON, polar="jordan"),
    "muonw": named("muonw", {**MUON, "weight_decay": 0.1}, polar="jordan"),
    "muonh": named("muonh", {**MUON, "learning_rate": 0.06}, polar="jordan"),
    "normuon": named("normuon", NORMUON, polar="jordan"),
    "adamuon": named("adamuon", ADAMUON, polar="jordan"),
    "hopper": named("hopper", ADAMUON, polar="one_step"),
    "shampoo": named("shampoo", {**SOAP, "learning_rate": 8e-3}),
    "soap": named("soap", SOAP),
    "soap_refresh_1": named("soap", SOAP, fixed={"refresh": 1}),
    "kl_soap_refresh_1": named("kl_soap", SOAP, fixed={"refresh": 1}),
    "record": Arm(record, {}),
    "soap_muon": named("soap_muon", {**SOAP, "learning_rate": 0.04}, polar="jordan"),
}
VARIANCES = {
    "{}": (False, False),
    "entry+{}": (True, False),
    "{}+neuron": (False, True),
    "entry+{}+neuron": (True, True),
}
CHAINS: Mapping[str, Arm] = {
    name.format(method): chain(method, entry=entry, neuron=neuron)
    for name, (entry, neuron) in VARIANCES.items()
    for method in (*METHODS, *STAGES)
}
ARMS: Mapping[str, Arm] = {**OPTIMIZERS, **CHAINS}
