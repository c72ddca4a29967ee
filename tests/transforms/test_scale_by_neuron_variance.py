"""scale_by_neuron_variance: NorMuon's step, per output neuron, the norm kept."""

import jax.numpy as jnp
import numpy as np
import pytest

import optax_matrix as om
from tests import problems
from tests.references import optimizers as reference


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (1, 7), (7, 1)])
@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-5), ("bfloat16", 2**-7)])
def test_matches_float64_reference(shape, dtype, rtol):
    updates = problems.normal((4, *shape), dtype=dtype)
    got, state = problems.unroll(om.scale_by_neuron_variance(0.9), list(updates))
    want = reference.neuron_scaled(np.asarray(updates, np.float64), 0.9, 1e-10)
    np.testing.assert_allclose(np.asarray(jnp.stack(got), np.float64), want, rtol=rtol)
    assert state.variance.shape == (1, shape[1])
    assert state.variance.dtype == jnp.float32


def test_a_transposed_layout_is_the_transposed_result():
    updates = problems.normal((3, 5, 4))
    layout = om.MatrixLayout(inputs=-1, outputs=-2)
    got, state = problems.unroll(
        om.scale_by_neuron_variance(layout=layout), list(updates.mT)
    )
    want, _ = problems.unroll(om.scale_by_neuron_variance(), list(updates))
    np.testing.assert_allclose(jnp.stack(got).mT, jnp.stack(want), rtol=1e-6)
    assert state.variance.shape == (4, 1)


@pytest.mark.parametrize("widths", [2, (4, 2)])
def test_a_split_leaf_is_its_blocks(widths):
    updates = problems.normal((3, 5, 6))
    layout = om.MatrixLayout(split_outputs=widths)
    tx = om.scale_by_neuron_variance(layout=layout)
    got, _ = problems.unroll(tx, list(updates))
    cut = 3 if widths == 2 else 4
    parts = [
        problems.unroll(om.scale_by_neuron_variance(), list(part))[0]
        for part in (updates[..., :cut], updates[..., cut:])
    ]
    want = jnp.concatenate([jnp.stack(part) for part in parts], axis=-1)
    np.testing.assert_allclose(jnp.stack(got), want, rtol=1e-6)


def test_a_split_of_inputs_has_a_variance_for_each_block():
    updates = problems.normal((2, 6, 3))
    layout = om.MatrixLayout(split_inputs=(4, 2))
    tx = om.scale_by_neuron_variance(layout=layout)
    got, state = problems.unroll(tx, list(updates))
    assert state.variance.shape == (2, 3)
    want = [
        reference.neuron_scaled(np.asarray(part), 0.95, 1e-10)
        for part in (updates[:, :4], updates[:, 4:])
    ]
    np.testing.assert_allclose(jnp.stack(got), np.concatenate(want, 1), rtol=1e-5)


def test_keeps_the_norm_of_each_matrix_and_evens_its_neurons():
    update = problems.normal((2, 16, 4)) * jnp.array([1e-3, 1.0, 7.0, 1e3])[None, None]
    got, _ = problems.unroll(om.scale_by_neuron_variance(), [update])
    norms = jnp.linalg.norm(update, axis=(1, 2))
    np.testing.assert_allclose(jnp.linalg.norm(got[0], axis=(1, 2)), norms, rtol=1e-6)
    neurons = jnp.linalg.norm(got[0], axis=1)
    np.testing.assert_allclose(neurons, norms[:, None] / 2 + 0 * neurons, rtol=1e-5)


def test_zero_stays_zero_beside_others():
    update = problems.normal((2, 4, 3)).at[0].set(0)
    got, _ = problems.unroll(om.scale_by_neuron_variance(), [update])
    assert (got[0][0] == 0).all() and jnp.isfinite(got[0]).all()


def test_names_the_bad_argument_or_leaf():
    with pytest.raises(ValueError, match=r"`b2` must lie in \[0, 1\), got -1"):
        om.scale_by_neuron_variance(-1)
    with pytest.raises(ValueError, match=r"'b'.*\(3,\)"):
        om.scale_by_neuron_variance().init({"b": jnp.ones(3)})
