"""add_cautious_weight_decay: decay only where the step shrinks the entry."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from tests import problems


def apply(u, w, weight_decay=0.1):
    got, _ = problems.unroll(om.add_cautious_weight_decay(weight_decay), [u], w)
    return got[0]


def test_follows_the_formula():
    u, w = problems.normal((6, 5)), problems.normal((6, 5), 1)
    u64, w64 = np.asarray(u, np.float64), np.asarray(w, np.float64)
    want = u64 + 0.1 * (u64 * w64 >= 0) * w64
    np.testing.assert_allclose(apply(u, w), want, rtol=1e-6)
    changed = np.asarray(apply(u, w)) != u64
    assert changed.any() and not changed.all()


def test_signs_decide_even_where_the_product_underflows():
    u, w = jnp.array([[1e-30, -1e-30, 0.0]]), jnp.array([[1e-30, 1e-30, 2.0]])
    np.testing.assert_allclose(apply(u, w, 0.5), [[1.5e-30, -1e-30, 1.0]], rtol=1e-6)


def test_can_be_masked():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    tx = optax.masked(
        om.add_cautious_weight_decay(0.1), {"kernel": True, "bias": False}
    )
    got, _ = tx.update(params, tx.init(params), params)
    assert (got["bias"] == 1).all() and (got["kernel"] == 1.1).all()


def test_names_the_bad_argument():
    with pytest.raises(ValueError, match=r"`weight_decay` must lie in \[0, inf\)"):
        om.add_cautious_weight_decay(-0.1)
