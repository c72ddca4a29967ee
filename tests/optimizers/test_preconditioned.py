"""Shampoo, SOAP and their variants against chains of published rules, over 25 steps."""

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

STEPS = 25
TALL = (8, 5)
RATE = 0.02


def run(tx, shape=TALL):
    """Iterates and states, the first parameters, and the gradients.

    Without `jit`, the tests share what the library itself compiles.
    """
    grads = histories.gradients(shape)
    w = problems.with_spectrum(shape, np.ones(min(shape)))
    seen = []
    with jax.enable_x64(True):
        params = {"kernel": jnp.asarray(w)}
        state = tx.init(params)
        for g in grads[:STEPS]:
            updates, state = tx.update({"kernel": jnp.asarray(g)}, state, params)
            params = optax.apply_updates(params, updates)
            seen.append(jax.tree.map(np.asarray, (params["kernel"], state)))
    iterates, states = jax.tree.map(lambda *xs: np.stack(xs), *seen)
    return iterates, states, w, grads[:STEPS]


def shampoo(grads, b1=0.9, b2=0.95, **settings):
    settings = {"damping": 1e-6, "refresh": 3} | settings
    return reference.shampoo(grads, b1=b1, b2=b2, **settings)


def adam(grads, b1=0.9):
    return optimizers.adam_directions(grads, b1, 0.95, 1e-8)


def adagrad(grads):
    return grads / np.sqrt(0.1 + np.cumsum(grads**2, axis=0) + 1e-7)


def rmsprop(grads):
    weights = 0.05 * 0.95 ** np.subtract.outer(np.arange(STEPS), np.arange(STEPS))
    v = np.einsum("ts,sij->tij", np.tril(weights), grads**2)
    return grads / np.sqrt(v + 1e-8)


def assert_descends(got, w, directions, weight_decay=0.0, tolerance=1e-8):
    want = optimizers.descend(w, directions, RATE, weight_decay)
    # Optax converts some hyperparameters to float32: 1e-8 of the steps.
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def momentum(grads):
    return optimizers.momenta(grads, 0.9, nesterov=False, debias=True)


GRAFTS = {"adam": adam, "adagrad": adagrad, "rmsprop": rmsprop, "sgd": momentum}


@pytest.mark.parametrize("graft", GRAFTS)
def test_shampoo_has_the_size_of_what_it_is_grafted_to(graft):
    tx = om.shampoo(RATE, refresh=3, graft=graft, weight_decay=0.1)
    got, _, w, grads = run(tx)
    directions = reference.grafted(GRAFTS[graft](grads), shampoo(grads))
    assert_descends(got, w, directions, 0.1)


def test_shampoo_settings():
    tx = om.shampoo(
        RATE,
        momentum=None,
        b2=None,
        damping=1e-3,
        start=2,
        refresh=4,
        graft=optax.scale(2.0),
        preconditioner=om.Shampoo(exponents=(-0.5, None)),
    )
    got, _, w, grads = run(tx)
    settings = {"damping": 1e-3, "start": 2, "refresh": 4, "exponents": (-0.5, None)}
    directions = shampoo(grads, b1=0, b2=1, **settings)
    assert_descends(got, w, reference.grafted(2 * grads, directions))


def test_shampoo_without_a_graft():
    got, _, w, grads = run(om.shampoo(RATE, refresh=3, graft=None))
    assert_descends(got, w, shampoo(grads))


def test_grafts_have_the_momentum_of_shampoo():
    # Without momentum, Adam has its usual 0.9, and SGD is the gradient.
    for given, b1, graft, magnitude in [
        (None, 0, "adam", adam),
        (0.5, 0.5, "adam", lambda grads: adam(grads, 0.5)),
        (None, 0, "sgd", lambda grads: grads),
        (0.5, 0.5, "sgd", lambda g: optimizers.momenta(g, 0.5, False, True)),
    ]:
        tx = om.shampoo(RATE, momentum=given, refresh=3, graft=graft)
        got, _, w, grads = run(tx)
        directions = reference.grafted(magnitude(grads), shampoo(grads, b1))
        assert_descends(got, w, directions)


def test_grafting_to_sgd_is_a_chain_of_public_stages():
    # As PyTorch's Distributed Shampoo: the momentum is filtered, not the raw gradient.
    direction = om.shampoo_precondition(refresh=3)
    chain = optax.chain(
        om.graft_to(om.ema_momentum(0.9, nesterov=False, debias=True), direction),
        optax.scale_by_learning_rate(RATE),
    )
    got, _, w, grads = run(chain)
    want, *_ = run(om.shampoo(RATE, refresh=3, graft="sgd"))
    np.testing.assert_array_equal(got, want)
    assert_descends(got, w, reference.grafted(momentum(grads), shampoo(grads)))
    # Grafted to the gradient itself, steps have other sizes.
    raw, *_ = run(om.shampoo(RATE, refresh=3, graft=optax.identity()))
    sizes = [np.linalg.norm(np.diff(x, axis=0), axis=(1, 2)) for x in (raw, got)]
    assert (sizes[0] / sizes[1]).max() > 2


