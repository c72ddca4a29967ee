"""How one device works on its matrices, and how the backend changes that."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_matrix as om
from benchmarks import hlo
from optax_matrix._placement import map_stack, map_stacks, stack_size
from optax_matrix._placement.stacks import UNROLLED
from tests import problems

SHAPES = {"a": (8, 16), "b": (16, 8), "c": (5, 8, 16), "d": (20, 8, 16), "e": (4, 4)}


def trees(seed=0):
    return {k: problems.normal(s, seed + i) for i, (k, s) in enumerate(SHAPES.items())}


@pytest.mark.parametrize("size", [2, 7, 1000])
def test_stacks_equal_the_loop(size):
    tree = trees()

    def run(size):
        tx = om.orthogonalize(placement=om.Placement(stack_size=size))
        return jax.jit(tx.update)(tree, tx.init(tree))[0]

    chex.assert_trees_all_close(run(size), run(1), atol=1e-5)


def test_empty_leaves_stay_as_they_are():
    tree = {"none": jnp.ones((0, 3, 4)), "flat": jnp.ones((4, 0)), "one": jnp.eye(3)}
    tx = om.orthogonalize("exact")
    got, _ = jax.jit(tx.update)(tree, tx.init(tree))
    chex.assert_trees_all_close(got, tree, atol=1e-6)
    cost = om.describe_placement(tree, backend="cpu", routing=lambda p, x: True)
    assert [group.shape for group in cost.groups] == [(3, 3)]


def test_fn_sees_the_stacks_it_should():
    seen = []

    def fn(x):
        seen.append(x.shape)
        return 2 * x

    arrays = [jnp.ones((3, 2, 4)), jnp.ones((1, 2, 4)), jnp.ones((3, 2, 4))]
    for size, wanted in {
        1: [(2, 4)],  # traced once for all matrices
        4: [(4, 2, 4), (3, 2, 4)],
        7: [(7, 2, 4)],
        100: [(7, 2, 4)],
    }.items():
        seen.clear()
        done = map_stacks(fn, arrays, size)
        assert seen == wanted
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


@pytest.mark.parametrize("count", [1, UNROLLED, UNROLLED + 1])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_trees_of_every_matrix_are_mapped_in_stacks(count, size):
    x = problems.normal((count, 2, 3))
    scales, traced = {"by": jnp.arange(count, dtype=jnp.float32)}, []

    def fn(matrix, scale):
        traced.append(matrix)
        assert matrix.shape == (2, 3) and scale["by"].shape == ()
        return {"scaled": matrix * scale["by"], "norm": jnp.linalg.norm(matrix)}

    got = jax.jit(lambda *trees: map_stack(fn, trees, size))(x, scales)
    # Once, and again for the rest that does not fill a stack.
    assert len(traced) <= 2
    want = np.asarray(x) * np.arange(count)[:, None, None]
    np.testing.assert_allclose(got["scaled"], want, rtol=1e-6)
    norms = np.linalg.norm(np.asarray(x), axis=(1, 2))
    np.testing.assert_allclose(got["norm"], norms, rtol=1e-6)


def test_on_cpu_matrices_are_looped_over_and_elsewhere_stacked(monkeypatch):
    assert stack_size(64, 64) == stack_size(64, 64, backend="cpu") == 1
    for backend in ("gpu", "tpu"):
        assert stack_size(1024, 4096, backend=backend) == 16
        assert stack_size(2**14, 2**14, backend=backend) == 1
        monkeypatch.setattr(jax, "default_backend", lambda name=backend: name)
        assert stack_size(1024, 4096) == 16
        assert stack_size(1024, 4096, backend="cpu") == 1


# Of a 384 x 1536 matrix by Newton-Schulz in five steps, in products of 384 x 384
# matrices, of which a long one is worth 4. On a GPU and a TPU products of float32 are
# rounded (TF32, bfloat16), so the Gram form starts afresh after two and after four
# steps: three times the two long products, and three products less per restart.
ONE_BLOCK = 2 * 4 + 5 + 3 * 4
THREE_BLOCKS = 3 * 2 * 4 + 5 + 3 * 2


@pytest.mark.parametrize(
    "precision, backend, products",
    [
        (None, "cpu", ONE_BLOCK),
        (None, "gpu", THREE_BLOCKS),
        (None, "tpu", THREE_BLOCKS),
        ("highest", "cpu", ONE_BLOCK),
        ("highest", "gpu", ONE_BLOCK),
        ("highest", "tpu", ONE_BLOCK),
    ],
)
def test_costs_are_those_of_the_backend_that_is_named(precision, backend, products):
    params = {"kernel": jax.ShapeDtypeStruct((384, 1536), "float32")}
    method = om.NewtonSchulz(precision=precision)
    cost = om.describe_placement(params, method, backend=backend, routing="matrix")
    assert cost.totals["flops"] == products * 2 * 384**3


def test_the_backend_must_be_named():
    params = {"kernel": jax.ShapeDtypeStruct((4, 8), "float32")}
    with pytest.raises(TypeError, match="'backend'"):
        om.describe_placement(params)  # pyright: ignore[reportCallIssue]
    with pytest.raises(
        ValueError, match="`backend` must be one of 'cpu', 'gpu', 'tpu'"
    ):
        om.describe_placement(params, backend="cuda")


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
