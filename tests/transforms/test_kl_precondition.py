"""kl_soap_precondition, kl_shampoo_precondition: the authors' rules, and faults.

What they share with `soap_precondition` is tested there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from tests.references import polar
from tests.references import preconditioners as reference
from tests.transforms import histories

TALL = (2, 8, 5)  # in float64
SMALL = (5, 4)  # in float32, refreshed every 3 updates
RULES = {
    "soap": (om.kl_soap_precondition, reference.kl_soap, (0.95, 0.95)),
    "shampoo": (om.kl_shampoo_precondition, reference.kl_shampoo, (0.9, 0.98)),
}
KL = om.KL()
every = pytest.mark.parametrize("name", RULES)

pytestmark = pytest.mark.slow


def transform(name, **settings):
    return RULES[name][0](**settings)


def expected(name, grads, first_bases, preconditioner=KL, **settings):
    """The reference on one matrix, with the bases that the transform began with.

    The basis of a null space is arbitrary.
    """
    _, rule, (momentum, b2) = RULES[name]
    given = {"momentum": momentum, "b2": b2, "eps": 1e-8, "refresh": 10} | settings
    given["b1"] = given.pop("momentum")
    if preconditioner.factor_b2 is not None:
        given["shampoo_b2"] = preconditioner.factor_b2
    return rule(
        grads,
        first_bases=first_bases,
        initial=preconditioner.initial,
        clamp=preconditioner.max_scale,
        **given,
    )


def stack(state, shape):
    """The state of the matrices of a shape."""
    return state.matrices["x".join(map(str, shape))].state


def first_bases(state, shape, i=0):
    """Those of matrix `i` of its stack after the first update."""
    own = stack(state, shape)
    return tuple(side.basis[0, i] for side in (own.left, own.right))


def assert_expected(name, got, state, grads, tolerance=1e-8, **settings):
    for key, leaf in grads.items():
        for i, (_, found, given) in enumerate(
            histories.pairs({key: got[key]}, {key: leaf})
        ):
            bases = first_bases(state, given.shape[1:], i)
            want = expected(name, given, bases, **settings)
            histories.close(found, want, tolerance, f"{key} {i}")


@every
def test_matches_float64_reference(name):
    grads = histories.gradients({"wide": histories.SHAPES["wide"]})
    got, state = histories.of(transform(name), grads)
    assert_expected(name, got, state, grads)
    np.testing.assert_array_equal(state.count, 1 + np.arange(histories.STEPS))


@pytest.mark.parametrize(
    "name, settings",
    [
        ("soap", {"refresh": 1}),
        ("soap", {"refresh": 3}),
        (
            "soap",
            {
                "momentum": 0.8,
                "b2": 0.9,
                "eps": 1e-2,
                "refresh": 3,
                "preconditioner": om.KL(factor_b2=0.7),
            },
        ),
        ("soap", {"refresh": 3, "preconditioner": om.KL(initial=2.0)}),
        ("shampoo", {"refresh": 1}),
        ("shampoo", {"refresh": 3}),
        (
            "shampoo",
            {
                "momentum": 0.0,
                "b2": 0.9,
                "eps": 0.3,
                "refresh": 3,
                "preconditioner": om.KL(initial=0.5),
            },
        ),
        ("shampoo", {"refresh": 3, "preconditioner": om.KL(factor_b2=0.7)}),
    ],
    ids=str,
)
def test_settings_against_the_reference(name, settings):
    grads = {"": histories.gradients(TALL)}
    got, state = histories.of(transform(name, **settings), grads)
    assert_expected(name, got, state, grads, **settings)


@pytest.mark.parametrize("max_scale", [3.0, 11.0, 4000.0])
def test_scales_are_bounded(max_scale):
    # The limits are 10, 11 and the side. Gradients of 1e-4 have far larger scales.
    grads = {"": 1e-4 * histories.gradients((12, 12), 20)}
    settings = {"b2": 0.5, "preconditioner": om.KL(max_scale=max_scale)}
    got, state = histories.of(transform("shampoo", **settings), grads)
    assert_expected("shampoo", got, state, grads, **settings)
    scale = stack(state, (12, 12)).left.scale
    assert scale.max() == {3.0: 10, 11.0: 11, 4000.0: 12}[max_scale]
    np.testing.assert_allclose(scale[0], 0.1**-0.5)


@pytest.mark.parametrize("rule", ["left", "right"])
def test_a_side_left_out_whitens_nothing(rule):
    grads = histories.gradients((5, 8))
    grads = grads if rule == "left" else np.swapaxes(grads, 1, 2)
    tx = om.kl_shampoo_precondition(refresh=3, preconditioner=om.KL(max_dim=5))
    got, state = histories.of(tx, grads)
    if rule == "right":
        got, grads = np.swapaxes(got, 1, 2), np.swapaxes(grads, 1, 2)
    ((_, own),) = state.matrices.values()
    kept = own.left if rule == "left" else own.right
    assert (own.left is None) != (own.right is None)
    # The identity, with eigenvalues of 1, for good.
    other = reference.Side(None, np.eye(8), np.ones(8))
    side = reference.kl_side(grads[0], 0.98, 0.1, kept.basis[0, 0])
    m, want = 0.0, [np.zeros((5, 8))]
    for s, g in enumerate(grads[1:], start=1):
        m = 0.9 * m + 0.1 * g
        k = side.h[:, None]
        want.append(side.q @ (side.q.T @ m * k / (1 + 1e-8 * k)))
        side = reference.kl_observed(side, other, g, 0.98, 4000)
        side = reference.kl_turned(side) if s % 3 == 0 else side
    histories.close(got, np.stack(want), 1e-8)


def test_each_block_is_a_matrix_by_itself():
    name = "soap"
    grads = histories.gradients((5, 8), 15)
    tx = transform(name, refresh=3, preconditioner=om.KL(block_size=5))
    got, state = histories.of(tx, grads)
    for block in histories.blocks((5, 8), 5):
        own = {"": got[block]}, state, {"": grads[block]}
        assert_expected(name, *own, refresh=3)
    assert set(state.matrices) == {"5x5", "5x3"}


def test_staggered_each_has_a_turn():
    grads = histories.gradients((2, 4, 3), 13)
    tx = om.kl_soap_precondition(refresh=3, preconditioner=om.KL(stagger=True))
    got, state = histories.of(tx, grads)
    changed = histories.changes(stack(state, (4, 3)).right.basis)
    turns = reference.turns([(4, 3)] * 2, 3)
    np.testing.assert_array_equal(histories.turns(changed, 3), turns)
    assert turns[0] != turns[1]
    for i in range(2):
        bases = first_bases(state, (4, 3), i)
        want = expected("soap", grads[:, i], bases, refresh=3, turn=turns[i])
        histories.close(got[:, i], want, 1e-8)


@every
def test_the_first_update_is_zero_and_its_gradient_gives_the_bases(name):
    grads = histories.gradients(TALL, 2)
    got, state = histories.of(transform(name, refresh=3, b2=0.8), grads)
    assert not got[0].any() and got[1].any()
    own = stack(state, (8, 5))
    assert not own.momentum[0].any()
    assert own.variance is None or not own.variance[0].any()
    for side, g in ((own.left, grads[0]), (own.right, np.swapaxes(grads[0], 1, 2))):
        statistic = 0.2 * g @ np.swapaxes(g, 1, 2) / g.shape[-1]
        found = histories.symmetric(side.statistic[0])
        np.testing.assert_allclose(found, statistic, atol=1e-14)
        q = side.basis[0]
        inside = np.swapaxes(q, 1, 2) @ statistic @ q
        values = np.linalg.eigvalsh(statistic)[:, ::-1, None]
        np.testing.assert_allclose(inside, values * np.eye(len(q[0])), atol=1e-13)
        np.testing.assert_allclose(side.scale[0], 0.1**-0.5, rtol=1e-14)


def test_the_variance_grows_between_refreshes_and_is_not_permuted():
    grads = histories.gradients((2, 5, 5), 12)
    _, state = histories.of(om.kl_soap_precondition(refresh=10), grads)
    own = stack(state, (5, 5))
    want = 0.0
    for s in range(1, 12):
        before = own.left.basis[s - 1], own.right.basis[s - 1]
        inside = np.swapaxes(before[0], 1, 2) @ grads[s] @ before[1]
        want = 0.95 * want + 0.05 * np.square(inside)
        np.testing.assert_allclose(own.variance[s], want, rtol=1e-10)
    assert (own.left.basis[9] == own.left.basis[0]).all()
    assert (own.left.basis[10] != own.left.basis[9]).any()


@every
def test_rotations_of_inputs_and_outputs_pass_through(name):
    rng = np.random.default_rng(1)
    q, p = polar.orthogonal(rng, 5), polar.orthogonal(rng, 5)
    grads = histories.gradients((2, 5, 5))
    tx = transform(name, refresh=10)
    want, _ = histories.of(tx, grads)
    got, _ = histories.of(tx, q @ grads @ p)
    histories.close(got, q @ want @ p, 1e-8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every
def test_float32_follows_float64_and_bfloat16_float32(name, dtype):
    grads = histories.gradients(SMALL)
    grads = np.asarray(jnp.asarray(grads, dtype), np.float64)
    got, state = histories.of(transform(name, refresh=3), grads, dtype)
    assert got.dtype == dtype
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(state)}
    assert kinds == {"float32", "int32", "bool"}
    want = expected(name, grads, first_bases(state, SMALL), refresh=3)
    # Updates of bfloat16 are rounded at the end only.
    bound = {"float32": 1e-3, "bfloat16": 2**-8}[dtype]
    histories.close(got.astype(np.float64), want, bound)


@pytest.mark.parametrize("kind", ["ill-conditioned", "rank one", "zero"])
@every
def test_degenerate_gradients_do_no_harm(name, kind):
    grads = histories.gradients(SMALL, 130)
    left, right = histories.gradients({"u": (5, 5), "v": (4, 4)}, 1).values()
    u, v = np.linalg.qr(left[0])[0][:, :4], np.linalg.qr(right[0])[0]
    spectrum = {"ill-conditioned": np.geomspace(1, 1e-6, 4), "rank one": [1, 0, 0, 0]}
    if kind == "zero":
        grads[:20] = 0
        grads[30:120] = 0
    else:
        grads[:, :] = grads[:, :1, :1] * ((u * np.asarray(spectrum[kind])) @ v.T)
        grads[120:] = histories.gradients(SMALL, 10)
    got, state = histories.of(transform(name, refresh=3), grads, "float32")
    assert np.isfinite(got).all()
    sizes = np.abs(got).max(axis=(1, 2))
    # Scales are at most 10 on either side, entries of a gradient 4.
    assert sizes.max() < 400
    assert sizes[120:].min() > 0.01
    if kind == "zero":
        assert not got[:20].any() and sizes[30:120].min() < sizes[30] / 3
    own = stack(state, (5, 4))
    for side in (own.left, own.right):
        assert not side.health.failures.any()
        q = side.basis[-1, 0]
        np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=3e-6)
        assert np.isfinite(side.scale).all()


def test_a_nan_that_is_skipped_leaves_no_trace():
    grads = histories.gradients(SMALL, 9)
    clean = np.delete(grads, 4, axis=0)
    grads[4, 2, 1] = np.nan
    tx = om.kl_shampoo_precondition(refresh=3)
    skipping = optax.apply_if_finite(tx, 3)
    got, state = histories.of(skipping, grads, "float32", jit=True)
    want, _ = histories.of(tx, clean, "float32")
    assert not got[4].any()
    # Another program: sums in another order.
    histories.close(np.delete(got, 4, axis=0), want, 1e-3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@every
def test_after_a_nan_the_last_good_basis_stays(name):
    grads = histories.gradients(TALL, 14)
    clean = grads.copy()
    grads[4, 1, 2, 3] = np.nan
    tx = transform(name, refresh=3, preconditioner=om.KL(max_failures=3))
    got, state = histories.of(tx, grads)
    want, fine = histories.of(tx, clean)
    # The other of the stack does not notice.
    np.testing.assert_array_equal(got[:, 0], want[:, 0])
    np.testing.assert_array_equal(got[:4], want[:4])
    bad, good = stack(state, (8, 5)), stack(fine, (8, 5))
    for side, same in ((bad.left, good.left), (bad.right, good.right)):
        # That of update 3. Others were due in 6, 9 and 12.
        for basis in side.basis[3:, 1]:
            np.testing.assert_array_equal(basis, same.basis[3, 1])
        failures = np.maximum(np.arange(14) // 3 - 1, 0)
        np.testing.assert_array_equal(side.health.failures[:, 1], failures)
        np.testing.assert_array_equal(side.health.stuck[:, 1], failures >= 3)
        assert not side.health.failures[:, 0].any()
    where = r"'matrices/8x5/state/left': \[1\], 'matrices/8x5/state/right': \[1\]"
    with pytest.raises(RuntimeError, match=where):
        om.diagnostics.check_refreshes(jax.tree.map(lambda x: x[-1], state))
    om.diagnostics.check_refreshes(jax.tree.map(lambda x: x[11], state))


@every
def test_dtypes_of_the_state(name):
    grads = histories.gradients(SMALL, 12)
    tx = transform(
        name,
        refresh=3,
        eps=1e-2,
        mu_dtype=jnp.bfloat16,
        preconditioner=om.KL(factor_dtype="bfloat16"),
    )
    got, state = histories.of(tx, grads, "float32")
    own = stack(state, (5, 4))
    assert got.dtype == np.float32 and own.momentum.dtype == "bfloat16"
    assert own.variance is None or own.variance.dtype == "bfloat16"
    for side in (own.left, own.right):
        assert side.statistic.dtype == side.basis.dtype == "bfloat16"
        assert side.scale.dtype == "float32"
    want, _ = histories.of(transform(name, refresh=3, eps=1e-2), grads, "float32")
    # Averages, and bases that power steps start from, of 8 bits.
    histories.close(got, want, 0.1)
    assert np.abs(got - want).max() > 1e-4


@every
def test_bytes_of_the_state(name):
    leaf = jax.ShapeDtypeStruct((5, 4), "float32")

    def bytes_of(mu_dtype=None, **settings):
        tx = transform(name, mu_dtype=mu_dtype, preconditioner=om.KL(**settings))
        return om.describe_state(tx, leaf).rows[0].state_bytes

    health, moments = 4 + 1, {"soap": 2, "shampoo": 1}[name]
    base = 4 + 4 * moments * 20  # the number of the matrix is an int32
    left, right = 4 * (25 + 15 + 5) + health, 4 * (16 + 10 + 4) + health
    assert bytes_of() == base + left + right
    assert bytes_of(max_dim=4) == base + right
    assert bytes_of(max_dim=3) == base
    half = "bfloat16"
    assert bytes_of(mu_dtype=half) == bytes_of() - 2 * moments * 20
    assert bytes_of(factor_dtype=half) == bytes_of() - 2 * (25 + 15 + 16 + 10)


BAD = [
    ({"momentum": 1.0}, ValueError, r"`momentum` must lie in \[0, 1\), got 1"),
    ({"momentum": None}, TypeError, "`momentum` must be a real number"),
    ({"b2": -0.1}, ValueError, "`b2` must lie"),
    ({"eps": 0.0}, ValueError, r"`eps` must lie in \(0, inf\)"),
    ({"refresh": 0}, ValueError, "`refresh` must be at least 1"),
    ({"refresh": 1.5}, TypeError, "`refresh` must be an int"),
    ({"preconditioner": om.SOAP()}, TypeError, "`preconditioner` must be a `KL`"),
    ({"mu_dtype": "int16"}, ValueError, "`mu_dtype` must be one of 'bfloat16'"),
]


@pytest.mark.parametrize("settings, error, message", BAD)
@every
def test_names_the_bad_argument(name, settings, error, message):
    with pytest.raises(error, match=message):
        transform(name, **settings)


def test_names_the_bad_setting():
    for name, bad in (("initial", 0), ("max_scale", -1.0), ("factor_b2", 1.0)):
        with pytest.raises(ValueError, match=f"`{name}` must lie in"):
            om.KL(**{name: bad})


@every
def test_names_the_bad_leaf(name):
    with pytest.raises(ValueError, match=r"'b'.*\(3,\)"):
        transform(name).init({"b": jnp.ones(3)})
