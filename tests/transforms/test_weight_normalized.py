"""weight_normalized: the same as training v and g of W = g v / ‖v‖ by autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from tests import problems
from tests.references import optimizers as reference

STEPS = 30


def compose(v, g, inputs):
    """W of blocks of some inputs; g has an entry per block and output."""
    blocks = [v[..., i, :] for i in inputs]
    norms = [jnp.linalg.norm(b, axis=-2, keepdims=True) for b in blocks]
    parts = zip(blocks, norms, enumerate(g), strict=True)
    return jnp.concatenate([gi * b / n for b, n, (_, gi) in parts], axis=-2)


@pytest.mark.parametrize(
    "shape, blocks",
    [
        ((6, 4), (2, 4)),
        *(
            pytest.param(shape, None, marks=pytest.mark.slow)
            for shape in [(6, 4), (3, 5), (2, 5, 3)]
        ),
    ],
)
def test_is_the_training_of_v_and_g_by_autodiff(shape, blocks):
    ends = np.cumsum(blocks or (shape[-2],))
    starts = [0, *ends[:-1]]
    inputs = [slice(*map(int, pair)) for pair in zip(starts, ends, strict=True)]
    with jax.enable_x64(True):
        w, target = (problems.normal(shape, s, "float64") for s in (0, 1))

        def loss(w):
            return jnp.sum((jnp.tanh(w) - target) ** 2 * jnp.abs(target))

        way, size = optax.sgd(0.05, momentum=0.9), optax.adam(0.05)
        layout = om.MatrixLayout(split_inputs=blocks)
        tx = om.weight_normalized(way, size, layout=layout)
        v = w
        g = [jnp.linalg.norm(w[..., i, :], axis=-2, keepdims=True) for i in inputs]
        state, way_state, size_state = tx.init(w), way.init(v), size.init(g)
        step = jax.jit(lambda w, s: tx.update(jax.grad(loss)(w), s, w))
        grads = jax.jit(jax.grad(lambda v, g: loss(compose(v, g, inputs)), (0, 1)))
        start = w
        for _ in range(STEPS):
            update, state = step(w, state)
            w = w + update
            d_v, d_g = grads(v, g)
            v_step, way_state = way.update(d_v, way_state)
            g_step, size_state = size.update(d_g, size_state)
            v, g = optax.apply_updates(v, v_step), optax.apply_updates(g, g_step)
            want = compose(v, g, inputs)
            np.testing.assert_allclose(w, want, rtol=1e-9, atol=1e-9)
        assert np.abs(w - start).max() > 0.1
        # It is not reset.
        norms = jnp.concatenate(
            [jnp.linalg.norm(v[..., i, :], axis=-2, keepdims=True) for i in inputs], -2
        )
        np.testing.assert_allclose(jnp.abs(state.length), norms, rtol=1e-9)
        assert np.abs(norms / jnp.concatenate(g, -2) - 1).max() > 0.1


@pytest.mark.slow
def test_g_may_change_its_sign():
    # As in the reference, which keeps g; here its sign is in the state.
    with jax.enable_x64(True):
        w = problems.normal((6, 4), 0, "float64") * 0.02
        grads = problems.normal((STEPS, 6, 4), 1, "float64")
        iterates, state = problems.run(
            om.muown(0.02, routing="matrix"), {"w": w}, [{"w": g} for g in grads]
        )
        got = np.stack([p["w"] for p in iterates])
        want = reference.muown(w, np.asarray(grads), 0.02)
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9)
        assert (optax.tree.get(state, "length")["w"] < 0).any()


def test_an_output_that_is_zero_gets_a_direction_and_then_a_size():
    w = problems.normal((6, 4)).at[:, 1].set(0.0)
    target = problems.normal((6, 4), 1)
    tx = om.muown(0.05, routing="matrix")
    grad = jax.jit(jax.grad(lambda w: jnp.sum((w - target) ** 2)))
    step, state = jax.jit(tx.update), tx.init(w)
    norms = []
    for _ in range(STEPS):
        update, state = step(grad(w), state, w)
        w = w + update
        assert jnp.isfinite(w).all()
        norms.append(float(jnp.linalg.norm(w[:, 1])))
    # Adam's second step, if its first gradient is zero.
    adam = 0.05 * (0.1 / 0.19) / (0.05 / 0.0975) ** 0.5
    np.testing.assert_allclose(norms[:2], [1e-12, adam], rtol=1e-3)
    assert norms[-1] > 0.5
    assert float(target[:, 1] @ w[:, 1]) > 0.8 * norms[-1] * jnp.linalg.norm(
        target[:, 1]
    )
    # Without gradients it stays.
    zeros = jnp.zeros_like(w)
    update, _ = step(zeros, tx.init(zeros), zeros)
    np.testing.assert_array_equal(update, zeros)


@pytest.mark.slow
def test_stages_after_it_may_change_the_step():
    w, d = problems.normal((6, 4)), problems.normal((6, 4), 1)
    inner = om.weight_normalized(optax.sgd(0.1), optax.sgd(0.1))
    tx = optax.chain(inner, optax.scale(0.5))
    state = tx.init(w)
    update, state = tx.update(d, state, w)
    w = w + update
    # The norm of the parameters is g, and v is parallel to them.
    length = state[0].length
    update, _ = inner.update(d, state[0], w)
    g = jnp.linalg.norm(w, axis=0, keepdims=True)
    u = w / g
    along = jnp.sum(d * u, axis=0, keepdims=True)
    end = u * length - 0.1 * (g / length) * (d - along * u)
    end /= jnp.linalg.norm(end, axis=0, keepdims=True)
    want = (g - 0.1 * along) * end
    np.testing.assert_allclose(w + update, want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_schedules_keep_the_dtype_of_bfloat16_parameters():
    w = {"kernel": problems.normal((6, 4), dtype="bfloat16")}
    tx = om.muown(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1)
    update, state = tx.update(w, tx.init(w), w)
    assert update["kernel"].dtype == jnp.bfloat16
    assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(state))


def test_params_are_needed():
    tx = om.weight_normalized(optax.sgd(0.1), optax.sgd(0.1))
    w = jnp.ones((3, 2))
    with pytest.raises(ValueError, match="`weight_normalized` needs the parameters"):
        tx.update(w, tx.init(w))