@pytest.mark.parametrize("stagger", [False, True])
def test_distributed_shampoo_is_shampoo_on_blocks(stagger):
    settings = om.Shampoo(block_size=5, stagger=stagger)
    got, states, w, grads = run(
        om.distributed_shampoo(
            RATE, refresh=3, weight_decay=0.1, preconditioner=settings
        )
    )
    matrices = states.inner_states["matrix"].inner_state[0].direction.matrices
    assert set(matrices) == {"5x5", "3x5"}
    shapes = [(5, 5), (3, 5)]
    turns = reference.turns(shapes, 3) if stagger else [0, 0]
    assert (turns[0] != turns[1]) == stagger
    blocks = histories.blocks(TALL, 5)
    for block, shape, turn in zip(blocks, shapes, turns, strict=True):
        given = grads[block]
        roots = matrices[f"{shape[0]}x{shape[1]}"].state.left.root
        (found,) = histories.turns(histories.changes(roots), 3)
        assert found == turn
        directions = reference.grafted(adam(given), shampoo(given, turn=turn))
        assert_descends(got[block], w[block[1:]], directions, 0.1)


def test_distributed_shampoo_staggers_and_has_large_blocks_by_itself():
    got, _, w, grads = run(om.distributed_shampoo(RATE, refresh=3))
    # The middle of a single block is that of the round.
    (turn,) = reference.turns([TALL], 3)
    assert turn == 1
    directions = reference.grafted(adam(grads), shampoo(grads, turn=turn))
    assert_descends(got, w, directions)
    with jax.enable_x64(True):
        wide = {"kernel": jax.ShapeDtypeStruct((1025, 3), "float32")}
        state = jax.eval_shape(om.distributed_shampoo().init, wide)
    inner = state.inner_states["matrix"].inner_state[0].direction
    assert set(inner.matrices) == {"1024x3", "1x3"}


def first_bases(states):
    own = states.inner_states["matrix"].inner_state[0].matrices["8x5"].state
    return own.left.basis[0, 0], own.right.basis[0, 0]


@pytest.mark.parametrize(
    "name, given, settings",
    [
        ("soap", {"refresh": 3}, {"refresh": 3}),
        (
            "soap",
            {
                "momentum": 0.8,
                "b2": 0.9,
                "eps": 1e-3,
                "weight_decay": 0.2,
                "preconditioner": om.SOAP(factor_b2=0.7),
            },
            {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "refresh": 10, "shampoo_b2": 0.7},
        ),
        ("kl_soap", {"refresh": 3}, {"refresh": 3}),
        ("soap", {"preconditioner": om.KL(), "refresh": 3}, {"refresh": 3}),
        (
            "kl_soap",
            {
                "momentum": 0.8,
                "b2": 0.9,
                "eps": 1e-3,
                "weight_decay": 0.2,
                "preconditioner": om.KL(initial=0.5),
            },
            {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "refresh": 10, "initial": 0.5},
        ),
    ],
    ids=str,
)
def test_soap_and_kl_soap(name, given, settings):
    got, states, w, grads = run(getattr(om, name)(RATE, **given))
    settings = {"b1": 0.95, "b2": 0.95, "eps": 1e-8} | settings
    has_kl = isinstance(given.get("preconditioner"), om.KL)
    rule = reference.kl_soap if has_kl else getattr(reference, name)
    directions = rule(grads, first_bases=first_bases(states), **settings)
    assert_descends(got, w, directions, given.get("weight_decay", 0.01))


@pytest.mark.parametrize(
    "given, scale", [({"shape_scale": None}, 1.0), ({}, 2**0.5)], ids=str
)
def test_soap_muon(given, scale):
    # Wide, so that the shape has a factor.
    tx = om.soap_muon(RATE, refresh=3, weight_decay=0.1, **given)
    got, states, w, grads = run(tx, (4, 8))
    own = states.inner_states["matrix"].inner_state[0].matrices["4x8"].state
    directions = reference.soap(
        grads,
        b1=0.95,
        b2=0.95,
        eps=1e-8,
        refresh=3,
        first_bases=(own.left.basis[0, 0], own.right.basis[0, 0]),
    )
    directions = scale * np.stack([optimizers.newton_schulz(d) for d in directions])
    # Five iterations that amplify what is small.
    assert_descends(got, w, directions, 0.1, tolerance=1e-6)


