"""track3 against the step of modded-nanogpt's record 46, with its wrappers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from tests import problems
from tests.references import optimizers, preconditioners
from tests.transforms import histories

STEPS = histories.STEPS
# Every schedule of the record, in miniature.
RATES = np.concatenate([np.full(18, 0.0375), np.linspace(0.0375, 0.0, 13)[1:]])
MU = np.concatenate([np.linspace(0.85, 0.95, 8), np.linspace(0.95, 0.85, 22)])
AHEAD = np.where((np.arange(STEPS + 1) >= 5) & (np.arange(STEPS + 1) < 20), 0.3, 0.0)
START, HORIZON = 20, 6.0


MORE = [(6, 6), (5, 8)]


def table(values):
    return lambda count: jnp.asarray(values)[jnp.minimum(count, len(values) - 1)]


def run(tx, shape, gradient):
    """The parameters to train and to evaluate, and the first bases."""
    with jax.enable_x64(True):
        w = jnp.asarray(problems.normal(shape, 5), "float64")
        params = {"up": {"kernel": w}}
        state, trained, shown, bases = tx.init(params), [], [], None
        for t in range(STEPS):
            grads = {"up": {"kernel": jnp.asarray(gradient(t, np.asarray(w)))}}
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            w = params["up"]["kernel"]
            trained.append(w)
            shown.append(om.evaluation_params(state, params)["up"]["kernel"])
            if bases is None:
                (stack,) = optax.tree.get(state, "matrices").values()
                own = stack.state
                bases = np.asarray(own.left.basis[0]), np.asarray(own.right.basis[0])
    return np.stack(trained), np.stack(shown), bases


@pytest.mark.parametrize(
    "shape", [(8, 5), *(pytest.param(s, marks=pytest.mark.slow) for s in MORE)]
)
def test_agrees_with_the_record_in_float64(shape):
    grads = histories.gradients(shape)
    tx = om.track3(table(RATES), momentum=table(MU))
    got, same, bases = run(tx, shape, lambda t, w: grads[t])
    np.testing.assert_array_equal(got, same)
    white = preconditioners.whitened_momentum(grads, mus=MU, b2=0.9, first_bases=bases)
    want = optimizers.track3(problems.normal(shape, 5), white, RATES)
    # Schedules are float32, and twelve iterations amplify what is small.
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_agrees_with_the_record_around_which_it_looks_ahead_and_averages():
    # The gradient depends on where it is taken.
    noise = histories.gradients((6, 6))
    target = np.asarray(problems.normal((6, 6), 9), np.float64)

    def gradient(t, w):
        return w - target + 0.3 * noise[t]

    tx = om.track3(table(RATES), momentum=table(MU))
    ahead = om.ema_lookahead(tx, table(AHEAD), momentum=0.99)
    whole = om.tail_average(ahead, START, horizon=HORIZON, weight=0.6)
    _, shown, bases = run(whole, (6, 6), gradient)

    x = np.asarray(problems.normal((6, 6), 5), np.float64)
    m, average, seen, want = 0.0, None, [], []
    for t in range(STEPS):
        y = x + AHEAD[t] * m
        seen.append(gradient(t, y))
        white = preconditioners.whitened_momentum(
            seen, mus=MU[: t + 1], b2=0.9, first_bases=bases
        )
        (new,) = optimizers.track3(y, white[-1:], RATES[t : t + 1])
        m = 0.99 * m + 0.01 * (new - x)
        x = new
        average = x if t + 1 <= START else average + (x - average) / HORIZON
        want.append(0.4 * x + 0.6 * average)
    np.testing.assert_allclose(shown, np.stack(want), atol=5e-6)


def test_the_norm_is_that_of_radial_parts_and_decay_alone():
    # Without decay and with a brake of 0, nothing but the floor moves the norm; steps
    # that are floored keep their direction per output, so they are not tangential.
    params = {"kernel": problems.normal((6, 6))}
    tx = om.track3(0.01, outward=0.0, floor=0.0, weight_decay=0.0)
    grads = [{"kernel": problems.normal((6, 6), t)} for t in range(1, 11)]
    iterates, _ = problems.run(tx, params, grads)
    norms = np.array([np.linalg.norm(w["kernel"]) for w in iterates])
    start = np.linalg.norm(params["kernel"])
    # What shortens is not braked: no norm is above the one before.
    assert (np.diff(norms, prepend=start) <= 1e-5).all()


def test_the_mask_says_what_decays():
    params = {"a": {"kernel": problems.normal((4, 4))}}
    params |= {"b": {"kernel": problems.normal((4, 4), 1)}}
    mask = {"a": {"kernel": True}, "b": {"kernel": False}}

    def step(**settings):
        tx = om.track3(0.5, weight_decay=0.1, routing="matrix", **settings)
        return tx.update(params, tx.init(params), params)[0]

    tx = om.track3(0.5, weight_decay=0.0, routing="matrix")
    none, _ = tx.update(params, tx.init(params), params)
    both = step()
    for given in (mask, lambda tree: jax.tree.map(lambda x: x is not None, tree)):
        some = step(weight_decay_mask=given)
        np.testing.assert_array_equal(some["a"]["kernel"], both["a"]["kernel"])
    some = step(weight_decay_mask=mask)
    np.testing.assert_array_equal(some["b"]["kernel"], none["b"]["kernel"])
    assert np.abs(both["b"]["kernel"] - none["b"]["kernel"]).max() > 1e-3
