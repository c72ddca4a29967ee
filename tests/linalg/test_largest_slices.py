"""LargestSlices: which inputs or outputs it orthogonalizes."""

import jax.numpy as jnp
import numpy as np
import pytest

import optax_matrix as om
from optax_matrix._linalg import MUD, Exact, LargestSlices, NewtonSchulz
from tests.linalg.problems import gaussian, run
from tests.references import optimizers as reference


def taken(y):
    """Which inputs and which outputs are not zero."""
    return [np.flatnonzero(np.any(np.asarray(y) != 0, axis=a)) for a in (1, 0)]


@pytest.mark.parametrize("shape, outputs", [((7, 5), 1), ((5, 7), 0), ((5, 5), 1)])
def test_the_largest_of_the_fewer_are_orthogonalized_alone(shape, outputs):
    # 0.25 of 5 are 2; the largest by their sums are not the largest by their squares.
    x = np.ones(shape) + gaussian(shape) / 10
    slices = x if outputs else x.T
    slices[:, 1] *= 3
    slices[:, 3] *= -2
    slices[:, 2] = 0.01
    slices[0, 2] = 8  # the largest norm
    assert np.abs(slices).sum(axis=0)[[1, 3]].min() > 8.1
    y = np.asarray(run(LargestSlices(method="exact"), jnp.asarray(x, "float32")))
    want = reference.polar(slices[:, [1, 3]])
    np.testing.assert_allclose((y if outputs else y.T)[:, [1, 3]], want, atol=1e-5)
    np.testing.assert_array_equal(taken(y)[outputs], [1, 3])


@pytest.mark.slow
def test_each_matrix_of_a_stack_has_its_own():
    x = jnp.asarray(gaussian((2, 3, 5, 4)), "float32")
    method = LargestSlices(0.5)
    stacked = run(method, x)
    for i in range(2):
        for j in range(3):
            alone = run(method, x[i, j])
            np.testing.assert_allclose(stacked[i, j], alone, atol=1e-5)
            assert len(taken(alone)[1]) == 2


def test_equal_sums_are_taken_in_order_and_nan_first():
    x = jnp.array([[1.0, 1, 1, 1], [1, -1, 1, 1], [1, 1, -1, 1], [0, 0, 0, 0]])
    method = LargestSlices(0.5, Exact())
    np.testing.assert_array_equal(taken(run(method, x))[1], [0, 1])
    y = run(method, x.at[0, 2].set(jnp.nan))
    np.testing.assert_array_equal(taken(y)[1], [0, 2])
    assert np.isnan(y[:, 2]).all()


@pytest.mark.parametrize(
    "method, shape",
    [
        # Depends on the order of the slices.
        (MUD(), (2, 5, 4)),
        *(
            pytest.param(NewtonSchulz(), shape, marks=pytest.mark.slow)
            for shape in ((4, 6), (6, 4), (2, 5, 5))
        ),
    ],
)
def test_all_slices_are_the_method_itself(method, shape):
    x = jnp.asarray(gaussian(shape), "float32")
    got, want = run(LargestSlices(1.0, method), x), run(method, x)
    # Compiled apart: float32 rounding, amplified by five steps.
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_flops_are_those_of_the_smaller_matrix():
    for m, n in ((64, 256), (256, 64)):
        method = LargestSlices(method="newton_schulz")
        assert method.flops(m, n) == NewtonSchulz().flops(256, 16)
    params = {"kernel": jnp.ones((6, 4))}
    with pytest.raises(TypeError, match="`method` must have a formula"):
        om.describe_placement(params, LargestSlices(0.5, "exact"), backend="cpu")
