"""soap_precondition: the authors' rule, when bases are refreshed, and faults."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from tests import problems
from tests.references import optimizers, polar
from tests.references import preconditioners as reference
from tests.transforms import histories

TALL = (2, 8, 5)  # in float64
SMALL = (5, 4)  # in float32, refreshed every 3 updates
SOAP = om.SOAP()


def expected(
    grads,
    first_bases,
    momentum=0.95,
    b2=0.95,
    eps=1e-8,
    refresh=10,
    preconditioner=SOAP,
    **settings,
):
    """The reference on one matrix, with the bases that the transform began with.

    The basis of a null space is arbitrary.
    """
    return reference.soap(
        grads,
        b1=momentum,
        b2=b2,
        shampoo_b2=preconditioner.factor_b2,
        eps=eps,
        refresh=refresh,
        first_bases=first_bases,
        **settings,
    )


def stack(state, shape):
    """The state of the matrices of a shape."""
    return state.matrices["x".join(map(str, shape))].state


def first_bases(state, shape, i=0):
    """Those of matrix `i` of its stack after the first update, None if left out."""
    own = stack(state, shape)
    sides = (own.left, own.right)
    return tuple(None if side is None else side.basis[0, i] for side in sides)


def assert_expected(got, state, grads, tolerance=1e-8, **settings):
    for name, leaf in grads.items():
        own = histories.pairs({name: got[name]}, {name: leaf})
        for i, (_, found, given) in enumerate(own):
            bases = first_bases(state, given.shape[1:], i)
            want = expected(given, bases, **settings)
            histories.close(found, want, tolerance, f"{name} {i}")


def test_matches_float64_reference():
    grads = histories.gradients(histories.SHAPES)
    got, state = histories.of(om.soap_precondition(), grads)
    assert_expected(got, state, grads)
    np.testing.assert_array_equal(state.count, 1 + np.arange(histories.STEPS))
    found = {k: one.state.variance.shape[1:] for k, one in state.matrices.items()}
    want = {"6x6": (1, 6, 6), "8x5": (1, 8, 5), "5x8": (1, 5, 8), "4x4": (2, 4, 4)}
    assert found == want
    for one in state.matrices.values():
        numbers = np.arange(one.numbers.shape[1])
        np.testing.assert_array_equal(one.numbers, [numbers] * histories.STEPS)


@pytest.mark.parametrize(
    "settings",
    [
        {"refresh": 1},
        {"refresh": 3},
        {
            "momentum": 0.8,
            "b2": 0.9,
            "eps": 1e-2,
            "refresh": 3,
            "preconditioner": om.SOAP(factor_b2=0.7),
        },
        {"momentum": 0.0, "b2": 0.999, "refresh": 3},
        {"refresh": 10, "preconditioner": om.SOAP(factor_b2=0.0)},
    ],
    ids=str,
)
def test_settings_against_the_reference(settings):
    grads = {"": histories.gradients(TALL)}
    if settings.get("preconditioner") == om.SOAP(factor_b2=0.0):
        # Square, so that the statistics of a single gradient have full rank.
        grads = {"": grads[""][..., :5, :]}
    got, state = histories.of(om.soap_precondition(**settings), grads)
    assert_expected(got, state, grads, **settings)


def test_a_longer_side_keeps_the_identity():
    grads = histories.gradients(
        {name: histories.SHAPES[name] for name in ("tall", "wide")}
    )
    tx = om.soap_precondition(refresh=3, preconditioner=om.SOAP(max_dim=5))
    got, state = histories.of(tx, grads)
    for name, left, right in (("tall", False, True), ("wide", True, False)):
        own = {name: got[name]}, state, {name: grads[name]}
        assert_expected(*own, refresh=3, left=left, right=right)
    assert stack(state, (8, 5)).left is stack(state, (5, 8)).right is None


def test_each_block_is_a_matrix_by_itself():
    grads = histories.gradients((9, 8))
    tx = om.soap_precondition(refresh=3, preconditioner=om.SOAP(block_size=5))
    got, state = histories.of(tx, grads)
    for block in histories.blocks((9, 8), 5):
        assert_expected({"": got[block]}, state, {"": grads[block]}, refresh=3)
    assert set(state.matrices) == {"5x5", "5x3", "4x5", "4x3"}


def test_staggered_each_has_a_turn():
    # Two of the three take the same one.
    count, refresh = 3, 2
    grads = histories.gradients((count, 4, 3), 13)
    settings = om.SOAP(stagger=True)
    tx = om.soap_precondition(refresh=refresh, preconditioner=settings)
    got, state = histories.of(tx, grads)
    changed = histories.changes(stack(state, (4, 3)).left.basis)
    turns = reference.turns([(4, 3)] * count, refresh)
    np.testing.assert_array_equal(histories.turns(changed, refresh), turns)
    assert np.bincount(turns).max() == -(-count // refresh)
    for i in range(count):
        bases = first_bases(state, (4, 3), i)
        want = expected(grads[:, i], bases, refresh=refresh, turn=turns[i])
        histories.close(got[:, i], want, 1e-8)


def test_the_first_update_is_zero_and_its_gradient_gives_the_bases():
    grads = histories.gradients(TALL, 2)
    got, state = histories.of(om.soap_precondition(refresh=3), grads)
    assert not got[0].any() and got[1].any()
    own = stack(state, (8, 5))
    assert not own.momentum[0].any() and not own.variance[0].any()
    for side, g in ((own.left, grads[0]), (own.right, np.swapaxes(grads[0], 1, 2))):
        statistic = 0.05 * g @ np.swapaxes(g, 1, 2)
        found = histories.symmetric(side.statistic[0])
        np.testing.assert_allclose(found, statistic, atol=1e-14)
        q = side.basis[0]
        inside = np.swapaxes(q, 1, 2) @ statistic @ q
        values = np.linalg.eigvalsh(statistic)[:, ::-1, None]
        want = values * np.eye(len(q[0]))
        np.testing.assert_allclose(inside, want, atol=1e-13)


def test_the_variance_grows_between_refreshes():
    # The same gradient over again: the basis stays, and V is a sum of equal terms.
    grads = np.stack([histories.gradients((2, 5, 5), 1)[0]] * 9)
    _, state = histories.of(om.soap_precondition(refresh=10), grads)
    own = stack(state, (5, 5))
    squares = np.square(
        np.swapaxes(own.left.basis[0], 1, 2) @ grads[0] @ own.right.basis[0]
    )
    for s in range(9):
        np.testing.assert_allclose(
            own.variance[s], (1 - 0.95**s) * squares, rtol=1e-8, atol=1e-20
        )
        assert (own.left.basis[s] == own.left.basis[0]).all()


def test_the_variance_is_permuted_with_the_columns():
    # The second singular pair of the first gradient takes over: columns change places.
    first, later = [5.0, 1.0, 0.5], [0.5, 5.0, 1.0]
    grads = np.stack([problems.with_spectrum((3, 3), s) for s in [first] + [later] * 8])
    grads = np.stack([grads] * 2, axis=1)
    got, state = histories.of(om.soap_precondition(refresh=3), grads)
    own = stack(state, (3, 3))
    sizes = np.diagonal(own.variance[:, 0], axis1=1, axis2=2)
    # The places of the values 0.5, 5 and 1 before the first refresh, s = 3, and after.
    np.testing.assert_array_equal(np.argsort(sizes[2]), [0, 2, 1])
    np.testing.assert_array_equal(np.argsort(sizes[-1])[-1], 0)
    # All other entries are rounding, 1e-16, beside `eps`.
    assert_expected({"": got}, state, {"": grads}, tolerance=1e-6, refresh=3)


def test_rotations_of_inputs_and_outputs_pass_through():
    rng = np.random.default_rng(1)
    q, p = polar.orthogonal(rng, 5), polar.orthogonal(rng, 5)
    grads = histories.gradients((2, 5, 5))
    tx = om.soap_precondition(refresh=10)
    want, _ = histories.of(tx, grads)
    got, _ = histories.of(tx, q @ grads @ p)
    histories.close(got, q @ want @ p, 1e-8)


def test_bases_stay_orthogonal_and_close_to_the_eigenvectors():
    grads = histories.gradients(SMALL, 200)
    grads = grads * np.array([4.0, 3, 2, 1])
    tx = om.soap_precondition(refresh=3, preconditioner=om.SOAP(factor_b2=0.99))
    _, state = histories.of(tx, grads, "float32")
    side = stack(state, (5, 4)).right
    q, statistic = side.basis[-1, 0], histories.symmetric(side.statistic[-1, 0])
    np.testing.assert_allclose(q.T @ q, np.eye(4), atol=3e-6)
    inside = q.T @ statistic @ q
    off_diagonal = inside - np.diag(np.diag(inside))
    assert np.abs(off_diagonal).max() < 0.1 * np.diag(inside).min()
    assert (np.diff(np.diag(inside)) < 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_follows_float64_and_bfloat16_float32(dtype):
    grads = histories.gradients(SMALL)
    grads = np.asarray(jnp.asarray(grads, dtype), np.float64)
    got, state = histories.of(om.soap_precondition(refresh=3), grads, dtype)
    assert got.dtype == dtype
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(state)}
    assert kinds == {"float32", "int32", "bool"}
    want = expected(grads, first_bases(state, SMALL), refresh=3)
    # Updates of bfloat16 are rounded at the end only.
    bound = {"float32": 1e-3, "bfloat16": 2**-8}[dtype]
    histories.close(got.astype(np.float64), want, bound)


def test_ill_conditioned_statistics():
    # A condition number of 1e12, in the same directions throughout.
    size = np.random.default_rng(1).uniform(0.5, 2, (12, 1, 1))
    grads = size * problems.with_spectrum(SMALL, np.geomspace(1, 1e-6, 4))
    tx = om.soap_precondition(refresh=3)
    got, state = histories.of(tx, grads)
    # The smallest eigenvalue is known to 1e-4, and so is how far its vector turns.
    assert_expected({"": got}, state, {"": grads}, tolerance=1e-2, refresh=3)
    got, state = histories.of(tx, grads, "float32")
    assert np.isfinite(got).all()
    # Of 20 entries that are 1 at most while the basis stays, and turn with it.
    assert np.linalg.norm(got, axis=(1, 2)).max() < 2 * 20**0.5
    q = stack(state, (5, 4)).left.basis[-1, 0]
    np.testing.assert_allclose(q.T @ q, np.eye(5), atol=3e-6)


def test_gradients_of_rank_one_take_adams_step_along_it():
    left, right = np.full(5, 5**-0.5), np.array([0.5, -0.5, 0.5, 0.5])
    size = np.random.default_rng(1).standard_normal(12)
    grads = size[:, None, None] * np.outer(left, right)
    # In float32 all other entries are rounding, 1e-8, which `eps` must be above.
    tx = om.soap_precondition(refresh=3, eps=1e-4)
    got, _ = histories.of(tx, grads, "float32")
    want = optimizers.adam_directions(size[1:], 0.95, 0.95, 1e-4)
    histories.close(got[1:], want[:, None, None] * np.outer(left, right), 5e-3)


def test_zero_gradients_do_no_harm():
    grads = histories.gradients(SMALL, 230)
    grads[:100] = 0
    grads[110:210] = 0
    got, state = histories.of(om.soap_precondition(refresh=3), grads, "float32")
    assert np.isfinite(got).all()
    assert not got[:100].any()
    sizes = np.abs(got).max(axis=(1, 2))
    # Momentum and the root of the variance fade out alike, but for `eps`.
    assert sizes[100:110].min() > 0.1 and sizes[210:].min() > 0.1
    assert sizes[209] < sizes[110]
    own = stack(state, (5, 4))
    for side in (own.left, own.right):
        assert not side.health.failures.any()
        q = side.basis[-1, 0]
        np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=3e-6)


def test_a_nan_that_is_skipped_leaves_no_trace():
    grads = histories.gradients(SMALL, 9)
    clean = np.delete(grads, 4, axis=0)
    grads[4, 2, 1] = np.nan
    tx = om.soap_precondition(refresh=3)
    skipping = optax.apply_if_finite(tx, 3)
    got, state = histories.of(skipping, grads, "float32", jit=True)
    want, _ = histories.of(tx, clean, "float32")
    assert not got[4].any()
    # Another program: sums in another order.
    histories.close(np.delete(got, 4, axis=0), want, 1e-3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("when", [0, 4])
def test_after_a_nan_the_last_good_basis_stays(when):
    grads = histories.gradients(TALL, 14)
    clean = grads.copy()
    grads[when, 1, 2, 3] = np.nan
    tx = om.soap_precondition(refresh=3, preconditioner=om.SOAP(max_failures=3))
    got, state = histories.of(tx, grads)
    want, fine = histories.of(tx, clean)
    # The other of the stack does not notice.
    np.testing.assert_array_equal(got[:, 0], want[:, 0])
    np.testing.assert_array_equal(got[:when], want[:when])
    assert not np.isfinite(got[when, 1]).all()
    bad, good = stack(state, (8, 5)), stack(fine, (8, 5))
    for side, same in ((bad.left, good.left), (bad.right, good.right)):
        # That of update 3, or none at all. Others were due in 6, 9 and 12.
        kept = same.basis[3, 1] if when else np.eye(side.basis.shape[-1])
        first = 3 if when else 0
        for basis in side.basis[first:, 1]:
            np.testing.assert_array_equal(basis, kept)
        failures = np.arange(14) // 3 - 1 if when else np.arange(14) // 3 + 1
        failures = np.maximum(failures, 0)
        np.testing.assert_array_equal(side.health.failures[:, 1], failures)
        np.testing.assert_array_equal(side.health.stuck[:, 1], failures >= 3)
        assert not side.health.failures[:, 0].any()
    last = jax.tree.map(lambda x: x[-1], state)
    where = r"'matrices/8x5/state/left': \[1\], 'matrices/8x5/state/right': \[1\]"
    with pytest.raises(RuntimeError, match=where):
        om.diagnostics.check_refreshes(last)
    om.diagnostics.check_refreshes(jax.tree.map(lambda x: x[5], state))


@pytest.mark.parametrize(
    "mu_dtype, factor, bound",
    [("bfloat16", None, 0.05), (jnp.bfloat16, "bfloat16", 0.1)],
)
def test_dtypes_of_the_state(mu_dtype, factor, bound):
    grads = histories.gradients(SMALL, 12)
    settings = {"refresh": 3, "eps": 1e-2}
    tx = om.soap_precondition(
        **settings, mu_dtype=mu_dtype, preconditioner=om.SOAP(factor_dtype=factor)
    )
    got, state = histories.of(tx, grads, "float32")
    own = stack(state, (5, 4))
    assert got.dtype == np.float32
    assert own.momentum.dtype == own.variance.dtype == "bfloat16"
    for side in (own.left, own.right):
        assert side.statistic.dtype == side.basis.dtype == (factor or "float32")
    want, _ = histories.of(om.soap_precondition(**settings), grads, "float32")
    # Averages, and bases that power steps start from, of 8 bits.
    histories.close(got, want, bound)
    assert np.abs(got - want).max() > 1e-4


def test_bytes_of_the_state():
    leaf = jax.ShapeDtypeStruct((5, 4), "float32")

    def bytes_of(mu_dtype=None, **settings):
        settings = om.SOAP(**settings)
        tx = om.soap_precondition(mu_dtype=mu_dtype, preconditioner=settings)
        return om.describe_state(tx, leaf).rows[0].state_bytes

    number, health = 4, 4 + 1  # int32 per matrix; int32 and bool per side
    assert bytes_of() == 4 * (2 * 20 + 25 + 15 + 16 + 10) + number + 2 * health
    assert bytes_of(max_dim=4) == 4 * (2 * 20 + 16 + 10) + number + health
    assert bytes_of(max_dim=3) == 4 * 2 * 20 + number
    half = "bfloat16"
    assert bytes_of(mu_dtype=half) == bytes_of() - 2 * 2 * 20
    assert bytes_of(factor_dtype=half) == bytes_of() - 2 * (25 + 15 + 16 + 10)
    two = om.describe_state(om.soap_precondition(), {"a": leaf, "b": leaf})
    assert [row.state_bytes for row in two.rows] == [bytes_of()] * 2
    assert two.joint_bytes == 0


BAD = [
    ({"momentum": 1.0}, ValueError, r"`momentum` must lie in \[0, 1\), got 1"),
    ({"momentum": None}, TypeError, "`momentum` must be a real number"),
    ({"b2": None}, TypeError, "`b2` must be a real number"),
    ({"b2": -0.1}, ValueError, "`b2` must lie"),
    ({"eps": 0.0}, ValueError, r"`eps` must lie in \(0, inf\)"),
    ({"eps": float("nan")}, ValueError, "`eps` must lie"),
    ({"refresh": 0}, ValueError, "`refresh` must be at least 1"),
    ({"refresh": 1.5}, TypeError, "`refresh` must be an int"),
    ({"refresh": jnp.array(0)}, ValueError, "`refresh` must be at least 1"),
    ({"refresh": jnp.array(2.0)}, TypeError, "`refresh` must be an int"),
    ({"preconditioner": om.Shampoo()}, TypeError, r"`preconditioner` must be a `SOAP`"),
    ({"preconditioner": {}}, TypeError, r"`preconditioner` must be a `SOAP`"),
    ({"mu_dtype": "int16"}, ValueError, "`mu_dtype` must be one of 'bfloat16'"),
]


@pytest.mark.parametrize("settings, error, message", BAD)
def test_names_the_bad_argument(settings, error, message):
    with pytest.raises(error, match=message):
        om.soap_precondition(**settings)


def test_names_the_bad_setting():
    with pytest.raises(ValueError, match="`factor_b2` must lie"):
        om.SOAP(factor_b2=1)


def test_names_the_bad_leaf():
    tx = om.soap_precondition()
    with pytest.raises(ValueError, match=r"'b'.*\(3,\)"):
        tx.init({"b": jnp.ones(3)})
    state = tx.init({"a": jnp.ones((3, 4))})
    with pytest.raises(ValueError, match=r"stacks with {'3x4': 1} rows.*{'4x4': 1}"):
        tx.update({"a": jnp.ones((4, 4))}, state)
