"""switch_at: one optimizer, then another whose moments are warm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from tests import problems


def test_first_before_the_step_and_second_from_it_on():
    updates = list(problems.normal((5, 3, 2)))
    got, _ = problems.unroll(
        om.switch_at(3, optax.scale(2.0), optax.scale(-1)), updates
    )
    factors = [float(g[0, 0] / u[0, 0]) for g, u in zip(got, updates, strict=True)]
    assert factors == [2, 2, 2, -1, -1]


def test_second_has_seen_every_update_and_first_stops():
    updates = list(problems.normal((6, 3, 2)))
    first, second = om.ema_momentum(), optax.scale_by_adam()
    got, state = problems.unroll(om.switch_at(4, first, second), updates)
    want, adam = problems.unroll(second, updates)
    np.testing.assert_allclose(got[4], want[4], rtol=1e-6)
    np.testing.assert_allclose(got[5], want[5], rtol=1e-6)
    np.testing.assert_allclose(state.second.mu, adam.mu, rtol=1e-6)
    assert state.first.count == 4 and state.second.count == 6 and state.count == 6


def test_two_phase_recipe_trains_through_the_switch():
    params = {"kernel": problems.normal((6, 4))}
    tx = om.switch_at(3, om.hopper(0.05), optax.adam(0.05))
    adam_only = optax.adam(0.05)
    grads = [{"kernel": problems.normal((6, 4), t)} for t in range(5)]
    iterates, _ = problems.run(tx, params, grads)
    hopper, _ = problems.run(om.hopper(0.05), params, grads)
    adam, _ = problems.run(adam_only, params, grads)
    for t in range(3):
        np.testing.assert_allclose(
            iterates[t]["kernel"], hopper[t]["kernel"], rtol=1e-6
        )
    step = iterates[4]["kernel"] - iterates[3]["kernel"]
    adam_step = adam[4]["kernel"] - adam[3]["kernel"]
    # Differences of float32 parameters of size one.
    np.testing.assert_allclose(step, adam_step, atol=1e-6)


def test_step_can_be_injected_and_changed():
    tx = optax.inject_hyperparams(om.switch_at)(
        step=1, first=optax.scale(2.0), second=optax.scale(3.0)
    )
    u = jnp.ones((2, 2))
    state = tx.init(u)
    update = jax.jit(tx.update)
    for want in (2, 3):
        got, state = update(u, state)
        assert (got == want).all()
    state.hyperparams["step"] = jnp.asarray(10)
    got, _ = update(u, state)
    assert (got == 2).all()


def test_names_the_bad_argument():
    with pytest.raises(ValueError, match=r"`step` must lie in \[0, inf\), got -1"):
        om.switch_at(-1, optax.identity(), optax.identity())
