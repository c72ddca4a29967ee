"""What every matrix optimizer has in common: leaves, and its last arguments."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from tests import problems
from tests.transforms.every import OPTIMIZERS, SPECTRAL, VARIANTS, case

every = pytest.mark.parametrize("name", [case(name) for name in OPTIMIZERS])
STEPS = 4


def gradients(params, seed):
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(
        [problems.normal(x.shape, 10 * seed + i, x.dtype) for i, x in enumerate(leaves)]
    )


def trained(tx, params, steps=STEPS):
    """The parameters after some steps, and the last state."""
    grads = [gradients(params, seed) for seed in range(1, steps + 1)]
    iterates, state = problems.run(tx, params, grads)
    return iterates[-1], state


@pytest.mark.parametrize("dtype", ["complex64", "int32"])
@every
def test_matrices_that_are_not_real_floating_raise_at_init_with_their_path(name, dtype):
    params = {"up": {"good": jnp.ones((3, 2)), "bad": jnp.ones((3, 2), dtype)}}
    message = f"real floating arrays, got dtype {dtype} at 'up/bad'"
    with pytest.raises(TypeError, match=message):
        OPTIMIZERS[name](0.02, routing="matrix").init(params)


EMPTY = {"a": (0, 4), "b": (4, 0), "c": (2, 0, 4)}
# Long to compile, and made of stages that others have as well.
SLOW = {
    *("kl_soap", "soap_muon", "distributed_shampoo", "shampoo", "track3"),
    *("muonw", "muonh", "normuon", "adamuon", "nanochat_muon"),
    *VARIANTS,
}
some = pytest.mark.parametrize("name", [case(n, slow=SLOW) for n in OPTIMIZERS])


@some
def test_matrices_without_entries_pass_beside_others(name):
    tx, full = OPTIMIZERS[name](0.02, routing="matrix"), {"w": problems.normal((5, 4))}
    params = full | {key: jnp.ones(shape) for key, shape in EMPTY.items()}
    got, _ = trained(tx, params, 2)
    # Empty leaves draw no random numbers, and the other leaf is the last.
    grads = [{"w": gradients(params, seed)["w"]} for seed in (1, 2)]
    want, _ = problems.run(tx, full, grads)
    for key, shape in EMPTY.items():
        assert got[key].shape == shape
    np.testing.assert_allclose(got["w"], want[-1]["w"], rtol=1e-5, atol=1e-6)
    # Eager, and with nothing else.
    empty = {key: params[key] for key in EMPTY}
    updates, _ = tx.update(empty, tx.init(empty), empty)
    assert jax.tree.map(jnp.shape, updates) == EMPTY


# How many arrays of the size of a matrix have `mu_dtype`.
MOMENTS = dict.fromkeys(OPTIMIZERS, 1) | {
    "soap": 2,
    "kl_soap": 2,
    "soap_muon": 2,
    "track3": 2,
    # Its own momentum and that of the Adam that it is grafted to.
    "shampoo": 2,
    "distributed_shampoo": 2,
}


@pytest.mark.parametrize(
    "name, settings, count",
    [
        *(case(name, {}, count, slow=SLOW) for name, count in MOMENTS.items()),
        ("hopper", {"variance": "pre"}, 1),
        pytest.param("shampoo", {"graft": "sgd"}, 2, marks=pytest.mark.slow),
        pytest.param("shampoo", {"graft": "rmsprop"}, 1, marks=pytest.mark.slow),
        ("shampoo", {"graft": None, "momentum": None}, 0),
    ],
    ids=str,
)
def test_momentum_has_mu_dtype(name, settings, count):
    params = {"kernel": problems.normal((5, 4)), "bias": jnp.ones(4)}

    def final(mu_dtype):
        tx = OPTIMIZERS[name](0.02, mu_dtype=mu_dtype, **settings)
        end, state = trained(tx, params)
        floats = [x for x in jax.tree.leaves(state) if x.dtype not in ("int32", "bool")]
        return end, [x.size for x in floats if x.dtype == "bfloat16"], len(floats)

    got, low, leaves = final("bfloat16")
    want, none, same = final(None)
    assert low == [20] * count and not none and leaves == same
    np.testing.assert_array_equal(got["bias"], want["bias"])
    moved = np.abs(want["kernel"] - params["kernel"]).max()
    off = np.abs(got["kernel"] - want["kernel"]).max()
    assert off <= 0.05 * moved
    # AdaMuon takes signs, which the rounding does not change here.
    assert (off > 0) == (count > 0 and name != "adamuon")


def warming(count):
    """A schedule of the momentum that changes in every update."""
    return 0.5 + 0.1 * jnp.minimum(count, 4)


@some
def test_the_momentum_may_be_a_schedule(name):
    params = {"kernel": problems.normal((5, 4)), "bias": problems.normal((4,), 1)}
    make = OPTIMIZERS[name]
    if name == "dion":  # Alone, one output at a time, it is divided by its norm.
        make = functools.partial(make, orthogonalize="exact")
    got, _ = trained(make(0.02, momentum=warming), params)
    want, _ = trained(optax.inject_hyperparams(make)(0.02, momentum=warming), params)
    plain, _ = trained(make(0.02, momentum=0.5), params)
    np.testing.assert_allclose(got["kernel"], want["kernel"], rtol=1e-5, atol=1e-6)
    assert np.abs(got["kernel"] - plain["kernel"]).max() > 1e-4
    with pytest.raises(ValueError, match="`momentum` must lie"):
        OPTIMIZERS[name](momentum=1.0)


# Their decay is not that of `optax.add_decayed_weights`, or is followed by others.
OWN_DECAY = {"muonh", "adamh", "track3", "nanochat_muon", "spectral_sphere", "spel"}


def five_rows(tree):
    return jax.tree.map(lambda x: len(x) == 5, tree)


FIVE_ROWS = {
    "decays": {"kernel": True, "bias": np.array(True)},
    "stays": {"kernel": np.array(False)},
}


@pytest.mark.parametrize(
    "mask",
    [FIVE_ROWS, pytest.param(five_rows, marks=pytest.mark.slow)],
    ids=["tree", "function"],
)
@some
def test_weight_decay_mask_says_which_matrices_decay(name, mask):
    params = {
        "decays": {"kernel": problems.normal((5, 4)), "bias": jnp.ones(4)},
        "stays": {"kernel": problems.normal((4, 3), 1)},
    }

    def one(**settings):
        tx = OPTIMIZERS[name](0.5, **settings)
        return tx.update(gradients(params, 1), tx.init(params), params)[0]

    none, some = one(weight_decay=0.0), one(weight_decay=0.1, weight_decay_mask=mask)
    both = one(weight_decay=0.1)
    kernel = params["decays"]["kernel"]
    np.testing.assert_array_equal(some["stays"]["kernel"], none["stays"]["kernel"])
    np.testing.assert_array_equal(some["decays"]["kernel"], both["decays"]["kernel"])
    np.testing.assert_array_equal(some["decays"]["bias"], none["decays"]["bias"])
    if name in OWN_DECAY:
        assert jnp.abs(some["decays"]["kernel"] - none["decays"]["kernel"]).max() > 1e-3
    else:
        want = none["decays"]["kernel"] - 0.5 * 0.1 * kernel
        np.testing.assert_allclose(some["decays"]["kernel"], want, rtol=1e-5, atol=1e-6)
    assert jnp.abs(both["stays"]["kernel"] - none["stays"]["kernel"]).max() > 1e-3


def halves(count):
    return 0.1 * 0.5**count


def test_weight_decay_may_be_a_schedule():
    params = {"kernel": problems.normal((5, 4))}
    tx, plain = om.muon(0.5, weight_decay=halves), om.muon(0.5)
    state, other = tx.init(params), plain.init(params)
    for count in range(2):
        got, state = tx.update(params, state, params)
        want, other = plain.update(params, other, params)
        want = want["kernel"] - 0.5 * halves(count) * params["kernel"]
        np.testing.assert_allclose(got["kernel"], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "weight_decay", [halves, np.float32(0.1)], ids=["schedule", "array"]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_of_any_type_keeps_the_dtype(name, weight_decay):
    params = {"kernel": jnp.ones((5, 4), "bfloat16"), "frozen": None}
    tx = OPTIMIZERS[name](0.02, weight_decay=weight_decay)

    def first(params):
        return tx.update(params, tx.init(params), params)[0]

    chex.assert_trees_all_equal_dtypes(jax.eval_shape(first, params), params)


def test_a_radius_that_is_an_array_keeps_the_dtype():
    params = {"kernel": jnp.ones((5, 4), "bfloat16")}
    tx = om.spectral_sphere(0.02, radius=jnp.float32(2.0))

    def first(params):
        return tx.update(params, tx.init(params), params)[0]

    assert jax.eval_shape(first, params)["kernel"].dtype == "bfloat16"


FACTORS = [(name, {}, 0.15 if name in SPECTRAL else 1.0) for name in OPTIMIZERS]
FACTORS += [
    (name, {"shape_scale": "rms"}, 1.0)
    for name in ("muon", "muonw", "normuon", "dion", "soap_muon", "muon_squared")
]
FACTORS += [("muon", {"shape_scale": rule}, 0.15) for rule in (None, "mup")]
FACTORS += [("muon_vs", {"shape_scale": "spectral"}, 0.15)]


def adamw(rate):
    return optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.0)


@pytest.mark.parametrize(
    "name, settings, factor", [case(*f, slow=SLOW) for f in FACTORS], ids=str
)
def test_the_default_rate_of_the_auxiliary_optimizer(name, settings, factor):
    # A matrix without entries, because others take longer to compile.
    params = {"kernel": jnp.ones((0, 4)), "bias": problems.normal((4,), 1)}
    grads = [gradients(params, seed) for seed in range(1, STEPS + 1)]

    def ends(tx):
        return problems.run(tx, params, grads)[0][-1]["bias"]

    make = OPTIMIZERS[name]
    cases = [
        (make(0.02, **settings), factor * 0.02),
        (make(halves, **settings), lambda count: factor * halves(count)),
        (make(0.02, **settings, auxiliary_learning_rate=1e-3), 1e-3),
        (make(0.02, **settings, auxiliary_learning_rate=halves), halves),
    ]
    for tx, rate in cases:
        np.testing.assert_allclose(ends(tx), ends(adamw(rate)), rtol=1e-6)


def test_an_injected_rate_drives_the_auxiliary_optimizer():
    params = {"kernel": problems.normal((5, 4)), "bias": problems.normal((4,), 1)}
    tx = optax.inject_hyperparams(om.muon)(learning_rate=halves)
    grads = [gradients(params, seed) for seed in range(1, STEPS + 1)]
    got, _ = problems.run(tx, params, grads)
    want, _ = problems.run(om.muon(halves), params, grads)
    for a, b in zip(got, want, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)


@pytest.mark.parametrize(
    "bad", [np.inf, pytest.param(-np.inf, marks=pytest.mark.slow), np.nan]
)
@every
def test_a_gradient_that_is_not_finite_shows_for_good(name, bad):
    # And without spoiling the other matrix.
    params = {"kernel": problems.normal((2, 5, 4))}
    tx = OPTIMIZERS[name](0.01, routing="matrix")
    grads = [params, {"kernel": params["kernel"].at[0, 1, 2].set(bad)}]
    grads += [jax.tree.map(jnp.negative, params)] * 8
    iterates, _ = problems.run(tx, params, grads)
    for iterate in iterates[1:]:
        assert not jnp.isfinite(iterate["kernel"][0]).all()
        assert jnp.isfinite(iterate["kernel"][1]).all()
