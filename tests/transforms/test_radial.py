"""radial_brake, radial_retract: the radial part of an update and of a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from tests import problems

STEPS = 30


def wide(x):
    return np.asarray(x, np.float64)


def parts(u, w):
    """The tangential and the radial part of an update."""
    radial = (u * w).sum() / (w * w).sum() * w
    return u - radial, radial


@pytest.mark.parametrize("sign", [1, -1])
def test_the_brake_scales_what_is_parallel_to_the_parameter(sign):
    w = problems.normal((2, 5, 3))
    u = 0.3 * sign * w + problems.normal((2, 5, 3), 1)
    tx = om.radial_brake(0.5, 0.8)
    (got,), _ = problems.unroll(tx, [u], w)
    for mine, update, weight in zip(wide(got), wide(u), wide(w), strict=True):
        tangential, radial = parts(update, weight)
        # The step is against the update.
        factor = 0.5 if (update * weight).sum() < 0 else 0.8
        np.testing.assert_allclose(mine, tangential + factor * radial, atol=1e-6)


def test_a_brake_of_zero_keeps_the_norm_to_first_order():
    w, u = problems.normal((6, 4)), problems.normal((6, 4), 1)
    (got,), _ = problems.unroll(om.radial_brake(0.0, 0.0), [u], w)
    assert abs(float((got * w).sum())) <= 1e-5 * float(jnp.linalg.norm(u))
    (same,), _ = problems.unroll(om.radial_brake(1.0, 1.0), [u], w)
    np.testing.assert_array_equal(same, u)
    (zero,), _ = problems.unroll(om.radial_brake(), [u], jnp.zeros_like(w))
    np.testing.assert_array_equal(zero, u)


def retracted(w, step, decay):
    """The rule of modded-nanogpt's record 46, for one matrix."""
    target = np.linalg.norm(w) + (step * w).sum() / np.linalg.norm(w)
    end = w + step
    end = end * target / np.linalg.norm(end)
    return np.where(step * w < 0, (1 - decay) * end, end)


@pytest.mark.parametrize("scheduled", [False, True])
def test_the_retraction_follows_its_formula_over_many_steps(scheduled):
    steps = np.random.default_rng(0).normal(0, 0.1, (STEPS, 2, 5, 3))
    decays = np.linspace(0.05, 0.0, STEPS) if scheduled else np.full(STEPS, 0.03)
    decay = (lambda count: jnp.asarray(decays)[count]) if scheduled else 0.03
    with jax.enable_x64(True):
        w = jnp.asarray(problems.normal((2, 5, 3), 7), "float64")
        want = wide(w)
        given = [jnp.asarray(s) for s in steps]
        iterates, state = problems.run(om.radial_retract(decay), w, given)
    for got, step, d in zip(iterates, steps, decays, strict=True):
        want = np.stack([retracted(*pair, d) for pair in zip(want, step, strict=True)])
        np.testing.assert_allclose(got, want, rtol=1e-6 if scheduled else 1e-12)
    assert state.count == STEPS


def test_only_the_radial_part_changes_the_norm():
    w = problems.normal((6, 4))
    _, along = parts(wide(problems.normal((6, 4), 1)), wide(w))
    across, _ = parts(wide(problems.normal((6, 4), 2)), wide(w))
    (got,), _ = problems.unroll(
        om.radial_retract(), [jnp.asarray(across, "float32")], w
    )
    lengths = [np.linalg.norm(x) for x in (w, wide(w) + across, wide(w) + wide(got))]
    assert lengths[1] > 1.2 * lengths[0]
    np.testing.assert_allclose(lengths[2], lengths[0], rtol=1e-6)
    (got,), _ = problems.unroll(om.radial_retract(), [jnp.asarray(along, "float32")], w)
    np.testing.assert_allclose(got, along, atol=1e-6)


def test_a_step_past_the_centre_ends_there():
    w = jnp.array([[1.0, 0.0], [0.0, 0.0]])
    for along, norm in ((-0.99, 0.01), (-1.01, 0.0)):
        step = jnp.array([[along, 3.0], [0.0, 0.0]])
        (got,), _ = problems.unroll(om.radial_retract(), [step], w)
        np.testing.assert_allclose(jnp.linalg.norm(w + got), norm, atol=1e-6)
    (got,), _ = problems.unroll(om.radial_retract(), [step], jnp.zeros_like(w))
    np.testing.assert_array_equal(got, step)


def test_the_radius_does_not_drift():
    # 10,000 tangential steps of a tenth of the norm: rounding alone may change it.
    def step(w, key):
        u = jax.random.normal(key, w.shape)
        u -= jnp.vdot(u, w) / jnp.vdot(w, w) * w
        u *= 0.1 * jnp.linalg.norm(w) / jnp.linalg.norm(u)
        moved, _ = tx.update(u, tx.init(w), w)
        return optax.apply_updates(w, moved), None

    tx, w = om.radial_retract(), problems.normal((8, 6))
    keys = jax.random.split(jax.random.key(0), 10_000)
    end, _ = jax.jit(lambda w: jax.lax.scan(step, w, keys))(w)
    assert abs(float(jnp.linalg.norm(end) / jnp.linalg.norm(w)) - 1) < 1e-3
    assert float(jnp.vdot(end, w)) < 0.9 * float(jnp.vdot(w, w))


def test_bad_arguments_are_named():
    for make in (om.radial_brake, lambda x: om.radial_brake(0.5, x), om.radial_retract):
        with pytest.raises(ValueError, match="must lie in"):
            make(-0.1)
    w = problems.normal((3, 2))
    for tx in (om.radial_brake(), om.radial_retract()):
        with pytest.raises(ValueError, match="needs the parameters"):
            tx.update(w, tx.init(w))
