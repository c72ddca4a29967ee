"""Symmetric matrices as packed triangles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_matrix._linalg import pack, unpack
from tests import problems
from tests.transforms import histories


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("m", range(9))
def test_a_triangle_is_kept_and_becomes_the_whole_again(m, dtype):
    a = problems.normal((m, m), dtype=dtype)
    a = a + a.T
    packed = pack(a)
    assert packed.size == m * (m + 1) // 2 and packed.dtype == dtype
    np.testing.assert_array_equal(histories.symmetric(packed), a)
    np.testing.assert_array_equal(unpack(packed), a)


@pytest.mark.parametrize("place", [(0, 0), (6, 1), (6, 5), (2, 1)])
def test_what_is_not_finite_is_kept(place):
    a = jnp.zeros((7, 7)).at[place].set(jnp.nan).at[place[::-1]].set(jnp.nan)
    np.testing.assert_array_equal(unpack(pack(a)), a)


def test_it_is_mapped_over_a_stack():
    a = problems.normal((3, 6, 6))
    a = a + a.mT
    np.testing.assert_array_equal(jax.vmap(lambda x: unpack(pack(x)))(a), a)
