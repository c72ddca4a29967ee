"""float32_statistics: the inner transformation sees and keeps float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from tests import problems


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_state_is_float32_and_updates_keep_their_dtype(dtype):
    updates = list(problems.normal((4, 5, 3), dtype=dtype))
    got, state = problems.unroll(
        om.float32_statistics(optax.scale_by_adam(b2=0.99)), updates
    )
    low = [u.astype("float32") for u in updates]
    want, adam = problems.unroll(optax.scale_by_adam(b2=0.99), low)
    assert {g.dtype.name for g in got} == {dtype}
    assert state.mu.dtype == state.nu.dtype == "float32"
    np.testing.assert_array_equal(state.nu, adam.nu)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b.astype(dtype))


def test_float64_is_not_narrowed():
    with jax.enable_x64(True):
        updates = list(problems.normal((2, 4, 3), dtype="float64"))
        got, state = problems.unroll(
            om.float32_statistics(optax.scale_by_adam()), updates
        )
    assert got[0].dtype == state.nu.dtype == "float64"


def test_parameters_and_further_arguments_reach_the_inner_one():
    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda u, p: u + value * p, updates, params), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx, ones = om.float32_statistics(inner), jnp.ones((2, 2), "bfloat16")
    got, _ = tx.update(ones, tx.init(ones), 3 * ones, value=2.0)
    assert (got == 7).all() and got.dtype == "bfloat16"
