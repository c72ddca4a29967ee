"""Powers of positive semidefinite matrices by both methods, against float64."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_matrix._linalg import inverse_root_by_newton, power_by_eigh
from tests.references import polar
from tests.references import preconditioners as reference

every = pytest.mark.parametrize("method", ["eigh", "newton"])
SIZE = 6


@partial(jax.jit, static_argnums=(0, 2))
def compiled(method, a, exponent, damping):
    if method == "eigh":
        return power_by_eigh(a, exponent, damping)
    return inverse_root_by_newton(a, round(-1 / exponent), damping)


def run(method, a, exponent, damping=0.0, dtype="float32"):
    """A power by either method, compiled once for each exponent, shape and type."""
    with jax.enable_x64(dtype == "float64"):
        found = compiled(method, jnp.asarray(a, dtype), exponent, damping)
        return jax.tree.map(np.asarray, found)


def matrix(condition, seed=0):
    """Positive definite, its largest eigenvalue 1 and its smallest 1 / condition."""
    q = polar.orthogonal(np.random.default_rng(seed), SIZE)
    return (q * np.geomspace(1.0, 1.0 / condition, SIZE)) @ q.T


def grams():
    """Three well-conditioned matrices."""
    g = np.random.default_rng(0).standard_normal((3, SIZE, 9))
    return g @ np.swapaxes(g, -2, -1)


def off_by(got, want):
    """The largest error relative to the largest entry."""
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


@pytest.mark.parametrize("exponent", [-1, -1 / 2, -1 / 3, -1 / 4, -1 / 8])
@every
def test_matches_float64_reference(method, exponent):
    scales, conditions = [1e4, 1e-8, 1e9], [1.5, 1e3, 1e12]
    batch = np.stack([matrix(c, seed=i) for i, c in enumerate(conditions)])
    batch *= np.array(scales)[:, None, None]
    for damping in (1e-6, 1e-2):
        got = run(method, batch, exponent, damping, "float64")
        for i, a in enumerate(batch):
            want = reference.inverse_root(a, exponent, damping)
            # 2⁻⁵² times the condition number after damping. Newton's largest eigenvalue
            # is from 16 steps of power iteration, exact where there is a gap.
            exact = method == "eigh" or conditions[i] > 10
            assert off_by(got.value[i], want) < (1e-9 if exact else 1e-2 * damping)
            assert got.residual[i] < 1e-9


@pytest.mark.parametrize("exponent", [-0.7, 0.5])
def test_eigh_takes_any_exponent(exponent):
    got = run("eigh", grams(), exponent, 1e-3, "float64").value
    for root, a in zip(got, grams(), strict=True):
        assert off_by(root, reference.inverse_root(a, exponent, 1e-3)) < 1e-12


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@every
def test_a_condition_number_of_1e12_without_damping(method, p):
    a = np.stack([matrix(1e12), *grams()[:2]])
    got = run(method, a, -1 / p, 0.0, "float64")
    # The smallest eigenvalue itself is known to 1e-4 only.
    assert off_by(got.value[0], reference.inverse_root(a[0], -1 / p, 0.0)) < 1e-3
    assert got.residual[0] < 1e-3
    # A condition number of 100: the power undoes the matrix.
    undone = np.linalg.matrix_power(got.value[1:], p) @ a[1:]
    np.testing.assert_allclose(undone, np.stack([np.eye(SIZE)] * 2), atol=1e-11)


@every
def test_float32_follows_float64(method):
    a = np.stack([matrix(1e12, seed) for seed in range(3)])
    # 2⁻²⁴ beside the damping, which is then the smallest eigenvalue: 6 % of 1e-6.
    for damping, bound in ((1e-6, 0.1), (1e-3, 1e-4)):
        got = run(method, a, -1 / 4, damping)
        assert got.value.dtype == got.residual.dtype == np.float32
        want = [reference.inverse_root(one, -1 / 4, damping) for one in a]
        assert off_by(got.value, np.stack(want)) < bound
        assert got.residual.max() < bound


@every
def test_float64_is_computed_in_float64(method):
    got = run(method, grams(), -1 / 4, 0.0, "float64")
    low = run(method, grams(), -1 / 4)
    assert got.value.dtype == got.residual.dtype == np.float64
    assert got.residual.max() < 1e-12 < low.residual.min()


@every
def test_a_batch_of_any_rank_is_its_matrices(method):
    a = np.stack([grams()[0], matrix(1e4), 1e7 * matrix(1e9), 1e-9 * grams()[1]])
    got = run(method, a.reshape(2, 2, SIZE, SIZE), -1 / 4, 1e-4, "float64")
    assert got.residual.shape == (2, 2)
    for i, one in enumerate(a):
        want = reference.inverse_root(one, -1 / 4, 1e-4)
        # Newton's largest eigenvalue is from power iteration, see above.
        assert off_by(got.value.reshape(a.shape)[i], want) < 1e-8


@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e10, 1e20])
@every
def test_scales_of_float32(method, scale):
    got = run(method, scale * grams(), -1 / 4, 1e-4)
    for root, a in zip(got.value, grams(), strict=True):
        want = reference.inverse_root(scale * a, -1 / 4, 1e-4)
        # The condition number is below 100; 30 steps of Newton.
        assert off_by(root, want) < 2e-5
    assert got.residual.max() < 2e-5


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every
def test_rank_one(method, dtype):
    v = np.random.default_rng(0).standard_normal((3, SIZE))
    a = v[:, :, None] * v[:, None, :]
    got = run(method, a, -1 / 4, 1e-4, dtype)
    for root, one in zip(got.value, a, strict=True):
        # 2⁻²⁴ beside the damping.
        assert off_by(root, reference.inverse_root(one, -1 / 4, 1e-4)) < 1e-3
    assert got.residual.max() < 1e-2


@every
def test_zero_gives_zero_beside_others(method):
    a = grams()
    a[1] = 0
    for damping in (0.0, 1e-6):
        got = run(method, a, -1 / 4, damping)
        assert not np.any(got.value[1]) and got.residual[1] == 0
        for i in (0, 2):
            want = reference.inverse_root(a[i], -1 / 4, damping)
            assert off_by(got.value[i], want) < 1e-5


def test_zero_gives_zero_whatever_the_power():
    for exponent in (-1, -0.7, 0, 0.5):
        got = run("eigh", np.zeros((3, SIZE, SIZE)), exponent, 1e-6)
        assert not np.any(got.value) and not np.any(got.residual)


@every
def test_one_by_one(method):
    got = run(method, np.array([4.0, 0.25, 0.0])[:, None, None], -1 / 2)
    np.testing.assert_allclose(got.value.ravel(), [0.5, 2, 0], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every
def test_a_bad_matrix_harms_no_other_and_shows(method, bad):
    a = grams()
    clean = run(method, a, -1 / 4, 1e-6)
    a[1, 2, 3] = a[1, 3, 2] = bad
    got = run(method, a, -1 / 4, 1e-6)
    # Not below any bound that a caller could set.
    assert not got.residual[1] <= 1e30
    for i in (0, 2):
        np.testing.assert_allclose(got.value[i], clean.value[i], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got.residual[i], clean.residual[i], atol=1e-6)


def test_eigh_takes_negative_eigenvalues_for_zero():
    a = np.stack([np.diag([4.0, 1.0, -0.1])] * 3)
    got = run("eigh", a, -1 / 2).value
    np.testing.assert_allclose(got[1], np.diag([0.5, 1, 0]), atol=1e-6)
    got = run("eigh", a, -1 / 2, 0.01).value
    want = np.diag(np.array([4.04, 1.04, 0.04]) ** -0.5)
    np.testing.assert_allclose(got[1], want, atol=1e-5)


@pytest.mark.parametrize("p", [1, 4])
def test_newton_says_when_it_does_not_get_there(p):
    singular, negative = np.diag([1.0, 0.5, 0.0]), np.diag([1.0, 0.5, -0.5])
    batch = np.stack([singular, negative, np.eye(3)])
    first, second, third = run("newton", batch, -1 / p).residual
    assert first > 0.9 and not second < 0.9 and third < 1e-6
    first, second, third = run("newton", batch, -1 / p, 1e-6).residual
    assert first < 0.1 and not second < 0.9 and third < 1e-6


@every
def test_an_antisymmetric_part_is_dropped(method):
    skew = np.random.default_rng(1).standard_normal((3, SIZE, SIZE))
    skew = skew - np.swapaxes(skew, -2, -1)
    want = run(method, grams(), -1 / 4).value
    got = run(method, grams() + skew, -1 / 4).value
    np.testing.assert_allclose(got, want, atol=1e-5)


@every
def test_vmap_equals_a_batch(method):
    def root(a):
        return compiled(method, a, -1 / 4, 1e-6)

    a = jnp.asarray(grams(), jnp.float32)
    want = root(a)
    # Fusion and another batching may reorder sums.
    chex.assert_trees_all_close(jax.vmap(root)(a), want, atol=1e-5)
    swapped = jax.vmap(root, in_axes=-1)(jnp.moveaxis(a, 0, -1))
    chex.assert_trees_all_close(swapped, want, atol=1e-5)


@every
def test_strict_promotion_changes_nothing(method):
    a = jnp.asarray(grams(), jnp.float32)
    want = compiled(method, a, -1 / 4, 1e-3)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        # A number, and a hyperparameter that was injected beside float64 parameters.
        for damping in (1e-3, jnp.asarray(1e-3, "float64")):
            got = jax.tree.map(np.asarray, compiled(method, a, -1 / 4, damping))
            chex.assert_trees_all_close(got, want, rtol=1e-6)
            chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
