"""shampoo_precondition: the published rule, when roots are refreshed, and faults."""

import dataclasses
import re

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
SMALL = (5, 4)  # in float32
SHAMPOO = om.Shampoo()
ROOTS = pytest.mark.parametrize("root", ["eigh", "newton"])


def expected(
    grads,
    momentum=0.9,
    b2=0.95,
    damping=1e-6,
    refresh=10,
    preconditioner=SHAMPOO,
    **settings,
):
    """The reference on one matrix; None as the transform takes it."""
    return reference.shampoo(
        grads,
        b1=0 if momentum is None else momentum,
        b2=1 if b2 is None else b2,
        damping=damping,
        refresh=refresh,
        exponents=preconditioner.exponents,
        **settings,
    )


def stack(state, shape):
    """The state of the matrices of a shape."""
    return state.matrices["x".join(map(str, shape))].state


def assert_expected(got, grads, tolerance=1e-9, **settings):
    for name, found, given in histories.pairs(got, grads):
        histories.close(found, expected(given, **settings), tolerance, name)


def test_matches_float64_reference():
    grads = histories.gradients(histories.SHAPES | {"column": (3, 1)})
    got, state = histories.of(om.shampoo_precondition(), grads)
    assert_expected(got, grads)
    np.testing.assert_array_equal(state.count, 1 + np.arange(histories.STEPS))
    found = {k: one.state.momentum.shape[1:] for k, one in state.matrices.items()}
    want = {"6x6": (1, 6, 6), "8x5": (1, 8, 5), "5x8": (1, 5, 8), "4x4": (2, 4, 4)}
    assert found == want | {"3x1": (1, 3, 1)}


@pytest.mark.parametrize(
    "settings",
    [
        {"refresh": 1},
        {"refresh": 3},
        {"momentum": None, "refresh": 3},
        {"momentum": None, "b2": None, "refresh": 1},
        {"momentum": 0.5, "b2": 0.999, "damping": 1e-2, "refresh": 3},
        {"b2": None, "preconditioner": om.Shampoo(exponents=(-0.5, None))},
        {
            "start": 4,
            "refresh": 3,
            "preconditioner": om.Shampoo(exponents=(-0.5, -0.2)),
        },
    ],
    ids=str,
)
def test_settings_against_the_reference(settings):
    grads = {"": histories.gradients(TALL)}
    got, _ = histories.of(om.shampoo_precondition(**settings), grads)
    assert_expected(got, grads, **settings)


@pytest.mark.parametrize("exponents", [(-0.25, -0.5), (None, -1 / 3)])
def test_newton_matches_the_reference(exponents):
    newton = om.Shampoo(exponents=exponents, root="newton")
    settings = {"refresh": 3, "damping": 1e-4, "preconditioner": newton}
    # Power iteration finds the largest eigenvalue exactly if there is a gap below it.
    grads = 3 + histories.gradients((8, 5))
    got, state = histories.of(om.shampoo_precondition(**settings), grads)
    histories.close(got, expected(grads, **settings), 1e-8)
    for health in om.diagnostics.refreshes(state).values():
        assert not health.failures.any()


def test_before_the_start_it_is_the_momentum():
    grads = histories.gradients(TALL, 6)
    tx = om.shampoo_precondition(0.8, start=4, refresh=3)
    got, state = histories.of(tx, grads)
    momentum = optimizers.momenta(grads[:, 0], 0.8, nesterov=False, debias=True)
    np.testing.assert_allclose(got[:4, 0], momentum[:4], rtol=1e-12)
    assert np.abs(got[4, 0] - momentum[4]).max() > 0.1
    roots = histories.symmetric(stack(state, (8, 5)).left.root[:, 0])
    np.testing.assert_array_equal(roots[:4], np.stack([np.eye(8)] * 4))


def test_a_longer_side_is_left_out():
    grads = histories.gradients(
        {name: histories.SHAPES[name] for name in ("tall", "square")}
    )
    tx = om.shampoo_precondition(refresh=3, preconditioner=om.Shampoo(max_dim=5))
    got, state = histories.of(tx, grads)
    right = om.Shampoo(exponents=(None, -0.25))
    want = expected(grads["tall"], refresh=3, preconditioner=right)
    histories.close(got["tall"], want, 1e-9)
    momentum = optimizers.momenta(grads["square"], 0.9, nesterov=False, debias=True)
    histories.close(got["square"], momentum, 1e-9)
    tall, square = stack(state, (8, 5)), stack(state, (6, 6))
    assert tall.left is square.left is square.right is None
    assert tall.right.root.shape[1:] == (1, 5, 3)


