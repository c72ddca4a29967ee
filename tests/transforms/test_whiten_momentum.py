"""whiten_momentum: the rule of the modded-nanogpt record, and what differs in SOAP."""

import jax.numpy as jnp
import numpy as np
import pytest

import optax_matrix as om
from tests import problems
from tests.references import optimizers
from tests.references import preconditioners as reference
from tests.transforms import histories

MU = np.concatenate([np.linspace(0.85, 0.95, 10), np.linspace(0.95, 0.85, 20)])


def scheduled(count):
    return jnp.asarray(MU)[count]


def first_bases(state, shape, i):
    own = state.matrices["x".join(map(str, shape))].state
    return own.left.basis[0, i], own.right.basis[0, i]


@pytest.mark.parametrize(
    "given, settings",
    [
        ({}, {}),
        ({"momentum": scheduled, "refresh": 3}, {"mus": MU}),
        ({"momentum": 0.8, "b2": 0.7, "eps": 0.3}, {"b2": 0.7, "eps": 0.3}),
    ],
    ids=["record", "scheduled", "other"],
)
def test_matches_float64_reference(given, settings):
    grads = histories.gradients(histories.SHAPES)
    got, state = histories.of(om.whiten_momentum(**given), grads)
    momentum = given.get("momentum", 0.95)
    settings = {"mus": np.full(histories.STEPS, momentum), "b2": 0.9} | settings
    settings["refresh"] = given.get("refresh", 1)
    count = dict.fromkeys(grads, 0)
    for name, found, own in histories.pairs(got, grads):
        bases = first_bases(state, own.shape[1:], count[name])
        count[name] += 1
        want = reference.whitened_momentum(own, first_bases=bases, **settings)
        histories.close(found, want, 1e-6 if "mus" in given else 1e-7, name)


@pytest.mark.parametrize("late", [0, 12])
def test_a_mixture_of_averages_matches_float64_reference(late):
    grads = histories.gradients({"w": (6, 5)})
    after = np.arange(histories.STEPS)[:, None] >= late
    shares = np.where(after, [0.0, 0.4385, 0.5615], [1.0, 0.0, 0.0])
    decays = (0.95, 0.85, 0.98)
    weights = [lambda c, w=w: jnp.asarray(w)[c] for w in shares.T]
    tx = om.whiten_momentum(scheduled, decays=decays, weights=weights)
    got, state = histories.of(tx, grads)
    momenta = state.matrices["6x5"].state.momentum
    assert [m.shape[1:] for m in momenta] == [(1, 6, 5)] * 3
    ahead = optimizers.mixed_momenta(grads["w"], decays, shares, MU)
    want = reference.whitened_momentum(
        grads["w"],
        mus=MU,
        b2=0.9,
        first_bases=first_bases(state, (6, 5), 0),
        ahead=ahead,
    )
    histories.close(got["w"], want, 1e-6)


def test_bad_mixtures_raise():
    with pytest.raises(ValueError, match="`decays` and `weights` must have the same"):
        om.whiten_momentum(decays=(0.9,), weights=(0.5, 0.5))
    with pytest.raises(ValueError, match="`decays` and `weights` must be given toget"):
        om.whiten_momentum(decays=(0.9,))


def test_the_first_update_is_the_momentum():
    grads = histories.gradients({"w": (5, 4)}, 1)
    got, _ = histories.of(om.whiten_momentum(), grads)
    want = optimizers.momenta(grads["w"], 0.95)
    np.testing.assert_allclose(got["w"], want, rtol=1e-12)


def test_settings_of_the_kl_rule_raise():
    with pytest.raises(TypeError, match="`preconditioner` must be a `SOAP`"):
        om.whiten_momentum(preconditioner=om.KL())  # type: ignore


def test_a_failed_refresh_keeps_the_last_good_bases():
    tx = om.whiten_momentum()
    good, bad = problems.normal((4, 3)), jnp.full((4, 3), jnp.nan)
    _, state = tx.update(good, tx.init(good))
    _, after = tx.update(bad, state)
    own = [s.matrices["4x3"].state.left for s in (state, after)]
    np.testing.assert_array_equal(own[0].basis, own[1].basis)
    assert own[1].health.failures[0] == 1
