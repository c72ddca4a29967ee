"""Every matrix optimizer against its published rule in float64, over 25 steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from tests import problems
from tests.references import optimizers as reference
from tests.transforms.every import VARIANTS

STEPS = 25


def fading(count):
    """A schedule of the weight decay; powers of two are exact in float32."""
    return 0.25 * 0.5 ** (count // 8)


CASES = {
    "muon": (om.muon, reference.muon, {}),
    "muon without look-ahead": (
        lambda lr: om.muon(lr, nesterov=False),
        reference.muon,
        {"nesterov": False},
    ),
    "muonw": (om.muonw, reference.muon, {"weight_decay": 0.01}),
    "nanochat_muon": (
        lambda lr: om.nanochat_muon(lr, weight_decay=fading),
        reference.nanochat_muon,
        {"decays": [float(fading(t)) for t in range(STEPS)]},
    ),
    "muonh": (om.muonh, reference.muonh, {}),
    "adamh": (om.adamh, reference.adamh, {}),
    "normuon": (om.normuon, reference.normuon, {}),
    "dion": (om.dion, reference.dion, {}),
    "muown": (om.muown, reference.muown, {}),
    "muown with decay": (
        lambda lr: om.muown(lr, weight_decay=0.5),
        reference.muown,
        {"weight_decay": 0.5},
    ),
    "halley_muon": (om.halley_muon, reference.halley_muon, {}),
    "halley_muon with SVD": (
        lambda lr: om.halley_muon(lr, svd_every=3),
        reference.halley_muon,
        {"svd_every": 3},
    ),
    "adamuon": (om.adamuon, reference.adamuon, {}),
    "muon_vs": (om.muon_vs, reference.muon_vs, {}),
    "muon_nsr": (om.muon_nsr, reference.muon_vs, {"gamma": 10.0}),
    "muon_squared": (
        lambda lr: om.muon_squared(
            lr,
            weight_decay=0.0125,
            orthogonalize=om.NewtonSchulz(12, coefficients="track3"),
        ),
        reference.muon_squared,
        {"weight_decay": 0.0125, "steps": 12, "coefficients": (2.0, -1.5, 0.5)},
    ),
    "muon_squared without look-ahead": (
        lambda lr: om.muon_squared(lr, nesterov=False),
        reference.muon_squared,
        {"nesterov": False},
    ),
    "mano": (om.mano, reference.mano, {}),
    "mano with look-ahead": (
        lambda lr: om.mano(lr, nesterov=True),
        reference.mano,
        {"nesterov": True},
    ),
    "spel": (om.spel, reference.spel, {}),
    "MuonSphere": (
        lambda lr: om.spectral_sphere(lr, tangent=False, radius=2.0, weight_decay=0.5),
        reference.spectral_sphere,
        {"tangent": False, "radius": 2.0, "weight_decay": 0.5},
    ),
    "hopper": (om.hopper, reference.hopper, {}),
    "hopper, 5 steps": (
        lambda lr: om.hopper(lr, orthogonalize="newton_schulz"),
        reference.hopper,
        {"steps": 5},
    ),
    "hopper, pre": (
        lambda lr: om.hopper(lr, variance="pre"),
        reference.hopper,
        {"variance": "pre"},
    ),
}


SHAPES = [(7, 4), (4, 7), (5, 1)]
# Their own stage is compared for other shapes in tests/transforms.
ONE_SHAPE = VARIANTS | {
    *("muown with decay", "muon_squared without look-ahead", "mano with look-ahead"),
    *("MuonSphere", "halley_muon with SVD"),
}


@pytest.mark.parametrize(
    "name, shape",
    [
        pytest.param(
            name, shape, marks=[pytest.mark.slow] if name in ONE_SHAPE and i else []
        )
        for name in CASES
        # Dion takes one output of four, and three of nine.
        for i, shape in enumerate([(12, 9), *SHAPES] if name == "dion" else SHAPES)
    ],
)
def test_agrees_with_the_published_rule_in_float64(name, shape):
    factory, rule, settings = CASES[name]
    with jax.enable_x64(True):
        w = problems.normal(shape, 1, "float64")
        grads = problems.normal((STEPS, *shape), 2, "float64")
        params = {"kernel": w}
        iterates, _ = problems.run(
            factory(0.02), params, [{"kernel": g} for g in grads]
        )
        got = np.stack([p["kernel"] for p in iterates])
    want = rule(np.asarray(w), np.asarray(grads), 0.02, **settings)
    # Float64 throughout; hyperparameters enter optax's chain as float32 in places
    # (the learning rate), which leaves 1e-8 relative to steps of 0.02.
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "shape", [(7, 4), pytest.param((4, 7), marks=pytest.mark.slow)]
)
def test_spectral_sphere_agrees_with_its_published_rule(shape):
    with jax.enable_x64(True):
        w = problems.normal(shape, 1, "float64")
        grads = problems.normal((STEPS, *shape), 2, "float64")
        iterates, _ = problems.run(
            om.spectral_sphere(0.02), {"kernel": w}, [{"kernel": g} for g in grads]
        )
        got = np.stack([p["kernel"] for p in iterates])
    want = reference.spectral_sphere(np.asarray(w), np.asarray(grads), 0.02)
    # 24 bisections leave 2e-7 of λ, for steps of 0.02.
    np.testing.assert_allclose(got, want, atol=1e-7)
    plain = reference.spectral_sphere(
        np.asarray(w), np.asarray(grads), 0.02, tangent=False
    )
    assert np.abs(plain - want).max() > 1e-3


@pytest.mark.parametrize("name", ["muon", "muonh", "normuon", "adamuon", "hopper"])
def test_float32_follows_float64(name):
    factory, rule, settings = CASES[name]
    w, grads = problems.normal((7, 4), 1), problems.normal((STEPS, 7, 4), 2)
    iterates, _ = problems.run(
        factory(0.02), {"kernel": w}, [{"kernel": g} for g in grads]
    )
    got = np.stack([p["kernel"] for p in iterates])
    want = rule(np.asarray(w), np.asarray(grads), 0.02, **settings)
    # 25 steps, each with the rounding of five float32 iterations (1e-5 of 0.02).
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_hopper_without_orthogonalization_is_adam():
    with jax.enable_x64(True):
        params = {
            "kernel": problems.normal((6, 4), dtype=jnp.float64),
            "stack": problems.normal((2, 4, 3), 1, jnp.float64),
        }
        grads = [
            jax.tree.map(lambda p, t=t: jnp.cos(p * t), params) for t in range(1, 11)
        ]
        hopper = om.hopper(
            0.01, variance="pre", orthogonalize=None, rms=None, routing="matrix"
        )
        got, _ = problems.run(hopper, params, grads)
        want, _ = problems.run(optax.adam(0.01), params, grads)
    for a, b in zip(got, want, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), a, b)


def test_adamuon_is_hopper_with_five_steps_but_for_the_sign():
    # Momentum whose entries all have the same size is a multiple of its sign.
    signs = jnp.sign(problems.normal((6, 4)))
    grads = [{"kernel": signs * (0.5 + t)} for t in range(6)]
    params = {"kernel": problems.normal((6, 4), 1)}
    got, _ = problems.run(om.adamuon(0.01), params, grads)
    hopper = om.hopper(0.01, orthogonalize="newton_schulz")
    want, _ = problems.run(hopper, params, grads)
    np.testing.assert_allclose(got[-1]["kernel"], want[-1]["kernel"], rtol=1e-5)
    # Any other momentum tells them apart.
    other = [{"kernel": problems.normal((6, 4), t)} for t in range(6)]
    a, _ = problems.run(om.adamuon(0.01), params, other)
    b, _ = problems.run(hopper, params, other)
    assert jnp.abs(a[-1]["kernel"] - b[-1]["kernel"]).max() > 1e-3


@pytest.mark.parametrize("nesterov", [True, False])
def test_debiased_muon_is_optax_contrib_muon(nesterov):
    with jax.enable_x64(True):
        params = {
            "kernel": problems.normal((7, 4), 0, "float64"),
            "wide": problems.normal((4, 9), 1, "float64"),
            "bias": problems.normal((4,), 2, "float64"),
        }
        grads = [
            jax.tree.map(lambda p, t=t: jnp.cos(p * t), params)
            for t in range(1, STEPS + 1)
        ]
        ours = om.muon(
            0.02,
            nesterov=nesterov,
            debias=True,
            routing=lambda path, leaf: leaf.ndim == 2,
            auxiliary=optax.nadam(0.02) if nesterov else optax.adam(0.02),
        )
        peer = optax.contrib.muon(0.02, nesterov=nesterov)
        got, _ = problems.run(ours, params, grads)
        want, _ = problems.run(peer, params, grads)
    for a, b in zip(got, want, strict=True):
        # The peer adds 1e-8 to norms of about 3.
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


MORE = ("exact", om.NewtonSchulz(2))


@pytest.mark.parametrize(
    "orthogonalize",
    ["halley", *(pytest.param(o, marks=pytest.mark.slow) for o in MORE), None],
)
@pytest.mark.parametrize(
    "factory", [om.muon, om.muonw, om.muonh, om.normuon, om.adamuon, om.hopper]
)
def test_the_orthogonalizing_stage_is_an_argument(factory, orthogonalize):
    params = {"kernel": problems.normal((6, 4))}
    # Two steps: AdaMuon's first update has entries of one size whatever the stage.
    grads = [params, {"kernel": problems.normal((6, 4), 1)}]
    got, _ = problems.run(factory(0.1, orthogonalize=orthogonalize), params, grads)
    usual, _ = problems.run(factory(0.1), params, grads)
    # Steps of 0.02 and more: far above their float32 rounding, 1e-8.
    assert jnp.abs(got[-1]["kernel"] - usual[-1]["kernel"]).max() > 1e-4
    if factory is om.muon and orthogonalize == "exact":
        step = got[0]["kernel"] - params["kernel"]
        want = -0.1 * reference.polar(np.asarray(params["kernel"], np.float64))
        np.testing.assert_allclose(step, want, atol=1e-6)


def test_adams_statistics_are_float32_for_bfloat16_parameters():
    # In bfloat16 an average with b2 = 0.999 stands still at half of what it should be.
    params = {"kernel": jnp.ones((4, 3), "bfloat16")}
    tx = om.hopper(0.01, variance="pre")
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(1000):
        _, state = update(params, state, params)
    variance = optax.tree.get(state.inner_states["matrix"], "variance")["kernel"]
    assert variance.dtype == jnp.float32
    np.testing.assert_allclose(variance, 1 - 0.999**1000, rtol=1e-3)


@pytest.mark.parametrize("side", [64, 256])
def test_one_step_is_short_and_five_grow_with_the_side(side):
    # What `hopper` says of the sizes of its updates.
    x = problems.normal((side, side))
    norms = []
    for steps in (1, 5):
        tx = om.orthogonalize_newton_schulz(steps)
        norms.append(float(jnp.linalg.norm(tx.update(x, tx.init(x))[0])))
    assert 3.1 < norms[0] < 3.45
    assert 0.8 * side**0.5 < norms[1] < side**0.5
