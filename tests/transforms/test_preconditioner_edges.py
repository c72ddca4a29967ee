"""Preconditioners where something is missing, zero, not finite, or at an end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from optax_matrix._linalg import eigenbasis, inverse_root_by_newton
from tests.linalg.problems import power_step
from tests.references import preconditioners as reference
from tests.transforms import histories


def test_soap_with_both_sides_left_out_is_adam_from_its_second_update_on():
    grads = histories.gradients((6, 4))
    got, _ = histories.of(om.soap_precondition(max_dim=1, eps=1e-20), grads)
    assert not got[0].any()
    want, _ = histories.of(optax.scale_by_adam(0.95, 0.95, eps=1e-20), grads[1:])
    histories.close(got[1:], want, 1e-8)


@pytest.mark.parametrize("rule", [om.kl_soap_precondition, om.kl_shampoo_precondition])
def test_kl_with_both_sides_left_out_starts_with_zero(rule):
    got, _ = histories.of(rule(max_dim=1), histories.gradients((6, 4), 2))
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
    assert state.matrices["6x1"].right.health.failures[-1, 0] == 3


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


@pytest.mark.parametrize("name", ["moment_dtype", "factor_dtype"])
def test_a_dtype_that_is_none_names_the_argument(name):
    with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
        om.soap_precondition(**{name: "nonsense"})


def test_a_huge_exponent_for_newton_raises_at_construction():
    with pytest.raises(ValueError, match="`exponents`"):
        om.shampoo_precondition(exponents=(-1e9, None), root="newton")


def test_an_infinite_exponent_raises():
    with pytest.raises(ValueError, match="`exponents`"):
        om.shampoo_precondition(exponents=(-float("inf"), None))


def test_settings_that_are_no_mapping_name_the_argument():
    with pytest.raises((TypeError, ValueError), match="`preconditioner`"):
        om.shampoo(preconditioner=3)


def test_a_first_gradient_of_zero_does_not_stop_training_until_the_next_refresh():
    # As behind a layer whose kernel starts at zero.
    grads = histories.gradients((5, 4), 9)
    grads[0] = 0
    got, _ = histories.of(om.shampoo_precondition(), grads)
    assert (np.abs(got[1:]).max(axis=(1, 2)) > 0).all()


@pytest.mark.parametrize(
    "rule",
    [
        om.shampoo_precondition,
        om.soap_precondition,
        om.kl_soap_precondition,
        om.kl_shampoo_precondition,
    ],
)
def test_strict_promotion_with_bfloat16(rule):
    g = jnp.ones((5, 4), "bfloat16")
    tx = rule(refresh=1)
    with jax.numpy_dtype_promotion("strict"):
        state = tx.init(g)
        for _ in range(2):
            _, state = tx.update(g, state)
