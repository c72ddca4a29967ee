"""ema_lookahead, tail_average, evaluation_params: trajectories in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_matrix as om
from tests import problems

STEPS, START, HORIZON = 30, 12, 5.0
TARGET = np.random.default_rng(0).standard_normal((4, 3))
BETA = np.where((np.arange(STEPS + 1) >= 6) & (np.arange(STEPS + 1) < 24), 0.7, 0.0)


def gradient(w):
    """Of a function that is not quadratic, so that the place matters."""
    return np.tanh(w - TARGET) + 0.1 * w**3


def table(values):
    return lambda count: jnp.asarray(values)[count]


def trained(tx, steps=STEPS):
    """The parameters to train and to evaluate after each step."""
    with jax.enable_x64(True):
        params = {"w": jnp.asarray(problems.normal((4, 3), 3), "float64"), "none": None}
        state, seen = tx.init(params), []
        for _ in range(steps):
            grads = {"w": jnp.asarray(gradient(np.asarray(params["w"]))), "none": None}
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            shown = om.evaluation_params(state, params)
            seen.append((np.asarray(params["w"]), np.asarray(shown["w"])))
    return [np.stack(x) for x in zip(*seen, strict=True)]


def lookahead(rate, gamma):
    """EMA-Nesterov around gradient descent: the iterates without the look-ahead."""
    x, m, out = np.asarray(problems.normal((4, 3), 3), np.float64), 0.0, []
    for t in range(STEPS):
        y = x + BETA[t] * m
        new = y - rate * gradient(y)
        m = gamma * m + (1 - gamma) * (new - x)
        x = new
        out.append((x + BETA[t + 1] * m, x))
    return [np.stack(z) for z in zip(*out, strict=True)]


def test_the_lookahead_follows_its_formula():
    tx = om.ema_lookahead(optax.sgd(0.1), table(BETA), momentum=0.9)
    got, want = trained(tx), lookahead(0.1, 0.9)
    for mine, yours in zip(got, want, strict=True):
        # BETA is in float32.
        np.testing.assert_allclose(mine, yours, rtol=1e-6, atol=1e-7)
    ahead = np.abs(want[0] - want[1]).max(axis=(1, 2))
    assert ahead[:5].max() == 0 and ahead[6:20].min() > 1e-3 and ahead[-1] == 0


def averaged(xs, weight):
    a, out = None, []
    for t, x in enumerate(xs, start=1):
        a = x if t <= START else a + (x - a) / HORIZON
        out.append((1 - weight) * x + weight * a)
    return np.stack(out)


@pytest.mark.parametrize("weight", [0.6, 1.0])
def test_the_tail_average_follows_its_formula(weight):
    tx = om.tail_average(optax.sgd(0.1), START, horizon=HORIZON, weight=weight)
    trajectory, shown = trained(tx)
    plain, same = trained(optax.sgd(0.1))
    np.testing.assert_array_equal(trajectory, plain)
    np.testing.assert_array_equal(plain, same)
    np.testing.assert_allclose(shown, averaged(plain, weight), rtol=1e-6)
    assert np.abs(shown[-1] - plain[-1]).max() > 1e-4


@pytest.mark.parametrize("outer", ["average", "lookahead"])
def test_they_nest_both_ways(outer):
    def ahead(tx):
        return om.ema_lookahead(tx, table(BETA), momentum=0.9)

    def average(tx):
        return om.tail_average(tx, START, horizon=HORIZON)

    first, second = (average, ahead) if outer == "average" else (ahead, average)
    trajectory, shown = trained(first(second(optax.sgd(0.1))))
    want, xs = lookahead(0.1, 0.9)
    np.testing.assert_allclose(trajectory, want, rtol=1e-6, atol=1e-7)
    # Either way the average is of the parameters without the look-ahead.
    np.testing.assert_allclose(shown, averaged(xs, 0.6), rtol=1e-6, atol=1e-7)


def test_evaluation_params_finds_the_wrapper_in_a_chain():
    params = {"kernel": problems.normal((4, 3)), "bias": jnp.ones(3)}
    chain = optax.chain(
        optax.clip_by_global_norm(1.0), om.tail_average(om.muon(0.02), START)
    )
    state = chain.init(params)
    shown = om.evaluation_params(state, params)
    jax.tree.map(np.testing.assert_array_equal, shown, params)
    assert om.evaluation_params(om.muon(0.02).init(params), params) is params


def test_the_state_of_an_nnx_optimizer_is_understood():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    tx = om.tail_average(optax.sgd(0.1), 0, horizon=2.0, weight=1.0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    start = np.asarray(model.kernel[...])
    params = nnx.state(model, nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, params))
    params = nnx.state(model, nnx.Param)
    shown = om.evaluation_params(optimizer.opt_state, params)
    # Half of the step of 0.1.
    np.testing.assert_allclose(shown["kernel"][...], start - 0.05, rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda s: om.ema_lookahead(optax.sgd(0.1), s),
        lambda s: om.tail_average(optax.sgd(0.1), 1, weight=s),
        lambda s: optax.inject_hyperparams(om.ema_lookahead)(optax.sgd(0.1), float(s)),
    ],
)
def test_states_can_be_donated_and_given_arrays_used_again(make):
    strength = jnp.float32(0.3)
    tx, w = make(strength), problems.normal((4, 3))
    state, step = tx.init(w), jax.jit(tx.update, donate_argnums=1)
    for _ in range(2):
        _, state = step(w, state, w)
    assert strength == np.float32(0.3)


def test_wrappers_within_a_partition_raise():
    params = {"a": problems.normal((4, 3)), "b": problems.normal((4, 3), 1)}
    wrapped = om.tail_average(optax.sgd(0.1), START)
    for other in (wrapped, optax.sgd(0.1)):
        split = {"a": wrapped, "b": other}
        tx = optax.partition(split, {"a": "a", "b": "b"})
        with pytest.raises(ValueError, match="must wrap a whole optimizer"):
            om.evaluation_params(tx.init(params), params)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda tx: om.ema_lookahead(tx, -0.1), "`strength` must lie"),
        (lambda tx: om.ema_lookahead(tx, momentum=1.0), "`momentum` must lie"),
        (lambda tx: om.tail_average(tx, -1), "`start` must be at least 0"),
        (lambda tx: om.tail_average(tx, 0, horizon=0.5), "`horizon` must lie"),
        (lambda tx: om.tail_average(tx, 0, weight=1.1), r"must lie in \[0, 1\], got"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(optax.sgd(0.1))
    with pytest.raises(TypeError, match="`inner` must be an optax"):
        om.ema_lookahead(0.1)  # type: ignore
