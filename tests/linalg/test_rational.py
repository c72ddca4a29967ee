"""Rational maps and their inverses: against float64, bounds, float32 limits."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_matrix._linalg import Halley, Zolotarev, spd_inverse, zolotarev
from optax_matrix._linalg.rational import rational_factor
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


@pytest.mark.parametrize(
    "method, error",
    [
        (Halley(1e-2), 2e-5),
        (Halley(1e-3), 4e-4),
        (Halley(1e-4), 5e-3),
        (Zolotarev(1e-2), 5e-5),
        (Zolotarev(3e-3), 3e-4),
        (Zolotarev(1e-3), 3e-3),
    ],
    ids=str,
)
def test_float32_error_grows_as_the_bound_falls(method, error):
    x = matrix(32, 64, 1.0 / method.lower_bound)
    got = np.asarray(run(method, x.astype(np.float32)))
    off = np.linalg.norm(got - reference.rational(x, method.maps[0]), 2)
    # About c·2⁻²⁴, with c = 1.6 ℓ^(-4/3) for one pole: a twentyfold loss per decade.
    # Bounded from below too, so that the docstrings do not age unseen.
    assert error / 3 < off < 3 * error


@pytest.mark.parametrize(
    "method, larger",
    [(Halley(5e-5), 5.2e-5), (Zolotarev(3.4e-4), 3.5e-4), (Zolotarev(6.9e-4, 3), 7e-4)],
    ids=str,
)
def test_a_bound_too_small_for_float32_raises(method, larger):
    x = jnp.zeros((3, 5), jnp.float32)
    for function in (method.polar, method.factor):
        with pytest.raises(ValueError, match=r"small .* poles in float32: with c"):
            jax.eval_shape(function, x)
    jax.eval_shape(dataclasses.replace(method, lower_bound=larger).polar, x)
    with jax.enable_x64(True):
        jax.eval_shape(method.polar, jnp.zeros((3, 5)))


def test_a_factor_needs_one_step_and_matrices():
    with pytest.raises(ValueError, match="Only a method with one step has a factor"):
        Halley(steps=2).factor(jnp.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"at least 2 axes \(..., m, n\), got shape"):
        rational_factor(jnp.zeros(3), zolotarev(0.1))
    with pytest.raises(TypeError, match="real floating array, got dtype int32"):
        Halley().factor(jnp.zeros((3, 5), "int32"))


@pytest.mark.parametrize(
    "bound, poles, floor",
    [
        (1e-3, 1, 0.248),
        (1e-2, 1, 0.505),
        (1e-1, 1, 0.866),
        (1e-3, 2, 0.664),
        (3e-3, 2, 0.771),
        (1e-2, 2, 0.878),
        (1e-3, 3, 0.883),
        # The smallest bound that settings accept.
        (1e-7, 1, 0.0117),
        (1e-7, 2, 0.120),
    ],
)
def test_maps_keep_what_they_promise_and_are_the_best_of_their_degree(
    bound, poles, floor
):
    h = zolotarev(bound, poles)
    sigma = np.geomspace(bound, 1.0, 20001)
    mapped = h(sigma)
    assert mapped.min() == pytest.approx(floor, abs=1e-3)
    assert mapped.max() == pytest.approx(1.0, abs=1e-9)
    assert h(1.0) == pytest.approx(1.0, abs=1e-12)
    # Chebyshev's criterion: the error has its largest values, with alternating signs,
    # 2r + 2 times.
    inner = np.flatnonzero(np.diff(np.sign(np.diff(mapped)))) + 1
    extrema = mapped[[0, *inner, -1]]
    want = [mapped.min(), 1.0] * (poles + 1)
    np.testing.assert_allclose(extrema, want, atol=1e-5)


@pytest.mark.parametrize("bound", [1e-4, 1e-3, 0.1, 0.9])
def test_one_pole_gives_the_published_weights(bound):
    sigma = np.geomspace(1e-6, 1.0, 50)
    want = reference.halley_map(sigma, bound)
    np.testing.assert_allclose(zolotarev(bound)(sigma), want, rtol=1e-9)


def test_at_one_it_is_the_classical_iteration():
    h = zolotarev(1.0)
    found = np.array([h.constant, *h.weights, *h.shifts])
    np.testing.assert_allclose(found, [1 / 3, 8 / 3, 3])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bound, poles", [(3e-3, 2), (1e-2, 3)])
def test_several_poles_match_float64_reference(shape, bound, poles):
    x = gaussian(shape)
    with jax.enable_x64(True):
        got = run(Zolotarev(bound, poles), jnp.asarray(x))
    want = reference.rational(x, zolotarev(bound, poles))
    np.testing.assert_allclose(np.asarray(got), want, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bound, polish", [(1e-3, 2), (1e-1, 1)])
def test_polishing_matches_float64_reference(shape, bound, polish):
    x = gaussian(shape)
    method = Halley(bound, polish=polish)
    with jax.enable_x64(True):
        got = run(method, jnp.asarray(x))

    def composed(s):
        s = reference.halley_map(s, bound)
        for a, b, c in method.rows:
            s = a * s + b * s**3 + c * s**5
        return s

    want = reference.rational(x, composed)
    np.testing.assert_allclose(np.asarray(got), want, atol=1e-9)


def test_two_steps_of_polish_after_one_step_are_close_to_orthogonal():
    x = matrix(12, 24, 500.0)
    # Of this matrix the Schatten-4 norm is 1.3 times the spectral norm.
    sigma = np.linalg.svd(np.asarray(run(Halley(1e-3, polish=2), x.astype("float32"))))
    assert np.abs(sigma[1] - 1).max() < 4e-3


def test_all_products_with_the_long_side_are_two():
    m, n = 8, 512
    for method in (Halley(), Halley(polish=2), Zolotarev(poles=3)):
        jaxpr = jax.make_jaxpr(method.polar)(jnp.zeros((m, n))).jaxpr
        products = [
            {var.aval.shape for var in (*equation.invars, *equation.outvars)}
            for equation in jaxpr.eqns
            if equation.primitive.name == "dot_general"
        ]
        long = [shapes for shapes in products if any(n in shape for shape in shapes)]
        gram, last = {(m, n), (n, m), (m, m)}, {(m, m), (m, n)}
        assert long == [gram, last]
        assert str(jaxpr).count("triangular_solve[") == len(method.maps[0].shifts)


def test_four_steps_reach_the_polar_factor():
    x = matrix(8, 12, 100.0)
    got = run(Halley(1e-3, steps=4), x.astype(np.float32))
    # Float32 error of the first step at this bound, see above.
    chex.assert_trees_all_close(got, reference.polar(x).astype(np.float32), atol=1e-3)


def test_small_singular_values_stay_small():
    x = matrix(6, 9, "rank-deficient")
    got = run(Halley(1e-3), x.astype(np.float32))
    sigma = np.linalg.svd(np.asarray(got, np.float64))[1]
    assert sigma[:3].min() > 0.24
    # a·2⁻²⁴ for a = 252.
    assert sigma[3:].max() < 1e-4


def test_the_bound_stays_real_after_many_steps():
    x = gaussian((4, 6)).astype(np.float32)
    chex.assert_tree_all_finite(run(Halley(0.5, steps=9), x))


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
    # One product and two triangular solves with the long side.
    solved = 2 * (2 * 16 * 16 * 31) + 16**3 // 3
    for backend in (None, "cpu", "gpu", "tpu"):
        for m, n in ((16, 40), (40, 16)):
            assert Halley(steps=3).flops(m, n, "float64", backend) == 3 * step
        for m, n in ((16, 31), (31, 16)):
            assert Halley(steps=3).flops(m, n, "float64", backend) == 3 * solved
    inverse = 16**3 // 3 + 3 * 16**3
    poles = 2 * (2 * 16 * 16 * 31) + 2 * inverse
    assert Zolotarev().flops(16, 31) == Zolotarev().flops(31, 16) == poles
    # QAQ, the squares of two steps, three products of the second, and one of factors.
    polish = 2 * (2 * 16 * 16 * 31) + inverse + (2 + 2 + 3 + 1) * 2 * 16**3
    assert Halley(polish=2).flops(31, 16) == polish


def test_square_and_wide_matrices_are_the_same_map():
    # Solved, and multiplied by an inverse.
    x = matrix(16, 16, 50.0)
    wide = np.concatenate([x, np.zeros((16, 20))], axis=1)
    with jax.enable_x64(True):
        got, want = run(Halley(), jnp.asarray(x)), run(Halley(), jnp.asarray(wide))
    np.testing.assert_allclose(got, want[:, :16], atol=1e-11)


@pytest.mark.parametrize("kind", [Halley, Zolotarev])
@pytest.mark.parametrize("bound", [0.0, 9e-8, -1.0, 1.5, float("nan")])
def test_bad_bound_raises(kind, bound):
    with pytest.raises(ValueError, match=r"`lower_bound` must lie in \[1e-07, 1\]"):
        kind(lower_bound=bound)


def test_bad_counts_raise():
    with pytest.raises(ValueError, match="`poles` must be at least 1"):
        Zolotarev(poles=0)
    with pytest.raises(ValueError, match="`polish` must be at least 0"):
        Halley(polish=-1)
    with pytest.raises(TypeError, match="`polish` must be an int"):
        Halley(polish=1.0)  # type: ignore
