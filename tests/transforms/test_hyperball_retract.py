"""hyperball_retract: every matrix ends each step on the sphere it started on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from tests import problems


def norms(w):
    return np.linalg.norm(np.asarray(w, np.float64), axis=(-2, -1))


def walk(w, steps, length=0.02, update_dtype=None):
    """`steps` random relative steps, decreasing in length, in one compiled scan."""
    tx = optax.chain(
        om.normalize_frobenius("param"), optax.scale(-length), om.hyperball_retract()
    )

    def step(carry, key):
        params, state = carry
        u = jax.random.normal(key, w.shape, update_dtype or w.dtype)
        u, state = tx.update(u, state, params)
        return (optax.apply_updates(params, u), state), None

    keys = jax.random.split(jax.random.key(0), steps)
    (w, _), _ = jax.jit(jax.lax.scan, static_argnums=0)(step, (w, tx.init(w)), keys)
    return w


def test_follows_the_formula():
    w, u = problems.normal((5, 3)), problems.normal((5, 3), 1) * 0.3
    got, _ = problems.unroll(om.hyperball_retract(), [u], w)
    w64, u64 = np.asarray(w, np.float64), np.asarray(u, np.float64)
    end = (w64 + u64) * np.linalg.norm(w64) / np.linalg.norm(w64 + u64)
    np.testing.assert_allclose(got[0], end - w64, rtol=1e-5, atol=1e-6)


def test_radius_holds_over_10_000_steps():
    # A stack of two "experts" of very different norm.
    w = problems.normal((2, 24, 16)) * jnp.array([1e-2, 3.0])[:, None, None]
    end = walk(w, 10_000)
    assert norms(end - w).min() > 0.5 * norms(w).min()  # it did walk
    # 384 entries, each rounded once: a few units of 6e-8.
    np.testing.assert_allclose(norms(end), norms(w), rtol=5e-7)


@pytest.mark.parametrize(
    "update_dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)]
)
def test_radius_of_bfloat16_params_holds_to_float32_rounding(update_dtype):
    w = problems.normal((2, 64, 48), dtype="bfloat16")
    w = w * jnp.asarray([2**-6, 3.0], "bfloat16")[:, None, None]
    end = walk(w, 10_000, update_dtype=update_dtype)
    assert end.dtype == jnp.bfloat16
    assert norms(end - w).min() > 0.5 * norms(w).min()
    # bfloat16 rounding alone would leave about 2**-9 / sqrt(3072) = 4e-5.
    np.testing.assert_allclose(norms(end), norms(w), rtol=1e-6)


def test_float16_params_too():
    w = problems.normal((32, 48), dtype="float16")
    np.testing.assert_allclose(norms(walk(w, 200)), norms(w), rtol=1e-6)


def test_current_norm_would_drift_in_bfloat16():
    # The premise of the test above: without the stored radius and the correction the
    # norm wanders off.
    w = problems.normal((64, 48), dtype="bfloat16")

    def step(p, key):
        u = jax.random.normal(key, p.shape)
        u = 0.02 * u * jnp.linalg.norm(p.astype("float32")) / jnp.linalg.norm(u)
        end = p.astype("float32") + u
        end = end * jnp.linalg.norm(p.astype("float32")) / jnp.linalg.norm(end)
        return end.astype("bfloat16"), None

    keys = jax.random.split(jax.random.key(0), 1000)
    end, _ = jax.jit(jax.lax.scan, static_argnums=0)(step, w, keys)
    assert abs(norms(end) / norms(w) - 1) > 1e-5


def test_zero_update_stays_and_a_step_to_the_centre_stays():
    w = problems.normal((2, 4, 3))
    u = jnp.zeros_like(w).at[1].set(-w[1])
    got, _ = problems.unroll(om.hyperball_retract(), [u], w)
    np.testing.assert_allclose(w + got[0], w, rtol=1e-6)


def test_nan_stays_in_its_matrix():
    w = problems.normal((2, 4, 3))
    u = (0.1 * w).at[0, 0, 0].set(jnp.nan)
    got, _ = problems.unroll(om.hyperball_retract(), [u], w)
    assert np.isnan(got[0][0]).all() and np.isfinite(got[0][1]).all()


def test_blocks_of_a_split_leaf_have_their_own_radius():
    w = problems.normal((6, 10)) * jnp.where(jnp.arange(10) < 7, 1.0, 9.0)[None]
    layout = om.MatrixLayout(split_outputs=(7, 3))
    tx = om.hyperball_retract(layout=layout)
    got, state = problems.unroll(tx, [problems.normal((6, 10), 1)], w)
    assert state.radius.shape == (1, 2)
    end = w + got[0]
    for block in (slice(0, 7), slice(7, 10)):
        np.testing.assert_allclose(norms(end[:, block]), norms(w[:, block]), rtol=1e-6)


def test_a_zero_matrix_raises_at_init_with_its_path():
    params = {"proj": {"kernel": jnp.ones((2, 3, 3)).at[1].set(0)}}
    with pytest.raises(ValueError, match=r"positive finite norm.*'proj/kernel'"):
        om.hyperball_retract().init(params)
