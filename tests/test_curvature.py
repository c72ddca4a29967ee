"""Products with the Hessian, Newton's step, and the extreme eigenvalues by Lanczos."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType

import optax_matrix as om
from tests import problems


def quadratic(eigenvalues, seed=0):
    """A loss on a tree of two arrays, its Hessian, and a place."""
    n = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    hessian = (q * np.asarray(eigenvalues)) @ q.T
    params = {"a": problems.normal((2, 3), 1), "b": problems.normal((n - 6,), 2)}
    target = problems.normal((n,), 3)

    def loss(params):
        x = ravel_pytree(params)[0] - target
        return 0.5 * x @ jnp.asarray(hessian, x.dtype) @ x

    return loss, hessian, params, target


def network(params):
    x = problems.normal((16, 3), 5)
    y = jnp.tanh(x @ params["w"]) @ params["v"]
    return jnp.mean((y - jnp.sin(x[:, :1])) ** 2)


# Eager, each of its operations would be compiled by itself.
estimate = jax.jit(om.diagnostics.largest_curvature, static_argnames=("loss", "steps"))
PARAMS = {"w": problems.normal((3, 4), 6), "v": problems.normal((4, 1), 7)}


def test_the_product_is_that_with_the_hessian():
    vector = {"w": problems.normal((3, 4), 8), "v": problems.normal((4, 1), 9)}
    flat, unravel = ravel_pytree(PARAMS)
    hessian = np.asarray(jax.hessian(lambda x: network(unravel(x)))(flat), np.float64)
    got = jax.jit(om.hessian_vector_product, static_argnums=0)(network, PARAMS, vector)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, PARAMS)
    want = hessian @ np.asarray(ravel_pytree(vector)[0], np.float64)
    # The order of leaves is that of the tree, in which v comes first.
    np.testing.assert_allclose(ravel_pytree(got)[0], want, atol=1e-5)
    with pytest.raises(ValueError, match="`vector` must have the structure"):
        om.hessian_vector_product(network, PARAMS, {"w": vector["w"]})


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_newtons_step_is_that_of_its_formula(damping):
    loss, hessian, params, target = quadratic([0.5, 1, 2, 3, 5, 8, 13, 20])
    step = jax.jit(lambda p: om.newton_step(loss, p, damping=damping))(params)
    x = np.asarray(ravel_pytree(params)[0], np.float64) - np.asarray(target)
    want = -np.linalg.solve(hessian + damping * np.eye(8), hessian @ x)
    np.testing.assert_allclose(ravel_pytree(step)[0], want, rtol=1e-4, atol=1e-5)
    if not damping:
        end = optax.apply_updates(params, step)
        np.testing.assert_allclose(ravel_pytree(end)[0], target, atol=1e-5)
    with pytest.raises(ValueError, match="`damping` must lie"):
        om.newton_step(loss, params, damping=-1.0)


SPECTRA = {
    "spread": np.linspace(-3, 10, 40),
    "one large": np.concatenate([np.linspace(0, 1, 39), [50]]),
    "negative": -np.linspace(1, 4, 40),
    "few distinct": np.repeat([1.0, 2.0, 7.0, 7.5], 10),
    "zero": np.zeros(40),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_lanczos_finds_the_extremes(name):
    eigenvalues = SPECTRA[name]
    loss, _, params, _ = quadratic(eigenvalues)
    got = estimate(loss, params, key=jax.random.key(0), steps=24)
    size = np.abs(eigenvalues).max() or 1.0
    tolerance = 1e-2 * size if name == "spread" else 1e-3 * size
    np.testing.assert_allclose(got.largest, eigenvalues.max(), atol=tolerance)
    np.testing.assert_allclose(got.smallest, eigenvalues.min(), atol=tolerance)
    # The estimates are inside, and the bound of the error holds.
    assert got.largest <= eigenvalues.max() + 1e-5 * size
    assert got.smallest >= eigenvalues.min() - 1e-5 * size
    distance = np.abs(eigenvalues - float(got.largest)).min()
    assert distance <= got.error + 1e-5 * size


def test_lanczos_on_a_network():
    flat, unravel = ravel_pytree(PARAMS)
    hessian = np.asarray(jax.hessian(lambda x: network(unravel(x)))(flat), np.float64)
    values = np.linalg.eigvalsh(hessian)
    key = jax.random.key(1)
    got = estimate(network, PARAMS, key=key, steps=30)
    np.testing.assert_allclose(got.largest, values[-1], rtol=1e-4)
    np.testing.assert_allclose(got.smallest, values[0], atol=1e-4 * values[-1])
    few = estimate(network, PARAMS, key=key, steps=1)
    assert values[0] < few.largest < values[-1] and few.largest == few.smallest
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        estimate(network, PARAMS, key=key, steps=0)


@pytest.mark.slow
def test_other_dtypes_are_differentiated_in_float32():
    narrow = jax.tree.map(lambda p: p.astype("bfloat16"), PARAMS)
    rounded = jax.tree.map(lambda p: p.astype("float32"), narrow)
    key = jax.random.key(0)
    got = estimate(network, narrow, key=key)
    want = estimate(network, rounded, key=key)
    assert got.largest == want.largest and got.largest.dtype == jnp.float32
    newton = jax.jit(lambda p: om.newton_step(network, p, damping=1.0))
    step = newton(narrow)
    assert step["w"].dtype == jnp.bfloat16
    with jax.enable_x64(True):
        loss, _, params, _ = quadratic(np.arange(1.0, 9.0))
        for dtype in ("float32", "float64"):
            typed = jax.tree.map(lambda p, d=dtype: p.astype(d), params)
            got = estimate(loss, typed, key=key, steps=8)
            np.testing.assert_allclose(got.largest, 8.0, rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_lanczos_on_sharded_parameters(kind):
    def loss(params):
        return 0.5 * jnp.sum(scales * jnp.square(params["w"]))

    scales = 1.0 + jnp.arange(32.0).reshape(8, 4)
    params, key = {"w": problems.normal((8, 4))}, jax.random.key(0)
    want = estimate(loss, params, key=key)
    with jax.set_mesh(jax.make_mesh((8,), ("x",), (kind,))):
        placed, scales = jax.device_put((params, scales), jax.P("x", None))
        got = estimate(loss, placed, key=key)
    np.testing.assert_allclose(got.largest, want.largest, rtol=1e-4)


def test_numbers_are_parameters_too():
    def loss(params):
        return (params["x"] - 3.0) ** 2

    step = om.newton_step(loss, {"x": 1.0})
    np.testing.assert_allclose(step["x"], 2.0, rtol=1e-6)
    found = om.diagnostics.largest_curvature(loss, {"x": 1.0}, key=jax.random.key(0))
    np.testing.assert_allclose(found.largest, 2.0, rtol=1e-6)
