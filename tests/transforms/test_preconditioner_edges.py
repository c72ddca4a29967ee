"""Preconditioners where something is missing, zero, not finite, or at an end."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import optax_matrix as om
from optax_matrix._linalg import eigenbasis, inverse_root_by_newton
from tests.linalg.problems import power_step
from tests.references import preconditioners as reference
from tests.transforms import histories

RULES = {
    "shampoo": (om.shampoo_precondition, om.Shampoo),
    "soap": (om.soap_precondition, om.SOAP),
    "kl_soap": (om.kl_soap_precondition, om.KL),
    "kl_shampoo": (om.kl_shampoo_precondition, om.KL),
}


def test_soap_with_both_sides_left_out_is_adam_from_its_second_update_on():
    grads = histories.gradients((6, 4))
    tx = om.soap_precondition(eps=1e-20, preconditioner=om.SOAP(max_dim=1))
    got, _ = histories.of(tx, grads)
    assert not got[0].any()
    want, _ = histories.of(optax.scale_by_adam(0.95, 0.95, eps=1e-20), grads[1:])
    histories.close(got[1:], want, 1e-8)


@pytest.mark.parametrize("rule", [om.kl_soap_precondition, om.kl_shampoo_precondition])
def test_kl_with_both_sides_left_out_starts_with_zero(rule):
    tx = rule(preconditioner=om.KL(max_dim=1))
    got, _ = histories.of(tx, histories.gradients((6, 4), 2))
    assert not got[0].any()


def test_counting_stops_at_the_largest_int32():
    g = jnp.asarray(histories.gradients((5, 4), 1)[0], "float32")
    tx = om.shampoo_precondition(refresh=3)
    _, state = tx.update(g, tx.init(g))
    state = state._replace(count=jnp.asarray(2**31 - 1, "int32"))
    update, _ = tx.update(g, state)
    assert jnp.abs(update).max() > 0.1


@pytest.mark.parametrize(
    "a", [[[np.nan]], np.diag([np.nan, 2.0, 3.0]), np.diag([1.0, np.inf, 2.0])], ids=str
)
def test_eigenbasis_is_nan_where_the_matrix_is_not_finite(a):
    assert not np.isfinite(eigenbasis(jnp.asarray(a, "float32"))).any()


@pytest.mark.parametrize("a", [[[np.nan]], np.diag([np.nan, 2.0, 3.0])], ids=str)
def test_power_step_shows_what_is_not_finite(a):
    a = jnp.asarray(a, "float32")
    assert not np.isfinite(power_step(a, jnp.eye(len(a)))[0]).all()


def test_a_bad_one_by_one_statistic_is_a_failure():
    grads = histories.gradients((6, 1), 5)
    grads[2, 1, 0] = np.nan
    _, state = histories.of(om.soap_precondition(refresh=1), grads)
    assert state.matrices["6x1"].state.right.health.failures[-1, 0] == 3


def test_newtons_damping_is_relative_to_the_largest_eigenvalue():
    # The largest row is an eigenvector, of another eigenvalue.
    n = 100
    a = np.zeros((n, n))
    a[: n - 1, : n - 1] = 1 / (n - 1)
    a[-1, -1] = 0.11
    got = inverse_root_by_newton(jnp.asarray(a, "float32"), 4, 1e-3)
    want = reference.inverse_root(a, -1 / 4, 1e-3)
    assert np.abs(got.value - want).max() < 1e-2 * np.abs(want).max()


@pytest.mark.parametrize("seed", range(5))
def test_newtons_damping_is_within_a_few_percent_without_a_gap(seed):
    # In the null space of A, the inverse of A + damping * largest shows the largest.
    g = np.random.default_rng(seed).standard_normal((60, 40))
    u, s, _ = np.linalg.svd(g)
    a, null = jnp.asarray(g @ g.T, "float32"), u[:, -1]
    found = inverse_root_by_newton(a, 1, 0.1).value
    largest = 1 / (0.1 * (null @ np.asarray(found, np.float64) @ null))
    np.testing.assert_allclose(largest, s[0] ** 2, rtol=0.05)


def test_a_first_gradient_of_zero_does_not_stop_training_until_the_next_refresh():
    # As behind a layer whose kernel starts at zero.
    grads = histories.gradients((5, 4), 9)
    grads[0] = 0
    got, _ = histories.of(om.shampoo_precondition(), grads)
    assert (np.abs(got[1:]).max(axis=(1, 2)) > 0).all()


def moved(make, grads):
    """Returns a function from values to all updates and states of `make(**values)`."""

    def of(values):
        tx = make(**values)
        state = tx.init(grads[0])

        def step(state, g):
            update, state = tx.update(g, state)
            return state, (update, state.matrices)

        return jax.lax.scan(step, state, grads)[1]

    return of


@pytest.mark.parametrize("stagger", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "name",
    [
        "soap",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("shampoo", "kl_soap", "kl_shampoo")
        ),
    ],
)
def test_refresh_and_start_may_be_traced(name, stagger):
    make, settings = RULES[name]
    make = functools.partial(make, preconditioner=settings(stagger=stagger))
    grads = jnp.asarray(histories.gradients((3, 4, 3), 9), "float32")
    of = moved(make, grads)
    traced = jax.jit(of)
    start = {"start": 2} if name == "shampoo" else {}
    found = []
    for refresh in (3, 4):
        values = {"refresh": refresh} | start
        got, want = traced(values), jax.jit(lambda values=values: of(values))()
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), got, want
        )
        found.append(got[0])
    assert traced._cache_size() == 1
    assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.parametrize("name", RULES)
def test_refresh_can_be_injected_and_changed(name):
    make, _ = RULES[name]
    grads = jnp.asarray(histories.gradients((4, 3), 6), "float32")
    tx = optax.inject_hyperparams(make)(refresh=10)
    update, state = jax.jit(tx.update), tx.init(grads[0])
    seen = []
    for i, g in enumerate(grads):
        if i == 3:
            state.hyperparams["refresh"] = jnp.asarray(2)
        _, state = update(g, state)
        left = state.inner_state.matrices["4x3"].state.left
        seen.append(np.asarray(left.root if name == "shampoo" else left.basis))
    changed = [bool((a != b).any()) for a, b in itertools.pairwise(seen)]
    assert changed == [False, False, False, True, False]


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES.values()])
def test_strict_promotion_with_bfloat16(rule):
    g = jnp.ones((5, 4), "bfloat16")
    tx = rule(refresh=1)
    with jax.numpy_dtype_promotion("strict"):
        state = tx.init(g)
        for _ in range(2):
            _, state = tx.update(g, state)


def test_rows_that_pad_the_state_are_never_refreshed():
    # Three matrices for eight devices, replicated.
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Explicit,))
    settings = om.SOAP(stagger=True)
    tx = om.soap_precondition(refresh=2, preconditioner=settings)
    with jax.set_mesh(mesh):
        grads = jnp.asarray(histories.gradients((3, 4, 3), 5), "float32")
        grads = jax.device_put(grads, jax.P())
        state, update = tx.init(grads[0]), jax.jit(tx.update)
        for g in grads:
            _, state = update(g, state)
    numbers, own = state.matrices["4x3"]
    assert sorted(numbers.tolist()) == [-1] * 5 + [0, 1, 2]
    for side in (own.left, own.right):
        refreshed = np.abs(side.basis).max(axis=(1, 2)) > 0
        np.testing.assert_array_equal(refreshed, numbers >= 0)
