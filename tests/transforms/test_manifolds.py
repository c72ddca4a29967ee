"""Weights kept at a spectral norm, below one, or orthonormal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from optax_matrix import _layout, _linalg
from optax_matrix._transforms import _top_singular
from tests import problems
from tests.references import optimizers as reference

STEPS = 30
slow = pytest.mark.slow
SHAPES = [(2, 5, 3), *(pytest.param(s, marks=slow) for s in ((7, 4), (4, 7)))]


def spectral(w):
    return np.linalg.norm(np.asarray(w, np.float64), 2, axis=(-2, -1), keepdims=True)


def on_sphere(w, radius):
    return w * radius * np.sqrt(w.shape[-1] / w.shape[-2]) / spectral(w)


def polar(w):
    u, _, vt = np.linalg.svd(w, full_matrices=False)
    return u @ vt


def q_factor(w):
    """Gram-Schmidt over the neurons of the smaller side."""
    if w.ndim > 2:
        return np.stack([q_factor(x) for x in w])
    if w.shape[0] < w.shape[1]:
        return q_factor(w.T).T
    columns = []
    for x in w.T:
        for _ in range(2):
            x = x - sum((c * (c @ x) for c in columns), np.zeros_like(x))
        columns.append(x / np.linalg.norm(x))
    return np.stack(columns, axis=1)


RULES = {
    "sphere": (lambda: om.spectral_sphere_retract(0.7), lambda w: on_sphere(w, 0.7)),
    "cap": (
        lambda: om.spectral_norm_cap(2.2),
        lambda w: w * np.minimum(1, 2.2 / spectral(w)),
    ),
    "polar": (om.stiefel_retract, polar),
    "qr": (lambda: om.stiefel_retract("qr"), q_factor),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "name", ["sphere", pytest.param("cap", marks=slow), "polar", "qr"]
)
def test_follows_its_formula_over_many_steps(name, shape):
    factory, project = RULES[name]
    steps = np.random.default_rng(0).normal(0, 0.1, (STEPS, *shape))
    with jax.enable_x64(True):
        w = problems.normal(shape, 7, "float64")
        want = np.asarray(w)
        iterates, _ = problems.run(factory(), w, [jnp.asarray(s) for s in steps])
    norms = []
    for got, step in zip(iterates, steps, strict=True):
        want = project(want + step)
        norms.append(spectral(want))
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-11)
    if name == "cap":  # It acts on some steps and not on others.
        assert np.min(norms) < 2.19 and np.max(norms) > 2.2 - 1e-9


@functools.cache
def walk(make, shape, length, dtype="float32"):
    """The parameters after each of the last 5,000 of many random steps."""
    tx, w = make(), problems.normal(shape, dtype=dtype)

    def step(carry, key):
        w, state = carry
        u = jax.random.normal(key, shape)
        u *= length / jnp.linalg.norm(u, axis=(-2, -1), keepdims=True)
        u, state = tx.update(u.astype(w.dtype), state, w)
        # Rounded, which XLA would otherwise skip from one step to the next.
        w = jax.lax.reduce_precision(optax.apply_updates(w, u), 8, 23)
        return (w, state), w

    keys = jax.random.split(jax.random.key(0), 10_000)
    scan = jax.jit(jax.lax.scan, static_argnums=0)
    _, seen = scan(step, (w, tx.init(w)), keys)
    return np.asarray(seen[-5000:], np.float64)


def sphere():
    return om.spectral_sphere_retract()


@slow
@pytest.mark.parametrize(
    "shape, length",
    [
        ((8, 6), 0.1),
        ((24, 16), 0.2),
        ((2, 48, 40), 0.02),
    ],
)
def test_the_spectral_norm_holds_over_10_000_steps(shape, length):
    seen = walk(sphere, shape, length)
    ratios = spectral(seen) / np.sqrt(shape[-1] / shape[-2])
    assert spectral(seen[-1] - seen[0]).min() > 0.4 * spectral(seen[0]).min()
    # The float32 rounding of the entries, of the products and of the norm.
    np.testing.assert_allclose(ratios, 1, atol=1e-6)


@slow
def test_the_spectral_norm_of_bfloat16_params_is_off_by_their_rounding():
    seen = walk(sphere, (12, 8), 0.1, dtype="bfloat16")
    # Roundings of up to 2⁻⁹ of each entry, most of which cancel, and no drift.
    assert np.abs(spectral(seen) / np.sqrt(8 / 12) - 1).max() < 4e-3


@pytest.mark.parametrize("method", [pytest.param("polar", marks=slow), "qr"])
def test_orthonormal_weights_stay_so_over_10_000_steps(method):
    seen = walk(functools.partial(om.stiefel_retract, method), (6, 4), 0.1)
    assert np.abs(seen[-1] - seen[0]).max() > 0.3
    error = np.swapaxes(seen, -2, -1) @ seen - np.eye(4)
    assert np.abs(error).max() < 1e-6  # a few roundings of float32


@slow
def test_orthonormal_bfloat16_weights_are_off_by_their_rounding():
    seen = walk(om.stiefel_retract, (4, 6), 0.1, dtype="bfloat16")
    error = seen @ np.swapaxes(seen, -2, -1) - np.eye(4)
    assert np.abs(error).max() < 2e-2


def found(w, right=None):
    ((view, _),) = _layout.tree_views(None, w)
    right = _top_singular.first_vector(view, w) if right is None else right
    return _top_singular.top_singular(view, w, right)


@pytest.mark.parametrize("gap", [0.3, 1e-2, 1e-3, 1e-4, 1e-6, 0.0])
def test_the_value_converges_even_if_the_vector_does_not(gap):
    rest = np.linspace(0.9, 0.1, 38)
    w = jnp.asarray(problems.with_spectrum((40, 60), [1, 1 - gap, *rest]), jnp.float32)
    first = found(w)
    # From any start, no more than the gap is missing, and nothing is added.
    assert 1 - gap - 1e-3 < float(first.value.squeeze()) < 1 + 1e-6
    again = found(w, found(w, first.right).right)
    assert 1 - min(gap, 2e-6) - 1e-6 < float(again.value.squeeze()) < 1 + 1e-6
    u, v = again.left.squeeze(), again.right.squeeze()
    np.testing.assert_allclose([jnp.vdot(u, u), jnp.vdot(v, v)], 1, rtol=1e-5)
    np.testing.assert_allclose(u @ w @ v, again.value.squeeze(), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-15, 1e-33, 1e30])
def test_the_scale_of_the_weights_does_not_matter(scale):
    w = problems.normal((40, 60))
    want, got = found(w), found(w * jnp.float32(scale))
    np.testing.assert_allclose(want.value.squeeze(), np.linalg.norm(w, 2), rtol=1e-5)
    np.testing.assert_allclose(got.value, want.value * scale, rtol=1e-5)
    np.testing.assert_allclose(got.right, want.right, atol=1e-4)


def test_a_direction_that_overtakes_is_found_though_it_was_orthogonal():
    w = jnp.diag(jnp.array([1.0, 0.5, 0.2, 0.1]))
    tx = om.spectral_sphere_retract()
    _, state = tx.update(jnp.zeros_like(w), tx.init(w), w)
    got, _ = tx.update(jnp.diag(jnp.array([0.0, 2.0, 0.0, 0.0])), state, w)
    np.testing.assert_allclose(spectral(w + got), 1, rtol=1e-6)


LAYOUTS = {
    "blocks": ((6, 10), om.MatrixLayout(split_inputs=2, split_outputs=(7, 3))),
    "heads": ((6, 2, 5), om.MatrixLayout(inputs=0, outputs=(1, 2))),
}


def pieces(x, name):
    x = np.asarray(x, np.float64)
    if name == "heads":
        return [x.reshape(6, 10)]
    return [x[:3, :7], x[:3, 7:], x[3:, :7], x[3:, 7:]]


@slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_matrix_of_a_leaf_has_its_own_constraint(name):
    shape, layout = LAYOUTS[name]
    w, u = problems.normal(shape), problems.normal(shape, 1)
    for make, project in (
        (om.spectral_sphere_retract, lambda x: on_sphere(x, 1.0)),
        (om.stiefel_retract, polar),
    ):
        (got,), _ = problems.unroll(make(layout=layout), [u], w)
        ends = zip(pieces(w + got, name), pieces(w + u, name), strict=True)
        for end, free in ends:
            np.testing.assert_allclose(end, project(free), atol=1e-5)
    tx = om.tangent_orthogonalize(layout=layout)
    (got,), _ = problems.unroll(tx, [u], w)
    both = zip(*(pieces(x, name) for x in (got, u, w)), strict=True)
    for mine, update, weight in both:
        want = reference.tangent_direction(update, reference.leading(weight)[1])
        np.testing.assert_allclose(mine, want, atol=1e-4)


def test_the_cap_leaves_small_matrices_alone_and_nan_where_it_is():
    w = problems.normal((3, 4, 3)) * jnp.array([1e-3, 1.0, 1.0])[:, None, None]
    u = (0.1 * w).at[2, 0, 0].set(jnp.nan)
    tx = om.spectral_norm_cap(0.5)
    (got,), state = problems.unroll(tx, [u], w)
    np.testing.assert_array_equal(got[0], u[0])
    np.testing.assert_allclose(spectral(w[1] + got[1]), 0.5, rtol=1e-6)
    assert jnp.isnan(got[2]).all()
    assert jnp.isfinite(state.right).all()


@slow
def test_steps_that_end_at_zero_end_there():
    w = problems.normal((4, 3))
    for tx in (om.spectral_sphere_retract(), om.spectral_norm_cap(1.0)):
        for params in (w, jnp.zeros_like(w)):
            (got,), state = problems.unroll(tx, [-params], params)
            np.testing.assert_array_equal(params + got, jnp.zeros_like(w))
            # The search can go on from there.
            got, _ = tx.update(w, state, jnp.zeros_like(w))
            assert 0 < spectral(got) < 1 + 1e-6


@pytest.mark.parametrize(
    "shape", [(7, 4), *(pytest.param(s, marks=slow) for s in ((4, 7), (5, 5), (5, 1)))]
)
def test_tangent_directions_are_those_of_the_published_search(shape):
    with jax.enable_x64(True):
        w, u = (problems.normal(shape, seed, "float64") for seed in (3, 4))
        tx = om.tangent_orthogonalize(bisections=50)
        state = tx.init(w)
        got, state = tx.update(u, state, w)
        huge, _ = tx.update(1e30 * u, state, w)
        zero, _ = tx.update(0 * u, state, w)
    _, theta = reference.leading(np.asarray(w))
    want = reference.tangent_direction(np.asarray(u), theta)
    np.testing.assert_allclose(got, want, atol=1e-9)
    np.testing.assert_allclose(huge, want, atol=1e-9)
    assert not zero.any()
    assert abs((theta * np.asarray(got)).sum()) < 1e-9
    assert abs((theta * reference.polar(np.asarray(u))).sum()) > 1e-2


@slow
def test_the_bracket_always_holds_the_zero():
    # Without a constant part, or with little else.
    method = om.NewtonSchulz(coefficients="polar_express")
    balance = jax.jit(_linalg.Balanced(method, 24).polar)
    parts = jnp.ones((5, 3)), problems.normal((5, 3))
    for share in (0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.99):
        got = balance(share * parts[0] + (1 - share) * parts[1])
        # λ is off by 2e-7 of a norm that is 100 times that of the rest.
        assert abs(float(jnp.sum(got))) < 1e-4, share
    for seed in range(30):
        x = (
            jnp.sign(problems.normal((5, 3), seed))
            * problems.normal((5, 3), seed + 50) ** 4
        )
        assert abs(float(jnp.sum(balance(x)))) < 1e-4, seed


def test_what_is_missing_is_named():
    w = problems.normal((3, 2))
    for tx in (
        om.spectral_sphere_retract(),
        om.spectral_norm_cap(1.0),
        om.stiefel_retract(),
        om.tangent_orthogonalize(),
    ):
        with pytest.raises(ValueError, match="needs the parameters"):
            tx.update(w, tx.init(w))
    with pytest.raises(ValueError, match="`method` must be one of"):
        om.stiefel_retract("cholesky")  # type: ignore


def test_balancing_costs_its_bisections():
    method = om.NewtonSchulz()
    assert _linalg.Balanced(method, 24).flops(5, 3) == 25 * method.flops(5, 3)