def test_each_block_is_a_matrix_by_itself():
    grads = histories.gradients({"": (9, 8)})
    tx = om.shampoo_precondition(refresh=3, preconditioner=om.Shampoo(block_size=5))
    got, state = histories.of(tx, grads)
    for name, found, given in histories.pairs(got, grads):
        for block in histories.blocks(given.shape[1:], 5):
            want = expected(given[block], refresh=3)
            histories.close(found[block], want, 1e-9, f"{name} {block}")
    assert set(state.matrices) == {"5x5", "5x3", "4x5", "4x3"}


def test_layouts_say_what_is_a_matrix():
    grads = histories.gradients((5, 2, 7), 12)
    layout = om.MatrixLayout(inputs=-1, outputs=0)
    got, state = histories.of(om.shampoo_precondition(refresh=3, layout=layout), grads)
    for i in range(2):
        want = expected(np.swapaxes(grads[:, :, i], 1, 2), refresh=3)
        histories.close(np.swapaxes(got[:, :, i], 1, 2), want, 1e-9)
    assert stack(state, (7, 5)).left.root.shape[1:] == (2, 7, 4)


@pytest.mark.parametrize("count, stack_size", [(5, 2), (18, None)])
def test_many_matrices_are_each_by_itself(count, stack_size):
    # Two at a time, and in a compiled loop.
    grads = histories.gradients((count, 3, 4), 6)
    tx = om.shampoo_precondition(
        refresh=2, placement=om.Placement(stack_size=stack_size)
    )
    got, _ = histories.of(tx, grads)
    for i in range(count):
        histories.close(got[:, i], expected(grads[:, i], refresh=2), 1e-9)


def test_staggered_each_has_a_turn():
    # No matrix takes the second of the three.
    count, refresh, start = 2, 3, 2
    grads = histories.gradients((count, 4, 3), 15)
    tx = om.shampoo_precondition(
        refresh=refresh, start=start, preconditioner=om.Shampoo(stagger=True)
    )
    got, state = histories.of(tx, grads)
    changed = histories.changes(stack(state, (4, 3)).left.root)
    assert changed[start - 1].all() and not changed[: start - 1].any()
    turns = reference.turns([(4, 3)] * count, refresh)
    np.testing.assert_array_equal(histories.turns(changed[start:], refresh), turns)
    np.testing.assert_array_equal(turns, [0, 2])
    for i in range(count):
        want = expected(grads[:, i], refresh=refresh, turn=turns[i], start=start)
        histories.close(got[:, i], want, 1e-9)


def test_staggered_work_is_spread_over_all_shapes():
    grads = histories.gradients({"a": (6, 6), "b": (5, 4, 4)}, 6)
    tx = om.shampoo_precondition(refresh=2, preconditioner=om.Shampoo(stagger=True))
    _, state = histories.of(tx, grads)
    # In cubes of sides: 432 for the first, and 128 for each of the others.
    loads = np.zeros(2)
    for shape, cost in (((6, 6), 432), ((4, 4), 128)):
        changed = histories.changes(stack(state, shape).left.root)
        np.add.at(loads, histories.turns(changed, 2), cost)
    assert sorted(loads) == [4 * 128, 432 + 128]


