"""scale_by_noise: the momentum stage of Muon-VS and Muon-NSR."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_matrix as om
from tests import problems
from tests.references import optimizers as reference

STEPS = 30
GRADS = np.random.default_rng(0).standard_normal((STEPS, 2, 4, 3))
BETAS = np.linspace(0.5, 0.95, STEPS)


@pytest.mark.parametrize("gamma", [None, 10.0])
def test_follows_its_formula(gamma):
    # A large epsilon, whose place then shows.
    tx = om.scale_by_noise(0.9, gamma=gamma, eps=0.1)
    with jax.enable_x64(True):
        got, state = problems.unroll(tx, [jnp.asarray(g) for g in GRADS])
    want = reference.noise_scaled(GRADS, 0.9, gamma, 0.1)
    np.testing.assert_allclose(np.stack(got), want, rtol=1e-10)
    assert state.count == STEPS and state.variance.dtype == jnp.float64


def test_the_momentum_may_be_a_schedule():
    tx = om.scale_by_noise(lambda count: jnp.asarray(BETAS)[count], gamma=2.0)
    with jax.enable_x64(True):
        got, _ = problems.unroll(tx, [jnp.asarray(g) for g in GRADS])
    m, v = 0.0, 0.0
    for t, (u, g, b) in enumerate(zip(got, GRADS, BETAS, strict=True), start=1):
        v = b * v + b * (1 - b) * (m - g) ** 2
        m = b * m + (1 - b) * g
        signal = g + b / (1 - b) * m / (1 - b**t)
        want = signal / (np.sqrt(signal**2 + 2 * v / (1 - b**t)) + 1e-8)
        np.testing.assert_allclose(u, want, rtol=1e-9)


def test_much_noise_is_muon_vs_and_none_takes_signs():
    grads = list(jnp.asarray(GRADS[:5], "float32"))
    signs, _ = problems.unroll(om.scale_by_noise(gamma=0.0), grads)
    ahead, _ = problems.unroll(om.ema_momentum(debias=True), grads)
    assert (jnp.abs(signs[-1]) <= 1).all()
    np.testing.assert_allclose(jnp.abs(signs[-1]), 1, rtol=1e-5)
    assert (jnp.sign(signs[0]) == jnp.sign(ahead[0])).all()
    large, _ = problems.unroll(om.scale_by_noise(gamma=1e8), grads)
    alone, _ = problems.unroll(om.scale_by_noise(), grads)
    np.testing.assert_allclose(1e4 * large[-1], alone[-1], rtol=1e-3)


def test_zero_stays_zero_and_nan_in_its_entry():
    g = jnp.asarray(GRADS[0], "float32").at[0].set(0)
    for gamma in (None, 10.0):
        bad = [g, g.at[1, 1, 1].set(jnp.nan)]
        (first, got), _ = problems.unroll(om.scale_by_noise(gamma=gamma), bad)
        assert (got[0] == 0).all() and (first[1] != 0).all()
        assert jnp.isnan(got).sum() == 1 and jnp.isnan(got[1, 1, 1])


def test_statistics_are_float32_and_the_momentum_has_mu_dtype():
    g = jnp.asarray(GRADS[0], "bfloat16")
    (got,), state = problems.unroll(om.scale_by_noise(mu_dtype="bfloat16"), [g])
    assert got.dtype == state.momentum.dtype == jnp.bfloat16
    assert state.variance.dtype == jnp.float32
    assert om.scale_by_noise().init(g).momentum.dtype == jnp.float32


def test_names_the_bad_argument():
    with pytest.raises(ValueError, match=r"`momentum` must lie in \[0, 1\), got 1"):
        om.scale_by_noise(1.0)
    with pytest.raises(ValueError, match=r"`gamma` must lie in \[0, inf\), got -1"):
        om.scale_by_noise(gamma=-1)
    with pytest.raises(ValueError, match=r"`eps` must lie in \(0, inf\), got 0"):
        om.scale_by_noise(eps=0.0)
