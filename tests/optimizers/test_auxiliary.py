"""The auxiliary optimizer, schedules, the registry, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from tests import problems
from tests.transforms.every import VARIANTS, case


def leaves_after(tx, steps=3):
    params = problems.matrix_tree()
    grads = [problems.matrix_tree(seed=t) for t in range(1, steps + 1)]
    iterates, _ = problems.run(tx, params, grads)
    return iterates[-1]


@pytest.mark.parametrize(
    "settings, auxiliary",
    [
        ({}, optax.adamw(0.003, b2=0.95, weight_decay=0.0)),
        (
            {"auxiliary_learning_rate": 1e-3},
            optax.adamw(1e-3, b2=0.95, weight_decay=0.0),
        ),
        ({"auxiliary": optax.sgd(0.1)}, optax.sgd(0.1)),
    ],
)
def test_the_rest_is_trained_by_the_auxiliary_optimizer(settings, auxiliary):
    got, want = leaves_after(om.muon(0.02, **settings)), leaves_after(auxiliary)
    for key in ("norm", "embed"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            got[key],
            want[key],
        )
    np.testing.assert_allclose(got["tall"]["bias"], want["tall"]["bias"], rtol=1e-6)


def test_schedules_drive_both():
    def halves(count):
        return 0.1 * 0.5**count

    got = leaves_after(om.muon(halves), steps=2)
    params, first, second = (problems.matrix_tree(seed=s) for s in (0, 1, 2))
    tx = om.muon(1.0)
    state = tx.init(params)
    u1, state = tx.update(first, state, params)
    u2, _ = tx.update(second, state, params)
    want = jax.tree.map(lambda p, a, b: p + 0.1 * a + 0.05 * b, params, u1, u2)
    # A learning rate of 1 and one of 0.1 round differently.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want
    )


# As soap, muon and shampoo.
SLOW = {"kl_soap", "soap_muon", "nanochat_muon", "track3", "distributed_shampoo"}


@pytest.mark.parametrize(
    "name", [case(name, slow=SLOW | VARIANTS) for name in om.OPTIMIZERS]
)
def test_every_rung_of_the_registry_descends(name):
    target, start = (
        {"kernel": problems.normal((6, 4), s), "bias": problems.normal((4,), s + 1)}
        for s in (5, 7)
    )

    def loss(params):
        gaps = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, target)
        return sum(jax.tree.leaves(gaps))

    tx = om.make_optimizer(name, 0.02)
    params, state = start, tx.init(start)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(20):
        params, state = step(params, state)
    assert loss(params) < 0.97 * loss(start)


def test_adam_l2_adds_the_penalty_to_the_gradient():
    params = {"kernel": problems.normal((4, 3))}
    grads = {"kernel": problems.normal((4, 3), 1)}
    tx = om.make_optimizer("adam_l2", 0.1, weight_decay=0.5)
    got, _ = tx.update(grads, tx.init(params), params)
    adam = optax.adam(0.1)
    penalized = {"kernel": grads["kernel"] + 0.5 * params["kernel"]}
    want, _ = adam.update(penalized, adam.init(params), params)
    np.testing.assert_allclose(got["kernel"], want["kernel"], rtol=1e-6)


def test_an_unknown_name_raises():
    with pytest.raises(ValueError, match=r"`name` must be one of sgd, .*got 'mion'"):
        om.make_optimizer("mion", 0.1)


def test_the_rate_of_an_auxiliary_optimizer_of_ones_own_raises():
    with pytest.raises(ValueError, match="`auxiliary_learning_rate` is that of the"):
        om.muon(0.1, auxiliary=optax.sgd(1.0), auxiliary_learning_rate=0.1)


def test_muonh_refuses_a_zero_matrix_with_its_path():
    with pytest.raises(ValueError, match="'mlp/kernel'"):
        om.muonh(0.1).init({"mlp": {"kernel": jnp.zeros((3, 2))}})
