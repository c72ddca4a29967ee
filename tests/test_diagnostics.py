"""The diagnostics against NumPy in float64, on matrices of known spectra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_matrix as om
from tests import problems

d = om.diagnostics
SPECTRA = [[1.0, 1.0, 1.0], [3.0, 1.0, 0.1], [2.0, 0.0, 0.0]]


def stack(shape=(3, 5)):
    matrices = [problems.with_spectrum(shape, s, seed=i) for i, s in enumerate(SPECTRA)]
    return np.stack(matrices)


def on(function, *trees, **kwargs):
    """The function under jit, on the leaf of a tree."""
    wrapped = [{"kernel": jnp.asarray(t, jnp.float32)} for t in trees]
    return jax.jit(lambda *t: function(*t, **kwargs))(*wrapped)["kernel"]


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_spectra(shape):
    x, s = stack(shape), np.asarray(SPECTRA)
    p = s**2 / (s**2).sum(1, keepdims=True)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(1)
    ratio = (s**2).sum(1) ** 2 / (s**4).sum(1)
    # Float32 decompositions of matrices of norm one to three.
    np.testing.assert_allclose(on(d.singular_values, x), s, atol=1e-6)
    np.testing.assert_allclose(on(d.spectral_entropy, x), entropy, atol=1e-5)
    np.testing.assert_allclose(on(d.participation_ratio, x), ratio, rtol=1e-5)
    np.testing.assert_allclose(
        on(d.stable_rank, x), (s**2).sum(1) / s[:, 0] ** 2, rtol=1e-5
    )
    error = np.sqrt(((s**2 - 1) ** 2).sum(1))
    np.testing.assert_allclose(on(d.orthogonality_error, x), error, atol=1e-5)


@pytest.mark.parametrize(
    "function", [d.spectral_entropy, d.participation_ratio, d.stable_rank]
)
def test_scale_does_not_matter_and_zero_gives_zero(function):
    x = stack().astype(np.float32)
    for scale in (1e-30, 1e30):
        np.testing.assert_allclose(
            on(function, x * np.float32(scale)), on(function, x), atol=1e-5
        )
    assert on(function, np.zeros((2, 3))) == 0


def test_sizes_and_angles():
    a, b = problems.normal((2, 4, 3)), problems.normal((2, 4, 3), 1)
    a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norm_a, norm_b = (np.sqrt((x**2).sum((1, 2))) for x in (a64, b64))
    np.testing.assert_allclose(
        on(d.root_mean_square, a), norm_a / np.sqrt(12), rtol=1e-6
    )
    np.testing.assert_allclose(on(d.update_to_weight, a, b), norm_a / norm_b, rtol=1e-6)
    cosine = (a64 * b64).sum((1, 2)) / norm_a / norm_b
    np.testing.assert_allclose(on(d.rotation_angle, a, b), np.arccos(cosine), rtol=1e-5)


def test_small_angles_are_right():
    a = np.eye(3)
    b = a + 1e-4 * np.asarray([[0, 1, 0], [-1, 0, 0], [0, 0, 0]])
    # sqrt(2) 1e-4 off vectors of length sqrt(3); arccos would give 0 in float32.
    want = np.arctan(np.sqrt(2 / 3) * 1e-4)
    np.testing.assert_allclose(on(d.rotation_angle, a, b), want, rtol=1e-3)
    assert on(d.rotation_angle, a, a) == 0


def test_muonh_turns_by_its_learning_rate():
    # The gradient and the parameters have no nonzero row in common, so the direction D
    # is perpendicular to W. The step W - rate |W| D / |D|, retracted onto the sphere of
    # radius |W|, turns W by atan(rate); its chord is 2 sin(angle / 2) of the radius.
    x, rate = problems.normal((8, 6)), 0.01
    params, grads = {"kernel": x.at[:3].set(0)}, {"kernel": x.at[3:].set(0)}
    tx = om.muonh(rate)
    updates, _ = tx.update(grads, tx.init(params), params)
    after = {"kernel": params["kernel"] + updates["kernel"]}
    angle = np.arctan(rate)
    # Float32 parameters round the step by at most 2⁻²⁴ / rate of its length.
    assert d.update_to_weight(updates, params)["kernel"] == pytest.approx(
        2 * np.sin(angle / 2), rel=1e-5
    )
    assert d.rotation_angle(params, after)["kernel"] == pytest.approx(angle, rel=1e-5)


def test_signal_to_noise():
    m, v = jnp.array([1.0, -2.0, 0.0]), jnp.array([4.0, 4.0, 0.0])
    np.testing.assert_allclose(on(d.signal_to_noise, m, v), [0.5, 1.0, 0.0], rtol=1e-6)


def test_split_leaves_report_every_block():
    x = problems.normal((4, 10))
    layout = om.MatrixLayout(split_outputs=(7, 3))
    got = on(d.singular_values, x, layout=layout)
    want = np.zeros((2, 4))
    want[0] = np.linalg.svd(x[:, :7], compute_uv=False)
    want[1, :3] = np.linalg.svd(x[:, 7:], compute_uv=False)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_sharded_leaves_give_what_whole_ones_give():
    mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Explicit,))
    x, y = problems.normal((16, 8)), problems.normal((16, 8), 1)
    want = on(d.singular_values, x), on(d.rotation_angle, x, y)
    with jax.set_mesh(mesh):
        x, y = jax.device_put((x, y), jax.P("x", None))
        got = on(d.singular_values, x), on(d.rotation_angle, x, y)
    for a, b in zip(got, want, strict=True):
        # Sums in another order.
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_results_are_float32(dtype):
    x = {"kernel": problems.normal((4, 3), dtype=dtype)}
    for got in (d.stable_rank(x), d.update_to_weight(x, x), d.signal_to_noise(x, x)):
        assert got["kernel"].dtype == jnp.float32


def test_optimizers_without_preconditioner_have_no_refreshes():
    state = om.muon(0.1).init({"kernel": jnp.ones((4, 3))})
    assert d.refreshes(state) == d.check_refreshes(state) == {}
