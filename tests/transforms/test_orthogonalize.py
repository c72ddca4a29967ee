"""The orthogonalizing transforms: matrices found in leaves, whatever their layout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from tests import problems
from tests.references import optimizers as reference

pytestmark = pytest.mark.core

METHODS = {
    "newton_schulz": om.orthogonalize_newton_schulz(12, coefficients="track3"),
    "halley": om.orthogonalize_halley(1e-2, steps=3),
    "svd": om.orthogonalize_exact(),
    "eigh": om.orthogonalize_exact("eigh"),
}


def once(tx, update):
    got, _ = problems.unroll(tx, [update])
    return np.asarray(got[0], np.float64)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (1, 6), (6, 1)])
def test_gives_the_polar_factor(name, shape):
    values = np.linspace(1.0, 0.3, min(shape))
    x = problems.with_spectrum(shape, values)
    got = once(METHODS[name], jnp.asarray(x, jnp.float32))
    # Twelve float32 products, or one factorization, of matrices of norm about two.
    np.testing.assert_allclose(got, reference.polar(x), atol=2e-5)


def test_default_is_five_jordan_steps():
    x = problems.normal((6, 4))
    got = once(om.orthogonalize_newton_schulz(), x)
    want = reference.newton_schulz(np.asarray(x, np.float64))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    "shape, layout, matrices",
    [
        ((2, 3, 5, 4), None, "aibo"),
        ((5, 2, 3), om.MatrixLayout(inputs=0, outputs=(1, 2)), "ihd"),
        ((2, 3, 5), om.MatrixLayout(inputs=(0, 1), outputs=2), "hdo"),
        ((5, 2, 3), optax.contrib.MuonDimensionNumbers(0, (1, 2)), "muon"),
    ],
)
def test_layouts_find_their_matrices(shape, layout, matrices):
    x = problems.normal(shape)
    got = once(om.orthogonalize_exact(layout=layout), x)
    x64 = np.asarray(x, np.float64)
    if matrices == "aibo":
        want = np.stack([[reference.polar(m) for m in row] for row in x64])
    elif matrices == "hdo":
        want = reference.polar(x64.reshape(6, 5)).reshape(shape)
    else:
        want = reference.polar(x64.reshape(5, 6)).reshape(shape)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_fused_kernels_are_orthogonalized_block_by_block():
    x = problems.normal((6, 10))
    layout = om.MatrixLayout(split_outputs=(6, 2, 2))
    got = once(om.orthogonalize_exact(layout=layout), x)
    x64 = np.asarray(x, np.float64)
    blocks = [x64[:, :6], x64[:, 6:8], x64[:, 8:]]
    want = np.concatenate([reference.polar(block) for block in blocks], axis=1)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_method_of_ones_own_is_taken():
    class Sign:
        def polar(self, x):
            return jnp.sign(x)

    x = problems.normal((3, 4))
    np.testing.assert_array_equal(once(om.orthogonalize(Sign()), x), np.sign(x))


SETTINGS = [
    (om.orthogonalize_exact, om.Exact, {"method": "eigh"}),
    (om.orthogonalize_exact, om.Exact, {"dtype": "float64"}),
    (om.orthogonalize_halley, om.Halley, {"lower_bound": 0.1}),
    (om.orthogonalize_halley, om.Halley, {"steps": 2}),
    (om.orthogonalize_halley, om.Halley, {"dtype": "float64"}),
    (om.orthogonalize_newton_schulz, om.NewtonSchulz, {"steps": 3}),
    (om.orthogonalize_newton_schulz, om.NewtonSchulz, {"coefficients": "quintic"}),
    (om.orthogonalize_newton_schulz, om.NewtonSchulz, {"method": "plain"}),
    (om.orthogonalize_newton_schulz, om.NewtonSchulz, {"dtype": "bfloat16"}),
    (om.orthogonalize_newton_schulz, om.NewtonSchulz, {"precision": "highest"}),
]


def program(tx):
    x = jnp.ones((5, 4, 12))
    with jax.enable_x64(True):
        return str(jax.make_jaxpr(lambda x: tx.update(x, tx.init(x))[0])(x))


@pytest.mark.parametrize("named, method, settings", SETTINGS)
def test_named_transforms_pass_their_settings_on(named, method, settings):
    where = {
        "layout": om.MatrixLayout(inputs=-1, outputs=0),
        "placement": om.Placement(stack_size=2),
    }
    want = program(om.orthogonalize(method(**settings), **where))
    assert program(named(**settings, **where)) == want
    assert program(named(**where)) != want
    for name in where:
        less = {key: value for key, value in where.items() if key != name}
        assert program(named(**settings, **less)) != want


def test_an_unknown_method_or_step_count_raises_at_construction():
    with pytest.raises(ValueError, match=r"newton_schulz.*halley.*exact"):
        om.orthogonalize("qr")
    with pytest.raises(ValueError, match="`coefficients='quintic'` is a 5-step table"):
        om.orthogonalize_newton_schulz(10, coefficients="quintic")
