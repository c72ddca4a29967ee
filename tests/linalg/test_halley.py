"""Halley's iteration: against float64, its promise, its float32 limit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_matrix._linalg import Halley, halley_weights
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


@pytest.mark.parametrize("bound", [0.0, -1.0, 1.5, float("nan")])
def test_bad_bound_raises(bound):
    with pytest.raises(ValueError, match=r"`lower_bound` must lie in \(0, 1\]"):
        Halley(lower_bound=bound)
