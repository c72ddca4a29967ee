"""Halley's iteration and its inverse: against float64, bounds, float32 limits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_matrix._linalg import Halley, halley_flops, halley_weights, spd_inverse
from tests.linalg.problems import SHAPES, gaussian, matrix, run
from tests.references import polar as reference


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bound, steps", [(1e-2, 1), (1e-1, 2), (1e-3, 3)])
def test_matches_float64_reference(shape, bound, steps):
    x = gaussian(shape)
    with jax.enable_x64(True):
        got = run(Halley(bound, steps), jnp.asarray(x))
    # Condition of I + cA (2e4 at most) times 2⁻⁵³.
    np.testing.assert_allclose(
        np.asarray(got), reference.halley(x, bound, steps), atol=1e-10
    )


@pytest.mark.parametrize("bound, error", [(1e-2, 3e-5), (1e-3, 1e-3), (1e-4, 2e-2)])
def test_float32_error_grows_as_the_bound_falls(bound, error):
    x = matrix(32, 64, 1.0 / bound)
    got = run(Halley(bound), x.astype(np.float32))
    off = np.abs(np.asarray(got) - reference.halley(x, bound)).max()
    # About c·2⁻²⁴, c = 1.6 ℓ^(-4/3): a fifteenfold loss per decade. Bounded from below
    # too, so that this table in the docstring does not age unseen.
    assert error / 100 < off < error


@pytest.mark.parametrize("bound, floor", [(1e-3, 0.248), (1e-2, 0.505), (1e-1, 0.865)])
def test_weights_map_the_interval_onto_what_they_promise(bound, floor):
    a, b, c = halley_weights(bound)
    sigma = np.geomspace(bound, 1.0, 5001)
    mapped = sigma * (a + b * sigma**2) / (1 + c * sigma**2)
    assert mapped.min() == pytest.approx(floor, abs=1e-3)
    # 1 is a fixed point and the maximum, to float64 rounding.
    assert mapped.max() == pytest.approx(1.0, abs=1e-12)
    assert halley_weights(1.0) == pytest.approx((3.0, 1.0, 3.0))


def test_two_steps_reach_the_polar_factor():
    x = matrix(8, 12, 100.0)
    got = run(Halley(1e-3, steps=4), x.astype(np.float32))
    # Float32 error of the first step at this bound, see above.
    chex.assert_trees_all_close(got, reference.polar(x).astype(np.float32), atol=1e-3)


def test_small_singular_values_stay_small():
    x = matrix(6, 9, "rank-deficient")
    got = run(Halley(), x.astype(np.float32))
    sigma = np.linalg.svd(np.asarray(got, np.float64))[1]
    assert sigma[:3].min() > 0.24
    # a·2⁻²⁴ for a = 252.
    assert sigma[3:].max() < 1e-4


def test_the_bound_stays_real_after_many_steps():
    x = gaussian((4, 6)).astype(np.float32)
    chex.assert_tree_all_finite(run(Halley(0.5, steps=9), x))


def test_two_large_products_a_step():
    m, n = 32, 512
    for steps in (1, 2):
        text = str(jax.make_jaxpr(Halley(steps=steps).polar)(jnp.zeros((m, n))))
        lines = [line for line in text.splitlines() if "dot_general" in line]
        large = [line for line in lines if f"f32[{m},{n}]" in line.split("=")[0]]
        assert len(large) == steps
        assert len(lines) == 3 * steps
        # Of both operands.
        assert text.count("Precision.HIGHEST") == 2 * len(lines)


def spd(m, condition, seed=0):
    """A symmetric positive definite matrix with largest eigenvalue 1."""
    turn = reference.orthogonal(np.random.default_rng(seed), m)
    return turn * np.geomspace(1.0, 1.0 / condition, m) @ turn.T


@jax.jit
def inverse(a):
    return spd_inverse(a, "highest")


@pytest.mark.parametrize("m", [1, 6, 21])
def test_the_inverse_matches_float64(m):
    a = np.stack([spd(m, 100.0, seed) for seed in range(2)])
    with jax.enable_x64(True):
        found = np.asarray(inverse(jnp.asarray(a)))
    np.testing.assert_allclose(found, np.linalg.inv(a), rtol=1e-10, atol=1e-11)


def test_the_inverse_in_float32():
    a = spd(48, 1e4).astype("float32")
    off = np.asarray(inverse(a), "float64") @ a.astype("float64") - np.eye(48)
    # The condition number times 2⁻²⁴, and a little for 48 sums.
    assert np.abs(off).max() < 3e-4


def test_the_inverse_reads_only_the_lower_triangle():
    a = spd(14, 10.0).astype("float32")
    other = np.tril(a) + np.triu(gaussian(a.shape), 1).astype("float32")
    chex.assert_trees_all_equal(inverse(other), inverse(a))


def test_the_inverse_is_nan_where_it_is_not_positive_definite_and_only_there():
    a = np.stack([np.eye(14, dtype="float32")] * 5)
    for i, (where, what) in enumerate([(0, -1), (7, -1), (13, -1), (13, np.nan)], 1):
        a[i, where, where] = what
    found = np.asarray(inverse(a))
    np.testing.assert_allclose(found[0], np.eye(14))
    assert np.isnan(found[1:]).all()


def test_flops_by_hand():
    # Two products of 2 · 16² · 40; a factorization, a triangular solve and a product.
    step = 2 * (2 * 16 * 16 * 40) + 16**3 // 3 + 16**3 + 2 * 16**3
    assert halley_flops(16, 40, 3) == halley_flops(40, 16, 3) == 3 * step
    for backend in (None, "cpu", "gpu", "tpu"):
        assert Halley(steps=3).flops(16, 40, "float64", backend) == 3 * step


@pytest.mark.parametrize("bound", [0.0, -1.0, 1.5, float("nan")])
def test_bad_bound_raises(bound):
    with pytest.raises(ValueError, match=r"`lower_bound` must lie in \(0, 1\]"):
        Halley(lower_bound=bound)
