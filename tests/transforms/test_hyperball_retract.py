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


RETRACT = optax.chain(
    om.normalize_frobenius("param"), optax.scale(-0.02), om.hyperball_retract()
)
# The same with the norm of the present parameters instead of that of the first ones.
DRIFT = optax.GradientTransformation(
    RETRACT.init,
    lambda u, state, params: RETRACT.update(u, RETRACT.init(params), params),
)


def walk(w, steps, update_dtype=None, tx=RETRACT):
    """The end of `steps` random steps, and the norms before each of them."""

    def step(carry, key):
        params, state = carry
        # Before the step: XLA may keep the parameters after it in float32.
        norm = jnp.linalg.norm(params.astype("float32"), axis=(-2, -1))
        u = jax.random.normal(key, w.shape, update_dtype or w.dtype)
        u, state = tx.update(u, state, params)
        return (optax.apply_updates(params, u), state), norm

    keys = jax.random.split(jax.random.key(0), steps)
    scan = jax.jit(jax.lax.scan, static_argnums=0)
    (end, _), seen = scan(step, (w, tx.init(w)), keys)
    return end, np.asarray(seen, np.float64)


def test_follows_the_formula():
    w, u = problems.normal((5, 3)), problems.normal((5, 3), 1) * 0.3
    got, _ = problems.unroll(om.hyperball_retract(), [u], w)
    w64, u64 = np.asarray(w, np.float64), np.asarray(u, np.float64)
    end = (w64 + u64) * np.linalg.norm(w64) / np.linalg.norm(w64 + u64)
    np.testing.assert_allclose(got[0], end - w64, rtol=1e-5, atol=1e-6)


def test_radius_holds_over_10_000_steps():
    # A stack of two "experts" of very different norm.
    w = problems.normal((2, 24, 16)) * jnp.array([1e-2, 3.0])[:, None, None]
    end, _ = walk(w, 10_000)
    assert norms(end - w).min() > 0.5 * norms(w).min()  # it did walk
    # 384 entries, each rounded once: a few units of 6e-8.
    np.testing.assert_allclose(norms(end), norms(w), rtol=5e-7)


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


@pytest.mark.parametrize(
    "update_dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "float32"]
)
def test_the_norm_of_bfloat16_params_is_off_by_their_rounding_and_no_more(update_dtype):
    w = problems.normal((16, 64, 64), dtype="bfloat16")
    w = w * jnp.where(jnp.arange(16) < 8, 2**-6, 3).astype("bfloat16")[:, None, None]
    end, seen = walk(w, 200, update_dtype)
    assert end.dtype == jnp.bfloat16
    assert norms(end - w).min() > 0.2 * norms(w).min()
    error = seen / norms(w) - 1
    # Roundings of 4096 entries: 4e-5, and about as much after every step.
    assert 3e-5 < rms(error[1:51]) < 5e-5
    assert rms(error[-50:]) < 1.1 * rms(error[1:51])
    # Five standard deviations.
    assert np.abs(error).max() < 2.3e-4


@pytest.mark.slow
def test_the_norm_of_bfloat16_params_holds_over_10_000_steps():
    w = problems.normal((2, 64, 64), dtype="bfloat16")
    end, _ = walk(w, 10_000)
    assert norms(end - w).min() > 0.5 * norms(w).min()
    assert np.abs(norms(end) / norms(w) - 1).max() < 2.3e-4


def test_float16_params_too():
    w = problems.normal((16, 64, 64), dtype="float16")
    _, seen = walk(w, 200)
    # An eighth of the rounding of bfloat16.
    assert rms(seen / norms(w) - 1) < 6e-6


def test_the_current_norm_would_drift_in_bfloat16():
    # Why the first norm is stored: rounding errors would add up.
    w = problems.normal((16, 64, 64), dtype="bfloat16")
    _, seen = walk(w, 200, tx=DRIFT)
    error = seen / norms(w) - 1
    assert rms(error[-50:]) > 2 * rms(error[1:51])
    assert rms(error[-50:]) > 3e-4


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