@pytest.mark.parametrize(
    "settings, sides, max_dim",
    [
        pytest.param({}, (True, True), None, marks=pytest.mark.slow),
        pytest.param(
            {"exponents": (None, -0.5)}, (False, True), None, marks=pytest.mark.slow
        ),
        pytest.param({"max_dim": 5}, (True, True), 5, marks=pytest.mark.slow),
        ({"block_size": 4}, (True, True), None),
    ],
    ids=str,
)
def test_turns_are_those_of_the_reference(settings, sides, max_dim):
    # Shapes take turns in the tree, but stand together in the line.
    leaves = {"a": (3, 6), "b": (2, 5, 2), "c": (3, 6), "d": (6, 3), "e": (5, 2)}
    shapes = [(3, 6), (5, 2), (5, 2), (3, 6), (6, 3), (5, 2)]
    if "block_size" in settings:
        blocks = [[(3, 4), (3, 2)], [(4, 2), (1, 2)], [(4, 3), (2, 3)]]
        cut = dict(zip([(3, 6), (5, 2), (6, 3)], blocks, strict=True))
        # Those of one shape in a leaf come first, then those of the next.
        shapes = [*cut[3, 6], *[(4, 2)] * 2, *[(1, 2)] * 2, *cut[3, 6], *cut[6, 3]]
        shapes += cut[5, 2]
    refresh = 5
    tx = om.shampoo_precondition(
        0.0, refresh=refresh, preconditioner=om.Shampoo(stagger=True, **settings)
    )
    _, state = histories.of(tx, histories.gradients(leaves, 2 * refresh + 1))
    turns = reference.turns(shapes, refresh, sides, max_dim)
    assert len(set(turns)) > 2
    for shape in set(shapes):
        own = [turn for one, turn in zip(shapes, turns, strict=True) if one == shape]
        right = stack(state, shape).right
        if right is None:  # longer than `max_dim`
            right = stack(state, shape).left
        found = histories.turns(histories.changes(right.root), refresh)
        np.testing.assert_array_equal(found, own, str(shape))


def test_one_gradient_gives_the_polar_factor():
    grads = histories.gradients(TALL, 1)
    tx = om.shampoo_precondition(None, 0.0, damping=0.0, refresh=3)
    got, _ = histories.of(tx, grads)
    exact, _ = histories.of(om.orthogonalize_exact(), grads)
    # A null space is 1e-16 of the rest; its root 1e4 of the others'.
    np.testing.assert_allclose(got, exact, atol=1e-11)


def test_it_is_a_root_of_the_kronecker_product():
    grads = histories.gradients(TALL, 6)
    tx = om.shampoo_precondition(None, None, damping=0.0, refresh=1)
    got, state = histories.of(tx, grads)
    own, g = stack(state, (8, 5)), grads[-1, 0]
    left, right = (
        histories.symmetric(side.statistic[-1, 0]) for side in (own.left, own.right)
    )
    full = reference.full_kronecker_root(left, right, -0.25)
    histories.close(got[-1, 0], (full @ g.reshape(-1)).reshape(8, 5), 1e-10)
    want = reference.kronecker_shampoo(g, left, right, -0.25, 0.0)
    histories.close(got[-1, 0], want, 1e-10)


def test_rotations_of_inputs_and_outputs_pass_through():
    rng = np.random.default_rng(1)
    q, p = polar.orthogonal(rng, 8), polar.orthogonal(rng, 5)
    grads = histories.gradients(TALL)
    tx = om.shampoo_precondition(refresh=3)
    want, _ = histories.of(tx, grads)
    got, _ = histories.of(tx, q @ grads @ p)
    histories.close(got, q @ want @ p, 1e-8)


@ROOTS
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_with_both_fourth_roots_scale_does_not_matter(root, scale):
    grads = histories.gradients(SMALL, 5)
    settings = om.Shampoo(root=root)
    tx = om.shampoo_precondition(refresh=3, damping=1e-4, preconditioner=settings)
    got, _ = histories.of(tx, scale * grads, "float32")
    want, _ = histories.of(tx, grads, "float32")
    # Squares round otherwise; a singular side has a condition number of 1e4.
    histories.close(got, want, 1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_follows_float64_and_bfloat16_float32(dtype):
    grads = histories.gradients(SMALL, 12)
    grads = np.asarray(jnp.asarray(grads, dtype), np.float64)
    tx = om.shampoo_precondition(refresh=3, damping=1e-4)
    got, state = histories.of(tx, grads, dtype)
    assert got.dtype == dtype
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(state)}
    assert kinds == {"float32", "int32", "bool"}
    want = expected(grads, refresh=3, damping=1e-4)
    # Updates of bfloat16 are rounded at the end only.
    bound = {"float32": 1e-3, "bfloat16": 2**-8}[dtype]
    histories.close(got.astype(np.float64), want, bound)


