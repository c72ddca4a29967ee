"""mixed_momentum, and schedules of the momentum: kernels written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_matrix as om
from tests import problems
from tests.references import optimizers as reference

STEPS = 30
GRADS = np.random.default_rng(0).standard_normal((STEPS, 4, 3))
WEIGHTS = np.linspace([0.8, 0.15, 0.05], [0.1, 0.2, 0.7], STEPS)
MU = np.concatenate([np.linspace(0.85, 0.95, 10), np.linspace(0.95, 0.85, 20)])


def table(values):
    """A schedule that looks values up."""
    return lambda count: jnp.asarray(values)[count]


def updates(tx):
    with jax.enable_x64(True):
        got, state = problems.unroll(tx, [jnp.asarray(g) for g in GRADS])
        return np.stack(got), state


def test_follows_its_formula_with_schedules():
    decays = (0.5, 0.9, 0.98)
    weights = [table(column) for column in WEIGHTS.T]
    got, state = updates(om.mixed_momentum(decays, weights, momentum=table(MU)))
    want = reference.mixed_momenta(GRADS, decays, WEIGHTS, MU)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    assert len(state.momenta) == 3 and state.count == STEPS


def test_the_defaults_are_those_of_bi_maxwell():
    got, _ = updates(om.mixed_momentum())
    weights = np.tile([0.4385, 0.5615], (STEPS, 1))
    want = reference.mixed_momenta(GRADS, (0.85, 0.98), weights, np.full(STEPS, 0.95))
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_one_decay_is_ema_momentum():
    got, _ = updates(om.mixed_momentum((0.9,), (1.0,), momentum=0.9))
    want, _ = updates(om.ema_momentum(0.9))
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)


def test_the_momentum_of_ema_momentum_may_be_a_schedule():
    got, _ = updates(om.ema_momentum(table(MU)))
    want = reference.scheduled_momenta(GRADS, MU)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_the_state_has_mu_dtype():
    g = problems.normal((4, 3))
    state = om.mixed_momentum(mu_dtype="bfloat16").init(g)
    assert [m.dtype for m in state.momenta] == [jnp.bfloat16] * 2


@pytest.mark.parametrize(
    "given, message",
    [
        ({"decays": (), "weights": ()}, "same length, at least 1, got 0 and 0"),
        ({"decays": (0.9,)}, "same length, at least 1, got 1 and 2"),
        ({"decays": (0.9, 1.0)}, r"`decays` must lie in \[0, 1\)"),
        ({"weights": (0.9, -1.0)}, r"`weights` must lie in \[0, inf\)"),
        ({"momentum": 1.0}, r"`momentum` must lie in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        om.mixed_momentum(**given)
