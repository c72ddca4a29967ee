"""Eigenbases: from nothing, and followed by orthogonal iteration."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_matrix._linalg import eigenbasis
from tests.linalg.problems import power_step
from tests.references import polar
from tests.references import preconditioners as reference

compiled_basis = jax.jit(eigenbasis)
compiled_step = jax.jit(power_step, static_argnums=2)


def basis(a, dtype="float32"):
    with jax.enable_x64(dtype == "float64"):
        return np.asarray(compiled_basis(jnp.asarray(a, dtype)))


def step(a, q, sort=True, dtype="float32"):
    with jax.enable_x64(dtype == "float64"):
        moved = compiled_step(jnp.asarray(a, dtype), jnp.asarray(q, dtype), sort)
        return jax.tree.map(np.asarray, moved)


def grams():
    """Three G Gᵀ of (5, 8) normal entries."""
    g = np.random.default_rng(0).standard_normal((3, 5, 8))
    return g @ np.swapaxes(g, -2, -1)


def orthogonals():
    rng = np.random.default_rng(1)
    return np.stack([polar.orthogonal(rng, 5) for _ in range(3)])


def assert_orthogonal(q, atol):
    eye = np.eye(q.shape[-1])
    product = np.swapaxes(q, -2, -1) @ q
    np.testing.assert_allclose(product, np.broadcast_to(eye, q.shape), atol=atol)


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("float64", 1e-14)])
def test_eigenvectors_by_descending_eigenvalue(dtype, atol):
    for a in (grams(), grams()[0], grams()[0, :1, :1], grams().reshape(1, 3, 5, 5)):
        q = basis(a, dtype)
        assert q.dtype == dtype
        assert_orthogonal(q, atol)
        inside = np.swapaxes(q, -2, -1) @ a @ q
        values = np.linalg.eigvalsh(a)[..., ::-1]
        want = values[..., None] * np.eye(a.shape[-1])
        np.testing.assert_allclose(inside, want, atol=10 * atol * values.max())


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scale_does_not_matter(scale):
    inside = basis(scale * grams())
    inside = np.swapaxes(inside, -2, -1) @ grams() @ inside
    off_diagonal = inside * (1 - np.eye(5))
    np.testing.assert_allclose(off_diagonal, 0, atol=1e-4)
    got, order = step(scale * grams(), orthogonals())
    want, same = step(grams(), orthogonals())
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(order, same)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_matrix_harms_no_other_and_shows(bad):
    a, q = grams(), orthogonals()
    clean, clean_step = basis(a), step(a, q)[0]
    a[1, 2, 3] = a[1, 3, 2] = bad
    got, got_step = basis(a), step(a, q)[0]
    assert not np.isfinite(got[1]).all()
    assert not np.isfinite(got_step[1]).all()
    for i in (0, 2):
        np.testing.assert_array_equal(got[i], clean[i])
        np.testing.assert_array_equal(got_step[i], clean_step[i])


def test_an_antisymmetric_part_is_dropped():
    skew = np.random.default_rng(1).standard_normal((5, 5))
    got = basis(grams() + (skew - skew.T))
    along = np.abs(np.swapaxes(got, -2, -1) @ basis(grams()))
    np.testing.assert_allclose(along, np.stack([np.eye(5)] * 3), atol=1e-5)


def test_a_step_sorts_and_is_the_references():
    got, order = step(grams(), orthogonals(), True, "float64")
    plain, untouched = step(grams(), orthogonals(), False, "float64")
    assert_orthogonal(got, 1e-14)
    # One at least is not its own inverse.
    assert (order != np.argsort(order)).any()
    for i, (a, q) in enumerate(zip(grams(), orthogonals(), strict=True)):
        want = reference.descending(a, q)
        np.testing.assert_array_equal(order[i], want)
        np.testing.assert_array_equal(untouched[i], np.arange(5))
        # Columns have signs of their own.
        for moved, given in ((got[i], q[:, want]), (plain[i], q)):
            along = np.sum(moved * reference.next_basis(a, given), axis=0)
            np.testing.assert_allclose(np.abs(along), np.ones(5), atol=1e-13)
        # The leading column is a step of power iteration from the one put first.
        first = a @ q[:, want[0]]
        along = first @ got[i, :, 0] / np.linalg.norm(first)
        assert abs(along) == pytest.approx(1, abs=1e-13)


def test_a_batch_of_any_rank_is_its_matrices():
    got, order = step(grams()[None], orthogonals()[None], True, "float64")
    want, its_order = step(grams(), orthogonals(), True, "float64")
    assert order.shape == (1, 3, 5)
    np.testing.assert_allclose(got[0], want, atol=1e-14)
    np.testing.assert_array_equal(order[0], its_order)


@pytest.mark.parametrize("sort", [True, False])
def test_repeated_it_finds_the_eigenvectors(sort):
    vectors = orthogonals()
    a = vectors * np.array([1.0, 0.5, 0.2, 0.05, 0.01])
    a = a @ np.swapaxes(vectors, -2, -1)
    q, order = orthogonals()[[1, 2, 0]], None
    for _ in range(60):
        q, order = step(a, q, sort, "float64")
    # Ratios of at most a half: 2⁻⁶⁰, and rounding.
    along = np.abs(np.swapaxes(vectors, -2, -1) @ q)
    np.testing.assert_allclose(along, np.stack([np.eye(5)] * 3), atol=1e-13)
    np.testing.assert_array_equal(order, np.stack([np.arange(5)] * 3))


def test_eigenvectors_stay_and_are_put_in_order():
    found = basis(grams(), "float64")
    mixed = np.array([3, 0, 4, 2, 1])
    for given, want in ((np.arange(5), np.arange(5)), (mixed, np.argsort(mixed))):
        moved, order = step(grams(), found[..., given], True, "float64")
        np.testing.assert_array_equal(order, np.stack([want] * 3))
        along = np.abs(np.swapaxes(found, -2, -1) @ moved)
        np.testing.assert_allclose(along, np.stack([np.eye(5)] * 3), atol=1e-12)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_singular_matrices_leave_an_orthogonal_basis(rank):
    g = np.random.default_rng(0).standard_normal((3, 5, 8))
    g[..., rank:] = 0
    a = g @ np.swapaxes(g, -2, -1)
    q = basis(a)
    assert_orthogonal(q, 2e-6)
    order = None
    for _ in range(3):
        q, order = step(a, q)
        assert_orthogonal(q, 2e-6)
        np.testing.assert_array_equal(np.sort(order), np.stack([np.arange(5)] * 3))
    # Its range comes first.
    np.testing.assert_allclose((a @ q)[..., rank:], 0, atol=2e-5)


def test_jit_and_vmap_equal_eager():
    args = jnp.asarray(grams(), "float32"), jnp.asarray(orthogonals(), "float32")
    # Fusion and another batching may reorder sums.
    for fn, count in ((eigenbasis, 1), (power_step, 2)):
        want = fn(*args[:count])
        chex.assert_trees_all_close(jax.jit(fn)(*args[:count]), want, atol=1e-5)
        chex.assert_trees_all_close(jax.vmap(fn)(*args[:count]), want, atol=1e-5)


def test_strict_promotion_changes_nothing():
    a, q = jnp.asarray(grams(), "float32"), jnp.asarray(orthogonals(), "float32")
    want = compiled_basis(a), compiled_step(a, q, True)
    with jax.numpy_dtype_promotion("strict"):
        got = compiled_basis(a), compiled_step(a, q, True)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    chex.assert_trees_all_close(got, want, atol=1e-6)
