"""How one device goes through its matrices, and the rules that choose."""

import chex
import jax
import jax.numpy as jnp
import pytest

import optax_matrix as om
from benchmarks import hlo
from optax_matrix._placement import rules
from optax_matrix._placement.stacks import UNROLLED, over_matrices
from tests import problems

SHAPES = {"a": (8, 16), "b": (16, 8), "c": (5, 8, 16), "d": (20, 8, 16), "e": (4, 4)}


def trees(seed=0):
    return {k: problems.normal(s, seed + i) for i, (k, s) in enumerate(SHAPES.items())}


@pytest.mark.parametrize("stack_size", [2, 7, 1000])
def test_stacks_equal_the_loop(stack_size):
    tree = trees()

    def run(size):
        tx = om.orthogonalize(placement=om.Placement(stack_size=size))
        return jax.jit(tx.update)(tree, tx.init(tree))[0]

    chex.assert_trees_all_close(run(stack_size), run(1), atol=1e-5)


def test_empty_leaves_stay_as_they_are():
    tree = {"none": jnp.ones((0, 3, 4)), "flat": jnp.ones((4, 0)), "one": jnp.eye(3)}
    tx = om.orthogonalize("exact")
    got, _ = jax.jit(tx.update)(tree, tx.init(tree))
    chex.assert_trees_all_close(got, tree, atol=1e-6)
    assert len(om.describe_placement(tree, routing=lambda p, x: True).groups) == 1


def test_fn_sees_the_stacks_it_should():
    seen = []

    def fn(x):
        seen.append(x.shape)
        return 2 * x

    arrays = [jnp.ones((3, 2, 4)), jnp.ones((1, 2, 4)), jnp.ones((3, 2, 4))]
    for size, wanted in {
        1: {(2, 4)},
        4: {(4, 2, 4), (3, 2, 4)},
        7: {(7, 2, 4)},
        100: {(7, 2, 4)},
    }.items():
        seen.clear()
        done = over_matrices(fn, arrays, size)
        assert set(seen) == wanted
        chex.assert_trees_all_equal(done, [2 * x for x in arrays])


def test_a_long_loop_is_compiled_once_and_a_short_one_unrolled():
    tx = om.orthogonalize(om.NewtonSchulz(1, method="plain"))

    def dots(count):
        x = jnp.ones((count, 8, 16))
        text = jax.jit(tx.update).lower(x, tx.init(x)).compile().as_text() or ""
        return hlo.dot_flops(text) // count, text.count("known_trip_count")

    one = 2 * 2 * 8 * 8 * 16 + 2 * 8**3
    assert dots(UNROLLED) == (one, 0)
    assert dots(UNROLLED + 1) == (one, 1)


def test_on_cpu_matrices_are_looped_over_and_elsewhere_stacked(monkeypatch):
    assert rules.stack_size(64, 64) == 1
    for backend in ("gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda name=backend: name)
        assert rules.stack_size(1024, 4096) == 16
        assert rules.stack_size(2**14, 2**14) == 1
    assert rules.exchange_size(1024, 1024, 4) == 256
    assert rules.exchange_size(2**15, 2**15, 4) == 1


def even(parts):
    """FLOPs of a part, and bytes that grow with the number of parts."""
    return 8_000 // parts, 100 * (parts - 1)


@pytest.mark.parametrize(
    "count, devices, parts",
    [
        (16, 8, 1),  # they go round
        (39, 8, 1),  # 40 / 39 is even enough
        (1, 8, 8),
        (4, 8, 2),
        (12, 8, 2),
        (3, 8, 8),  # two of each on six devices would be 4 / 3
        (11, 8, 2),  # 12 / 11
        (5, 8, 8),
        (3, 6, 2),
        (3, 7, 7),
    ],
)
def test_parts_are_the_fewest_bytes_for_an_even_split(count, devices, parts):
    assert rules.parts(count, devices, even, 0.0) == parts


def test_whole_matrices_stay_whole_where_that_is_even_enough():
    def fewer_bytes(parts):
        return 8_000 // parts, 100 // parts

    assert rules.parts(39, 8, fewer_bytes, 0.0) == 1
    # Nor is there anything to share where nothing is multiplied.
    assert rules.parts(1, 8, lambda parts: (0, 100 // parts), 0.0) == 1
    assert rules.parts(1, 8, lambda parts: (0, 100 // parts), 1000.0) == 1


def test_parts_are_no_more_than_fit():
    # Three in eight parts each are three parts for a device, in four parts two.
    assert rules.parts(3, 8, even, 0.0, most=3) == 8
    assert rules.parts(3, 8, even, 0.0, most=2) == 2
    assert rules.parts(3, 8, even, 0.0, most=0) == 2


def test_parts_that_cannot_be_even_are_the_best_there_are():
    def repeated(parts):
        return 6_000 + 2_000 // parts, 100 * (parts - 1)

    assert rules.parts(1, 8, repeated, 0.0) == 8
    assert rules.parts(4, 8, repeated, 0.0) == 2
    # More parts than fit would be repeated more often on a device.
    assert rules.parts(5, 8, repeated, 0.0) == 1


@pytest.mark.parametrize(
    "flops_per_byte, parts", [(0, 8), (1, 8), (6, 4), (30, 2), (50, 1)]
)
def test_parts_are_fewer_the_dearer_a_byte(flops_per_byte, parts):
    # 8,000, 4,000, 2,000 and 1,000 FLOPs for 0, 100, 300 and 700 bytes.
    assert rules.parts(1, 8, even, flops_per_byte) == parts


def test_four_to_one_takes_little_more_than_half_the_plain_flops():
    # With the restarts that float32 needs on this backend: none.
    auto, plain = om.NewtonSchulz(), om.NewtonSchulz(method="plain")
    ratio = auto.flops(384, 1536) / plain.flops(384, 1536)
    assert ratio == pytest.approx(50 / 90)
    x = jnp.zeros((96, 384))
    counted = [
        jax.jit(method.polar).lower(x).compile().cost_analysis()["flops"]
        for method in (auto, plain)
    ]
    assert counted[0] <= 0.6 * counted[1]
    assert auto.flops(384, 384) == plain.flops(384, 384)
