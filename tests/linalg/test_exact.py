"""The exact polar factor: rank handling and its derivative."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_matrix._linalg import Exact
from tests.linalg.problems import SHAPES, gaussian, matrix, run
from tests.references import polar as reference

BOTH = [Exact("svd"), Exact("eigh")]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("exact", BOTH)
def test_matches_float64_reference(exact, shape):
    x = gaussian(shape)
    got = run(exact, x.astype(np.float32))
    # "eigh" squares the condition number: 1e3 at most here, times 2⁻²⁴.
    chex.assert_trees_all_close(got, reference.polar(x).astype(np.float32), atol=2e-4)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (6, 6)])
@pytest.mark.parametrize("exact", BOTH)
def test_rank_deficient_gives_the_partial_isometry(exact, shape):
    x = matrix(shape[0], shape[1], "rank-deficient")
    got = np.asarray(run(exact, x.astype(np.float32)))
    # Float32 rounding of a well-conditioned factor.
    np.testing.assert_allclose(got, reference.polar(x, rank=3), atol=1e-5)
    np.testing.assert_allclose(run(exact, got), got, atol=1e-5)


def test_svd_sees_what_eigh_does_not():
    x = matrix(4, 6, 1e5).astype(np.float32)
    rank = [np.linalg.matrix_rank(run(e, x), tol=0.5) for e in BOTH]
    # Cutoffs 6·2⁻²³ and its root, 8e-4; values 1, 2e-2, 5e-4, 1e-5.
    assert rank == [4, 2]


def directional(f, x, dx, step):
    return (np.asarray(f(x + step * dx)) - np.asarray(f(x - step * dx))) / (2 * step)


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (2, 5, 3)])
@pytest.mark.parametrize("kind", ["random", "repeated"])
@pytest.mark.parametrize("exact", BOTH)
def test_derivative_matches_finite_differences(exact, kind, shape):
    x = gaussian(shape, seed=3)
    if kind == "repeated":
        # Two pairs of equal singular values: the derivative of the SVD is infinite.
        x = np.broadcast_to(reference.polar(x) * 2.0, shape).copy()
    dx = gaussian(shape, seed=4)
    with jax.enable_x64(True):
        x, dx = jnp.asarray(x), jnp.asarray(dx)
        _, got = jax.jit(lambda y, dy: jax.jvp(exact.polar, (y,), (dy,)))(x, dx)
        want = directional(lambda y: run(exact, y), x, dx, 1e-5)
        weight = jnp.asarray(gaussian(shape, seed=5))
        gradient = jax.jit(jax.grad(lambda y: jnp.vdot(weight, exact.polar(y))))(x)
        forward, backward = jnp.vdot(weight, got), jnp.vdot(gradient, dx)
    # Central differences: step² times a third derivative of order 100.
    np.testing.assert_allclose(np.asarray(got), want, atol=1e-6)
    np.testing.assert_allclose(forward, backward, rtol=1e-10)


@pytest.mark.parametrize("exact", BOTH)
def test_derivative_of_a_partial_isometry_keeps_the_rank(exact):
    left, right = gaussian((5, 2), 6), gaussian((2, 4), 7)
    dleft, dright = gaussian((5, 2), 8), gaussian((2, 4), 9)

    def f(t):
        return run(exact, (left + t * dleft) @ (right + t * dright))

    with jax.enable_x64(True):
        _, got = jax.jvp(f, (jnp.asarray(0.0),), (jnp.asarray(1.0),))
        want = (np.asarray(f(1e-5)) - np.asarray(f(-1e-5))) / 2e-5
    # As above; "eigh" rounds the zero eigenvalues to 1e-16 and thus σ to 1e-8.
    np.testing.assert_allclose(np.asarray(got), want, atol=1e-5)


def test_bad_method_raises():
    with pytest.raises(ValueError, match="`method` must be one of 'svd', 'eigh'"):
        Exact(method="qr")  # pyright: ignore[reportArgumentType]