@ROOTS
@pytest.mark.parametrize("spectrum", [np.geomspace(1, 1e-6, 4), [1.0, 0, 0, 0]])
def test_ill_conditioned_statistics_in_float32(root, spectrum):
    # Condition numbers of 1e12 and of infinity, in the same directions throughout.
    size = np.random.default_rng(1).uniform(0.5, 2, (12, 1, 1))
    grads = size * problems.with_spectrum(SMALL, spectrum)
    tx = om.shampoo_precondition(refresh=3, preconditioner=om.Shampoo(root=root))
    got, state = histories.of(tx, grads, "float32")
    # Rounding of 2⁻²⁴ beside a damping of 1e-6, on either side.
    histories.close(got, expected(grads, refresh=3), 0.1)
    for health in om.diagnostics.refreshes(state).values():
        assert not health.failures.any()


@ROOTS
def test_zero_gradients_do_no_harm(root):
    grads = histories.gradients(SMALL, 130)
    grads[:10] = 0
    grads[20:120] = 0
    tx = om.shampoo_precondition(refresh=3, preconditioner=om.Shampoo(root=root))
    got, state = histories.of(tx, grads, "float32")
    assert np.isfinite(got).all()
    assert not got[:10].any()
    # From the next refresh on all is well; the momentum fades out, and comes back.
    sizes = np.abs(got).max(axis=(1, 2))
    assert sizes[119] < 1e-3 and sizes[12:20].min() > 0.1 and sizes[120:].min() > 0.1
    for health in om.diagnostics.refreshes(state).values():
        assert not health.failures.any()


