"""graft_to: one transformation's direction, each matrix with the norm of another's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from tests import problems
from tests.references import optimizers
from tests.references import preconditioners as reference
from tests.transforms import histories

TALL = (2, 8, 5)


def adagrad(grads):
    return grads / np.sqrt(0.1 + np.cumsum(grads**2, axis=0) + 1e-7)


def rmsprop(grads):
    v, out = 0.0, []
    for g in grads:
        v = 0.95 * v + 0.05 * g**2
        out.append(g / np.sqrt(v + 1e-8))
    return np.stack(out)


def adam(grads):
    return optimizers.adam_directions(grads, 0.9, 0.95, 1e-8)


MAGNITUDES = {
    "sgd": (optax.identity(), lambda grads: grads),
    "adagrad": (optax.scale_by_rss(), adagrad),
    "rmsprop": (optax.scale_by_rms(0.95), rmsprop),
    "adam": (optax.scale_by_adam(0.9, 0.95), adam),
}


def shampoo(grads):
    return reference.shampoo(grads, b1=0.9, b2=0.95, damping=1e-6, refresh=3)


@pytest.mark.parametrize("name", MAGNITUDES)
def test_matches_float64_reference(name):
    grads = histories.gradients(TALL)
    tx, magnitude = MAGNITUDES[name]
    tx = om.graft_to(tx, om.shampoo_precondition(refresh=3))
    got, state = histories.of(tx, grads)
    for i in range(2):
        want = reference.grafted(magnitude(grads[:, i]), shampoo(grads[:, i]))
        histories.close(got[:, i], want, 1e-9)
    assert list(om.diagnostics.refreshes(state)) == [
        f"direction/matrices/8x5/state/{side}" for side in ("left", "right")
    ]


def test_each_block_has_a_norm_of_its_own():
    grads = histories.gradients({"a": (2, 7, 8)}, 4)
    tx = om.graft_to(optax.scale_by_rss(), optax.identity(), block_size=5)
    got, _ = histories.of(tx, grads, jit=True)
    tx = om.graft_to(optax.scale_by_rss(), optax.identity())
    whole, _ = histories.of(tx, grads, jit=True)
    for _, found, given in histories.pairs(got, grads):
        for block in histories.blocks((7, 8), 5):
            want = reference.grafted(adagrad(given[block]), given[block])
            histories.close(found[block], want, 1e-12)
    for _, found, given in histories.pairs(whole, grads):
        histories.close(found, reference.grafted(adagrad(given), given), 1e-12)


def test_blocks_are_those_of_the_preconditioner():
    grads = histories.gradients((9, 8), 12)
    settings = om.Shampoo(block_size=5)
    direction = om.shampoo_precondition(refresh=3, preconditioner=settings)
    tx = om.graft_to(optax.scale_by_rss(), direction, block_size=5)
    got, _ = histories.of(tx, grads)
    for block in histories.blocks((9, 8), 5):
        want = reference.grafted(adagrad(grads[block]), shampoo(grads[block]))
        histories.close(got[block], want, 1e-9)


def test_layouts_say_what_is_a_matrix():
    grads = histories.gradients((3, 4, 6), 2)
    layout = om.MatrixLayout(inputs=-1, outputs=0, split_inputs=(4, 2))
    tx = om.graft_to(optax.scale_by_rss(), optax.identity(), layout=layout)
    got, _ = histories.of(tx, grads, jit=True)
    for i in range(4):
        for cut in (slice(0, 4), slice(4, 6)):
            given = grads[:, :, i, cut]
            want = reference.grafted(adagrad(given), given)
            histories.close(got[:, :, i, cut], want, 1e-12)


def test_a_zero_direction_or_magnitude_gives_zero_beside_others():
    direction = histories.gradients((3, 4, 5), 1)
    direction[:, 0] = 0
    norms = np.array([2.0, 0.0, 3.0], np.float32)

    def of_norm(updates, state, params=None):
        return jnp.broadcast_to(norms[:, None, None] / 20**0.5, updates.shape), state

    magnitude = optax.GradientTransformation(lambda params: optax.EmptyState(), of_norm)
    tx = om.graft_to(magnitude, optax.identity())
    got, _ = histories.of(tx, direction, "float32", jit=True)
    assert not got[0, :2].any()
    want = direction[0, 2] * 3 / np.linalg.norm(direction[0, 2])
    np.testing.assert_allclose(got[0, 2], want, rtol=1e-5)


def test_a_first_update_of_zero_stays_zero():
    grads = histories.gradients(TALL, 3)
    tx = om.graft_to(optax.identity(), om.soap_precondition(refresh=3))
    got, _ = histories.of(tx, grads)
    assert not got[0].any()
    norms = np.linalg.norm(grads, axis=(2, 3))
    np.testing.assert_allclose(np.linalg.norm(got, axis=(2, 3))[1:], norms[1:])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_neither_overflow_nor_underflow(scale):
    direction = problems.normal((4, 5))
    tx = om.graft_to(optax.scale(scale), optax.scale(10 * scale))
    got, _ = problems.unroll(tx, [direction])
    np.testing.assert_allclose(got[0], scale * direction, rtol=1e-5)


def test_updates_keep_the_dtype_of_the_direction():
    grads = problems.normal((2, 8, 8), dtype="bfloat16")
    tx = om.graft_to(optax.identity(), optax.scale(3.0))
    got, _ = problems.unroll(tx, list(grads))
    assert got[0].dtype == jnp.bfloat16
    # Norms are in float32: what is off is rounding of entries, up as often as down.
    for found, given in zip(got, grads, strict=True):
        sizes = [np.linalg.norm(np.asarray(x, np.float64)) for x in (found, given)]
        np.testing.assert_allclose(*sizes, rtol=1e-3)


def test_parameters_and_further_arguments_reach_both():
    def adds(name):
        def update(updates, state, params=None, **extra_args):
            return jax.tree.map(
                lambda u, p: u * 0 + (p if name == "params" else extra_args[name]),
                updates,
                params,
            ), state + 1

        return optax.GradientTransformationExtraArgs(lambda p: jnp.zeros(()), update)

    grads, params = jnp.ones((3, 4)), 5.0 * jnp.ones((3, 4))
    tx = om.graft_to(adds("value"), adds("params"))
    state = tx.init(params)
    got, state = tx.update(grads, state, params, value=7.0)
    np.testing.assert_allclose(got, 7.0 * np.ones((3, 4)), rtol=1e-6)
    assert state.magnitude == state.direction == 1
    tx = om.graft_to(adds("params"), adds("value"))
    got, _ = tx.update(grads, tx.init(params), params, value=7.0)
    np.testing.assert_allclose(got, 5.0 * np.ones((3, 4)), rtol=1e-6)


@pytest.mark.parametrize("bad", [None, "adam", optax.adam, (1, 2)])
def test_names_what_is_no_transformation(bad):
    message = "`{}` must be an optax.GradientTransformation, such as .*, got"
    with pytest.raises(TypeError, match=message.format("magnitude")):
        om.graft_to(bad, optax.identity())
    with pytest.raises(TypeError, match=message.format("direction")):
        om.graft_to(optax.identity(), bad)


def test_names_the_bad_argument_or_leaf():
    both = optax.identity(), optax.identity()
    with pytest.raises(ValueError, match="`block_size` must be at least 1"):
        om.graft_to(*both, block_size=0)
    with pytest.raises(TypeError, match="`block_size` must be an int"):
        om.graft_to(*both, block_size=2.0)
    with pytest.raises(ValueError, match=r"'b'.*\(3,\)"):
        om.graft_to(*both).init({"b": jnp.ones(3)})
