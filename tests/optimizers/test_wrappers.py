"""Optax's wrappers around every optimizer: what they make of its steps."""

import functools

import chex
import jax
import numpy as np
import optax
import pytest

import optax_matrix as om
from tests import problems

FEW = {"muonh", "soap"}
NAMES = [
    pytest.param(name, marks=() if name in FEW else pytest.mark.slow)
    for name in sorted(om.MATRIX_OPTIMIZERS)
]
PARAMS = {
    "kernel": problems.normal((6, 4)),
    "experts": {"kernel": problems.normal((2, 4, 5), 1)},
    "bias": problems.normal((4,), 2),
}
GRADS = [
    jax.tree.map(lambda p, i=i: problems.normal(p.shape, 10 + i), PARAMS)
    for i in range(4)
]


@functools.cache
def optimizer(name, **kwargs):
    """The optimizer, whose update is compiled once for all tests."""
    tx = om.make_optimizer(name, 0.05, **kwargs)
    return optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))


def close(got, want):
    chex.assert_trees_all_close(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(name, bad):
    tx = optimizer(name)
    hit = jax.tree.map(lambda g: g, GRADS[1])
    hit["experts"]["kernel"] = hit["experts"]["kernel"].at[1, 2, 3].set(bad)
    skipping = optax.apply_if_finite(tx, 3)
    got, state = problems.run(skipping, PARAMS, [GRADS[0], hit, GRADS[2]])
    want, plain = problems.run(tx, PARAMS, [GRADS[0], GRADS[2]])
    close(got[2], want[1])
    close(state.inner_state, plain)
    chex.assert_trees_all_equal(got[0], got[1])


@pytest.mark.parametrize("name", NAMES)
def test_lookahead_goes_half_way_after_every_second_step(name):
    tx = optimizer(name)
    params = optax.LookaheadParams.init_synced(PARAMS)
    ahead = optax.lookahead(tx, sync_period=2, slow_step_size=0.5)
    got, _ = problems.run(ahead, params, GRADS)

    fast = slow = PARAMS
    state = tx.init(fast)
    for count, grads in enumerate(GRADS, 1):
        updates, state = tx.update(grads, state, fast)
        fast = optax.apply_updates(fast, updates)
        if count % 2 == 0:
            fast = slow = jax.tree.map(lambda f, s: (f + s) / 2, fast, slow)
        close(got[count - 1].fast, fast)
        close(got[count - 1].slow, slow)


@pytest.mark.parametrize("name", NAMES)
def test_schedule_free_averages_what_the_optimizer_reaches(name):
    b1, rates = 0.9, (0.01, 0.02, 0.04, 0.04)  # a warmup, whose squares are weights
    tx = optimizer(name, momentum=0.0)  # the wrapper replaces it
    free = optax.contrib.schedule_free(tx, lambda t: jax.numpy.array(rates)[t - 1], b1)
    got, last = problems.run(free, PARAMS, GRADS)

    def mix(weight, a, b):
        return jax.tree.map(lambda p, q: (1 - weight) * p + weight * q, a, b)

    # The paper's recursion, with the optimizer's step in place of the gradient's.
    x = y = z = PARAMS
    state = tx.init(PARAMS)
    for count, grads in enumerate(GRADS, 1):
        updates, state = tx.update(grads, state, y)
        z = optax.apply_updates(z, updates)
        weights = np.square(rates[:count])
        x = mix(weights[-1] / weights.sum(), x, z)
        y = mix(b1, z, x)
        close(got[count - 1], y)
    close(optax.contrib.schedule_free_eval_params(last, got[-1]), x)


@pytest.mark.parametrize("name", NAMES)
def test_an_average_follows_the_parameters_and_does_not_change_them(name):
    tx = optimizer(name)
    got, state = problems.run(
        om.tail_average(tx, 1, horizon=4.0, weight=1.0), PARAMS, GRADS
    )
    want, _ = problems.run(tx, PARAMS, GRADS)
    close(got, want)
    average = want[0]
    for params in want[1:]:
        average = jax.tree.map(lambda a, p: a + (p - a) / 4, average, params)
    close(om.evaluation_params(state, got[-1]), average)


@pytest.mark.parametrize("name", NAMES)
def test_a_lookahead_is_ahead_of_the_average_movement(name):
    strength, gamma = 0.3, 0.9
    tx = optimizer(name)
    ahead = om.ema_lookahead(tx, strength, momentum=gamma)
    got, last = problems.run(ahead, PARAMS, GRADS)

    # The paper's recursion: the step is taken at `y`, from which `x` moves.
    x = y = PARAMS
    movement, state = jax.tree.map(lambda p: 0 * p, PARAMS), tx.init(PARAMS)
    for count, grads in enumerate(GRADS, 1):
        updates, state = tx.update(grads, state, y)
        new = optax.apply_updates(y, updates)
        movement = jax.tree.map(
            lambda m, n, x: gamma * m + (1 - gamma) * (n - x), movement, new, x
        )
        x = new
        y = jax.tree.map(lambda x, m: x + strength * m, x, movement)
        close(got[count - 1], y)
    close(om.evaluation_params(last, got[-1]), x)