def test_a_nan_that_is_skipped_leaves_no_trace():
    grads = histories.gradients(SMALL, 9)
    clean = np.delete(grads, 4, axis=0)
    grads[4, 2, 1] = np.nan
    tx = om.shampoo_precondition(refresh=3)
    skipping = optax.apply_if_finite(tx, 3)
    got, state = histories.of(skipping, grads, "float32", jit=True)
    want, _ = histories.of(tx, clean, "float32")
    assert not got[4].any()
    # Another program: sums in another order.
    histories.close(np.delete(got, 4, axis=0), want, 1e-4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_after_a_nan_the_last_good_root_stays():
    grads = histories.gradients(TALL, 14)
    clean = grads.copy()
    grads[4, 1, 2, 3] = np.nan
    settings = om.Shampoo(max_failures=3)
    tx = om.shampoo_precondition(None, refresh=3, preconditioner=settings)
    got, state = histories.of(tx, grads)
    want, fine = histories.of(tx, clean)
    # The other of the stack does not notice.
    np.testing.assert_array_equal(got[:, 0], want[:, 0])
    np.testing.assert_array_equal(got[:4], want[:4])
    assert not np.isfinite(got[4, 1]).all()
    bad, good = stack(state, (8, 5)), stack(fine, (8, 5))
    for side, same in ((bad.left, good.left), (bad.right, good.right)):
        # That of update 3. Others were due in 6, 9 and 12.
        last = np.stack([same.root[3, 1]] * 11)
        np.testing.assert_array_equal(side.root[3:, 1], last)
        failures = [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
        np.testing.assert_array_equal(side.health.failures[:, 1], failures)
        np.testing.assert_array_equal(side.health.stuck[:, 1], np.arange(14) >= 12)
        assert (
            not side.health.failures[:, 0].any() and not side.health.stuck[:, 0].any()
        )
    # With good gradients and no momentum, updates are good again.
    left, right = (
        histories.symmetric(side.root[-1, 1]) for side in (bad.left, bad.right)
    )
    histories.close(got[5:, 1], left @ grads[5:, 1] @ right, 1e-12)


def test_failures_are_reported_and_stuck_stays():
    grads = histories.gradients(TALL, 10)
    grads[1, 1, 0, 0] = np.nan
    settings = om.Shampoo(max_failures=2)
    tx = om.shampoo_precondition(None, refresh=3, preconditioner=settings)
    names = ["inner/matrices/8x5/state/left", "inner/matrices/8x5/state/right"]
    _, history = histories.of(tx, grads)
    for i, failures in enumerate([0, 0, 0, 1, 1, 1, 2, 2, 2, 3]):
        state = {"inner": jax.tree.map(lambda x, i=i: x[i], history), "other": i}
        health = om.diagnostics.refreshes(state)
        assert list(health) == names
        for side in health.values():
            np.testing.assert_array_equal(side.failures, [0, failures])
            np.testing.assert_array_equal(side.stuck, [False, failures >= 2])
        if failures < 2:
            om.diagnostics.check_refreshes(state)
            continue
        where = f"{{'{names[0]}': [1], '{names[1]}': [1]}}"
        with pytest.raises(RuntimeError, match=re.escape(where)):
            om.diagnostics.check_refreshes(state)
    # Once all is well again, it still says what has been.
    well = jax.tree.map(lambda x: np.nan_to_num(x[-1]), history)
    with jax.enable_x64(True):
        well = well._replace(count=jnp.asarray(12, "int32"))
        _, well = tx.update(jnp.asarray(grads[0]), well)
        well = jax.tree.map(np.asarray, {"inner": well})
    health = om.diagnostics.refreshes(well)[names[0]]
    np.testing.assert_array_equal(health.failures, [0, 0])
    np.testing.assert_array_equal(health.stuck, [False, True])
    with pytest.raises(RuntimeError, match=names[0]):
        om.diagnostics.check_refreshes(well)
    assert om.diagnostics.refreshes(optax.EmptyState()) == {}


@ROOTS
def test_a_residual_above_the_bound_makes_a_root_bad(root):
    grads = histories.gradients(SMALL, 8)
    settings = om.Shampoo(root=root, residual_bound=1e-30)
    tx = om.shampoo_precondition(0.0, refresh=3, preconditioner=settings)
    got, state = histories.of(tx, grads, "float32")
    # None was ever good: both are the identity.
    np.testing.assert_allclose(got, grads, rtol=1e-6)
    own = stack(state, (5, 4))
    for side in (own.left, own.right):
        np.testing.assert_array_equal(
            side.health.failures[:, 0], [1, 1, 1, 2, 2, 2, 3, 3]
        )


@pytest.mark.parametrize(
    "mu_dtype, factor, bound",
    [("bfloat16", None, 0.01), (jnp.bfloat16, "bfloat16", 0.1)],
)
def test_dtypes_of_the_state(mu_dtype, factor, bound):
    grads = histories.gradients(SMALL, 12)
    tx = om.shampoo_precondition(
        refresh=3, mu_dtype=mu_dtype, preconditioner=om.Shampoo(factor_dtype=factor)
    )
    got, state = histories.of(tx, grads, "float32")
    own = stack(state, (5, 4))
    assert got.dtype == np.float32 and own.momentum.dtype == "bfloat16"
    for side in (own.left, own.right):
        assert side.statistic.dtype == side.root.dtype == (factor or "float32")
    want, _ = histories.of(om.shampoo_precondition(refresh=3), grads, "float32")
    # Numbers of 8 bits, whose rounding a condition number of 100 ** 0.25 amplifies.
    histories.close(got, want, bound)
    assert np.abs(got - want).max() > 1e-4


def test_bytes_of_the_state():
    leaf = jax.ShapeDtypeStruct((5, 4), "float32")

    def bytes_of(momentum=0.9, mu_dtype=None, **settings):
        settings = om.Shampoo(**settings)
        tx = om.shampoo_precondition(
            momentum, mu_dtype=mu_dtype, preconditioner=settings
        )
        return om.describe_state(tx, leaf).rows[0].state_bytes

    number, health = 4, 4 + 1  # int32 per matrix; int32 and bool per side
    assert bytes_of() == 4 * (20 + 2 * 15 + 2 * 10) + number + 2 * health
    assert bytes_of(None) == 4 * (2 * 15 + 2 * 10) + number + 2 * health
    assert bytes_of(exponents=(None, -0.5)) == 4 * (20 + 2 * 10) + number + health
    assert bytes_of(max_dim=4) == 4 * (20 + 2 * 10) + number + health
    half = "bfloat16"
    assert bytes_of(mu_dtype=half) == bytes_of() - 2 * 20
    assert bytes_of(factor_dtype=half) == bytes_of() - 2 * (2 * 15 + 2 * 10)


BAD = [
    ({"momentum": 1.0}, ValueError, r"`momentum` must lie in \[0, 1\), got 1"),
    ({"momentum": -0.1}, ValueError, "`momentum` must lie"),
    ({"b2": 1.0}, ValueError, "`b2` must lie"),
    ({"b2": float("nan")}, ValueError, "`b2` must lie"),
    ({"damping": -1e-9}, ValueError, r"`damping` must lie in \[0, inf\)"),
    ({"start": -1}, ValueError, "`start` must be at least 0"),
    ({"start": 1.0}, TypeError, "`start` must be an int"),
    ({"refresh": 0}, ValueError, "`refresh` must be at least 1"),
    ({"refresh": jnp.array(0)}, ValueError, "`refresh` must be at least 1"),
    ({"preconditioner": om.SOAP()}, TypeError, "`preconditioner` must be a `Shampoo`"),
    ({"mu_dtype": "int16"}, ValueError, "`mu_dtype` must be one of 'bfloat16'"),
]


@pytest.mark.parametrize("settings, error, message", BAD)
def test_names_the_bad_argument(settings, error, message):
    with pytest.raises(error, match=message):
        om.shampoo_precondition(**settings)


BAD_SETTINGS = [
    ({"root": "svd"}, ValueError, "`root` must be one of 'eigh', 'newton'"),
    ({"exponents": -0.25}, ValueError, "`exponents` must be a pair"),
    ({"exponents": (-0.25,)}, ValueError, "`exponents` must be a pair"),
    ({"exponents": (None, None)}, ValueError, "`exponents` must not leave out both"),
    ({"exponents": (-0.5, 0.25)}, ValueError, "`exponents` must be negative"),
    ({"exponents": (0, -0.25)}, ValueError, "`exponents` must be negative"),
    ({"exponents": (float("nan"), None)}, ValueError, "`exponents` must be negative"),
    ({"exponents": (-float("inf"), None)}, ValueError, "`exponents` must be negative"),
    ({"exponents": ("a", None)}, TypeError, "`exponents` must be Python numbers"),
    ({"exponents": (True, None)}, TypeError, "`exponents` must be Python numbers"),
    (
        {"exponents": (-0.4, None), "root": "newton"},
        ValueError,
        "`exponents` must be -1/p with a whole p for root='newton'",
    ),
    ({"exponents": (-2, None), "root": "newton"}, ValueError, "`exponents` must be -1"),
    (
        {"exponents": (-1e9, None), "root": "newton"},
        ValueError,
        "`exponents` must be -1",
    ),
    ({"residual_bound": 0.0}, ValueError, r"`residual_bound` must lie in \(0, inf\)"),
    ({"stagger": "no"}, TypeError, "`stagger` must be True or False"),
    ({"block_size": 0}, ValueError, "`block_size` must be at least 1"),
    ({"block_size": 2.5}, TypeError, "`block_size` must be an int"),
    ({"block_size": True}, TypeError, "`block_size` must be an int"),
    ({"max_dim": 0}, ValueError, "`max_dim` must be at least 1"),
    ({"max_dim": None}, TypeError, "`max_dim` must be an int"),
    ({"max_failures": 0}, ValueError, "`max_failures` must be at least 1"),
    ({"factor_dtype": "float16"}, ValueError, "`factor_dtype` must be one of"),
    ({"factor_dtype": "nonsense"}, ValueError, "`factor_dtype` must be one of"),
    ({"precision": "best"}, ValueError, "`precision` must be one of 'default'"),
]


@pytest.mark.parametrize("settings, error, message", BAD_SETTINGS)
def test_names_the_bad_setting(settings, error, message):
    with pytest.raises(error, match=message):
        om.Shampoo(**settings)


def test_settings_are_values():
    settings = om.Shampoo(exponents=[-0.5, None], factor_dtype=jnp.bfloat16)
    assert settings == om.Shampoo(exponents=(-0.5, None), factor_dtype="bfloat16")
    assert hash(settings) == hash(dataclasses.replace(settings))
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.stagger = True


def test_names_the_bad_leaf():
    tx = om.shampoo_precondition()
    with pytest.raises(ValueError, match=r"'b'.*\(3,\)"):
        tx.init({"b": jnp.ones(3)})
    state = tx.init({"a": jnp.ones((3, 4))})
    with pytest.raises(ValueError, match=r"stacks with {'3x4': 1} rows.*{'4x4': 1}"):
        tx.update({"a": jnp.ones((4, 4))}, state)
