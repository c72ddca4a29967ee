"""ema_momentum: its recurrence with and without look-ahead and correction."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from tests import problems
from tests.references import optimizers as reference


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-5), ("bfloat16", 2**-8)])
def test_matches_float64_reference(nesterov, debias, dtype, rtol):
    grads = problems.normal((6, 5, 3), dtype=dtype)
    tx = om.ema_momentum(0.9, nesterov=nesterov, debias=debias)
    got, state = problems.unroll(tx, list(grads))
    want = reference.momenta(np.asarray(grads, np.float64), 0.9, nesterov, debias)
    # bfloat16: the output rounds once; the terms may cancel, hence the atol.
    np.testing.assert_allclose(
        np.asarray(jnp.stack(got), np.float64), want, rtol=rtol, atol=1e-6
    )
    plain = reference.momenta(np.asarray(grads, np.float64), 0.9, nesterov=False)
    np.testing.assert_allclose(state.momentum, plain[-1], rtol=1e-5, atol=1e-6)
    assert state.momentum.dtype == jnp.float32


def test_is_optax_trace_times_one_minus_decay():
    grads = list(problems.normal((5, 4, 3)))
    got, _ = problems.unroll(om.ema_momentum(0.9), grads)
    summed = optax.chain(optax.trace(0.9, nesterov=True), optax.scale(0.1))
    want, _ = problems.unroll(summed, grads)
    # A few float32 roundings of entries of size one.
    np.testing.assert_allclose(jnp.stack(got), jnp.stack(want), rtol=1e-5, atol=1e-6)


def test_the_state_has_mu_dtype():
    grads = list(problems.normal((3, 4, 3)))
    tx = om.ema_momentum(mu_dtype="bfloat16")
    updates, state = problems.unroll(tx, grads)
    assert state.momentum.dtype == jnp.bfloat16
    assert updates[-1].dtype == jnp.float32
    assert tx.init(grads[0]).momentum.dtype == jnp.bfloat16


def test_float64_is_not_narrowed():
    with jax.enable_x64(True):
        grads = list(problems.normal((3, 4, 3), dtype="float64"))
        got, state = problems.unroll(om.ema_momentum(0.9), grads)
        want = reference.momenta(np.stack(grads), 0.9)
        assert state.momentum.dtype == jnp.float64
        # 1e-13: float64 rounding, far below float32's 1e-7.
        np.testing.assert_allclose(np.stack(got), want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_names_the_bad_argument(momentum):
    with pytest.raises(ValueError, match=r"`momentum` must lie in \[0, 1\), got"):
        om.ema_momentum(momentum)
