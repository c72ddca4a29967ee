"""MUD against slices orthogonalized one by one in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_matrix._linalg import MUD
from tests.linalg.problems import SHAPES, gaussian, run
from tests.references import polar as reference


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("passes", [1, 3])
def test_matches_float64_reference(shape, passes):
    x = gaussian(shape)
    with jax.enable_x64(True):
        got = run(MUD(passes), jnp.asarray(x))
    np.testing.assert_allclose(got, reference.mud(x, passes), atol=1e-12)


def test_passes_decorrelate():
    x = gaussian((8, 32)).astype("float32")
    off = [
        np.abs(y @ y.T - np.eye(8)).max()
        for y in (np.asarray(run(MUD(p), x)) for p in (1, 2, 4))
    ]
    assert off[0] > 3 * off[1] > 9 * off[2]


def test_a_slice_of_zeros_stays_zero_and_harms_no_other():
    x = gaussian((5, 9)).astype("float32")
    x[2] = 0
    got = np.asarray(run(MUD(), x))
    assert not got[2].any()
    others = [0, 1, 3, 4]
    np.testing.assert_allclose(got[others], run(MUD(), x[others]), atol=1e-6)


def test_flops_by_hand():
    # A product of 2 · 16² · 40 and a triangular solve of half as much.
    assert MUD(3).flops(16, 40) == MUD(3).flops(40, 16) == 3 * (3 * 16 * 16 * 40)


def test_bad_passes_raise():
    with pytest.raises(ValueError, match="`passes` must be at least 1"):
        MUD(0)
