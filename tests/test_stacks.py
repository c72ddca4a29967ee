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


@pytest.mark.parametrize(
    "count, devices, shape, parts",
    [
        (1, 8, (64, 64), 8),
        (3, 8, (64, 256), 2),
        (4, 8, (64, 256), 2),
        (5, 8, (64, 256), 1),  # two parts of each would be ten
        (7, 64, (64, 256), 8),
        (3, 6, (64, 64), 2),
        (3, 7, (64, 64), 1),  # nothing divides 7
    ],
)
def test_parts_fit_the_devices_and_save_work(count, devices, shape, parts):
    flops = om.NewtonSchulz().flops
    got = rules.parts(count, devices, shape, flops)
    assert got == parts
    assert devices % got == 0 and got * count <= devices


def test_parts_that_save_next_to_nothing_are_not_made():
    small = 1_000_000

    def mostly_small(m, n, parts):
        return small + m * m * n // parts

    assert rules.parts(4, 8, (8, 8), mostly_small) == 1


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
