"""scale_by_variance: Adam's second moment of the incoming updates."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from tests import problems
from tests.references import optimizers as reference


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-5), ("bfloat16", 2**-8)])
def test_matches_float64_reference(debias, dtype, rtol):
    updates = problems.normal((5, 4, 3), dtype=dtype)
    tx = om.scale_by_variance(0.9, eps=1e-3, debias=debias)
    got, state = problems.unroll(tx, list(updates))
    values = np.asarray(updates, np.float64)
    want = reference.variance_scaled(values, 0.9, 1e-3, debias)
    np.testing.assert_allclose(np.asarray(jnp.stack(got), np.float64), want, rtol=rtol)
    weights = 0.1 * 0.9 ** np.arange(4, -1, -1)
    # The state is float32 also where the updates are not.
    np.testing.assert_allclose(
        state.variance, np.einsum("t,tij->ij", weights, values**2), rtol=1e-5
    )
    assert state.variance.dtype == jnp.float32
    assert state.count == 5


def test_equals_optax_rms_with_bias_correction():
    updates = list(problems.normal((4, 3, 3)))
    got, _ = problems.unroll(om.scale_by_variance(0.9, eps=1e-3), updates)
    peer = optax.scale_by_rms(0.9, eps=1e-3, eps_in_sqrt=False, bias_correction=True)
    want, _ = problems.unroll(peer, updates)
    np.testing.assert_allclose(jnp.stack(got), jnp.stack(want), rtol=1e-6)


def test_adam_divides_a_momentum_by_the_variance_of_the_gradient():
    grads = list(problems.normal((5, 4, 3)))
    momentum = om.ema_momentum(0.9, nesterov=False, debias=True)
    got, state = problems.unroll(om.scale_by_variance(0.99, inner=momentum), grads)
    want, adam = problems.unroll(optax.scale_by_adam(0.9, 0.99), grads)
    np.testing.assert_allclose(jnp.stack(got), jnp.stack(want), rtol=1e-5)
    np.testing.assert_allclose(state.inner.momentum, adam.mu, rtol=1e-5)


def test_the_inner_transformation_sees_parameters_and_extra_arguments():
    def scale(updates, state, params, *, value):
        return updates * params * value, state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, scale)
    tx, g, w = (
        om.scale_by_variance(inner=inner),
        jnp.ones((3, 2)),
        jnp.full((3, 2), 2.0),
    )
    got, _ = tx.update(g, tx.init(w), w, value=3.0)
    np.testing.assert_allclose(got, 6 * w / 2, rtol=1e-6)


def test_zero_stays_zero():
    zeros = jnp.zeros((3, 2))
    got, _ = problems.unroll(om.scale_by_variance(), [zeros, zeros])
    assert (got[-1] == 0).all()


def test_names_the_bad_argument():
    with pytest.raises(ValueError, match=r"`b2` must lie in \[0, 1\), got 1"):
        om.scale_by_variance(1.0)
    with pytest.raises(ValueError, match=r"`eps` must lie in \(0, inf\), got 0"):
        om.scale_by_variance(eps=0.0)