def test_soap_muon_takes_another_method():
    params = {"kernel": problems.normal((6, 4))}
    grads = [{"kernel": problems.normal((6, 4), seed)} for seed in (1, 2, 3)]
    tx = om.soap_muon(1.0, orthogonalize="exact", shape_scale=None)
    iterates, _ = problems.run(tx, params, grads)
    np.testing.assert_array_equal(iterates[0]["kernel"], params["kernel"])
    step = iterates[2]["kernel"] - iterates[1]["kernel"]
    np.testing.assert_allclose(step.T @ step, np.eye(4), atol=1e-5)


FACTORIES = {
    "shampoo": om.Shampoo,
    "distributed_shampoo": om.Shampoo,
    "soap": om.SOAP,
    "kl_soap": om.KL,
    "soap_muon": om.SOAP,
}
every = pytest.mark.parametrize("name", FACTORIES)


@every
def test_biases_and_embeddings_have_adam(name):
    shapes = {"up": {"kernel": (4, 3), "bias": (3,)}, "embed": {"embedding": (5, 4)}}
    grads = histories.gradients(shapes, 1)
    grads = jax.tree.map(lambda g: jnp.asarray(g[0], "float32"), grads)
    params = jax.tree.map(jnp.ones_like, grads)
    tx = getattr(om, name)(0.1, auxiliary_learning_rate=0.01)
    got, state = problems.run(tx, params, [grads, grads])
    want, _ = problems.run(optax.adam(0.01, b2=0.95), params, [grads, grads])
    for key in (("embed", "embedding"), ("up", "bias")):
        leaves = [tree[-1][key[0]][key[1]] for tree in (got, want)]
        np.testing.assert_allclose(*leaves, rtol=1e-5)
    # The first update may be zero.
    assert jnp.abs(got[1]["up"]["kernel"] - got[0]["up"]["kernel"]).min() > 0
    assert len(om.diagnostics.refreshes(state)) == 2
    om.diagnostics.check_refreshes(state)


@every
def test_settings_reach_the_preconditioner(name):
    # What shows in the state.
    shape = {"kernel": jax.ShapeDtypeStruct((6, 4), "float32")}

    def shapes(**settings):
        tx = getattr(om, name)(preconditioner=FACTORIES[name](**settings))
        tree = jax.eval_shape(tx.init, shape)
        return [(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(tree)]

    low = shapes(factor_dtype="bfloat16")
    half = [size for size, dtype in low if dtype == "bfloat16"]
    # A statistic, and a basis or a root; what is symmetric is packed.
    rooted = "shampoo" in name
    assert half.count((1, 7, 3)) == half.count((1, 5, 2)) == 1 + rooted
    assert half.count((1, 6, 6)) == half.count((1, 4, 4)) == 1 - rooted
    assert {size for size, _ in shapes()} >= {(1, 7, 3), (1, 5, 2)}
    assert not {size for size, _ in shapes(max_dim=4)} & {(1, 7, 3)}


BAD = [
    ({"learning_rate": -1.0}, "`learning_rate` must lie"),
    ({"momentum": 1.0}, "`momentum` must lie"),
    ({"b2": -0.5}, "`b2` must lie"),
    ({"refresh": 0}, "`refresh` must be at least 1"),
    ({"weight_decay": -0.1}, "`weight_decay` must lie"),
    ({"auxiliary_learning_rate": -1.0}, "`auxiliary_learning_rate` must lie"),
]


@pytest.mark.parametrize("settings, message", BAD)
@every
def test_names_the_bad_argument(name, settings, message):
    with pytest.raises(ValueError, match=message):
        getattr(om, name)(**settings)


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("shampoo", {"graft": "lion"}, "`graft` must be one of 'adam', 'rmsprop'"),
        ("shampoo", {"damping": -1.0}, "`damping` must lie"),
        ("shampoo", {"start": -1}, "`start` must be at least 0"),
        ("soap", {"eps": 0.0}, "`eps` must lie"),
        ("kl_soap", {"eps": 0.0}, "`eps` must lie"),
        ("soap_muon", {"orthogonalize": "svd"}, "`orthogonalize` must be one of"),
        ("soap_muon", {"shape_scale": "x"}, "`shape_scale` must be one of"),
    ],
)
def test_names_the_bad_argument_of_one(name, settings, message):
    with pytest.raises(ValueError, match=message):
        getattr(om, name)(**settings)


OTHERS = {om.Shampoo: om.SOAP(), om.SOAP: om.Shampoo(), om.KL: om.SOAP()}
TRANSFORMS = {
    "shampoo_precondition": om.Shampoo,
    "soap_precondition": om.SOAP,
    "kl_soap_precondition": om.KL,
    "kl_shampoo_precondition": om.KL,
}


@pytest.mark.parametrize("name, kind", (FACTORIES | TRANSFORMS).items())
def test_settings_of_another_rule_raise(name, kind):
    with pytest.raises(
        TypeError, match=f"`preconditioner` must be a `{kind.__name__}`"
    ):
        getattr(om, name)(preconditioner=OTHERS[kind])
