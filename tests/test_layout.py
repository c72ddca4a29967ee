"""_layout: stacks, sums and their inverses against NumPy, matching, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks import hlo
from optax_matrix import _paths
from optax_matrix._layout import (
    FittedLayout,
    MatrixLayout,
    blocked,
    tree_map,
    view,
)
from tests import flax_models as models

MuonDimensionNumbers = optax.contrib.MuonDimensionNumbers


def arange(shape):
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)


# Each case: shape, layout, and every matrix of `x` cut out by hand, in order.
# Sizes differ, so that a swapped axis cannot pass.
CASES = {
    "default": ((3, 5), None, lambda x: [[x]]),
    "transposed": ((3, 5), MatrixLayout(-1, -2), lambda x: [[x.T]]),
    "one batch axis": ((2, 3, 5), None, lambda x: [[x[0], x[1]]]),
    "two batch axes": (
        (2, 3, 4, 5),
        None,
        lambda x: [[x[i, j] for i in range(2) for j in range(3)]],
    ),
    "batch in the middle": (
        (4, 2, 5),
        MatrixLayout(0, 2),
        lambda x: [[x[:, 0], x[:, 1]]],
    ),
    "batch last": ((4, 5, 2), MatrixLayout(0, 1), lambda x: [[x[..., 0], x[..., 1]]]),
    "convolution": (
        (3, 2, 4, 5),
        MatrixLayout((0, 1, 2), 3),
        lambda x: [[x.reshape(24, 5)]],
    ),
    "heads flattened": (
        (7, 2, 3),
        MatrixLayout(-3, (-2, -1)),
        lambda x: [[x.reshape(7, 6)]],
    ),
    "axes in the order given": (
        (7, 2, 3),
        MatrixLayout(0, (2, 1)),
        lambda x: [[x.transpose(0, 2, 1).reshape(7, 6)]],
    ),
    "muon numbers": (
        (2, 4, 5),
        MuonDimensionNumbers(2, (0, 1)),
        lambda x: [[x.reshape(8, 5).T]],
    ),
    "muon lists": (
        (2, 4, 5),
        MuonDimensionNumbers([0], [2]),
        lambda x: [[x[:, i] for i in range(4)]],
    ),
    "fused qkv": (
        (4, 6),
        MatrixLayout(split_outputs=3),
        lambda x: [[x[:, :2], x[:, 2:4], x[:, 4:]]],
    ),
    "out projection per head": (
        (6, 4),
        MatrixLayout(split_inputs=2),
        lambda x: [[x[:3], x[3:]]],
    ),
    "grouped query": (
        (3, 8),
        MatrixLayout(split_outputs=(4, 2, 2)),
        lambda x: [[x[:, :4]], [x[:, 4:6], x[:, 6:]]],
    ),
    "equal widths spelled out": (
        (3, 4),
        MatrixLayout(split_outputs=(2, 2)),
        lambda x: [[x[:, :2], x[:, 2:]]],
    ),
    "both sides, with batch": (
        (2, 4, 6),
        MatrixLayout(split_inputs=2, split_outputs=3),
        lambda x: [
            [
                x[b, i : i + 2, j : j + 2]
                for b in range(2)
                for i in (0, 2)
                for j in (0, 2, 4)
            ]
        ],
    ),
    "unequal on both sides": (
        (2, 5, 4),
        MatrixLayout(split_inputs=(3, 2), split_outputs=(3, 1)),
        lambda x: [
            [x[b, :3, :3] for b in range(2)],
            [x[b, :3, 3:] for b in range(2)],
            [x[b, 3:, :3] for b in range(2)],
            [x[b, 3:, 3:] for b in range(2)],
        ],
    ),
    "unequal, transposed, batch in the middle": (
        (8, 2, 3),
        MatrixLayout(2, 0, split_outputs=(2, 4, 2)),
        lambda x: [
            [m for b in range(2) for m in (x[:2, b].T, x[6:, b].T)],
            [x[2:6, b].T for b in range(2)],
        ],
    ),
    "split in one": ((3, 4), MatrixLayout(split_outputs=1), lambda x: [[x]]),
    "one by n": ((1, 7), None, lambda x: [[x]]),
}
cases = pytest.mark.parametrize("name", CASES)


@cases
def test_stacks_are_the_matrices_cut_by_hand(name):
    shape, spec, by_hand = CASES[name]
    x = arange(shape)
    want = [np.stack(stack) for stack in by_hand(np.asarray(x))]
    fitted = view(shape, spec)
    got = fitted.to_stacks(x)
    assert len(got) == len(want)
    for stack, reference in zip(got, want, strict=True):
        np.testing.assert_array_equal(stack, reference)
    assert fitted.matrices == tuple(stack.shape for stack in want)
    assert fitted.count == sum(len(stack) for stack in want)


@cases
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_from_stacks_inverts_to_stacks(name, dtype):
    shape, spec, _ = CASES[name]
    x = arange(shape).astype(dtype)
    fitted = view(shape, spec)
    got = jax.jit(lambda x: fitted.from_stacks(fitted.to_stacks(x)))(x)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got, x)


@cases
@pytest.mark.parametrize("inputs", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("outputs", [True, False])
def test_sum_expand_and_size_agree_with_the_matrices(name, inputs, outputs):
    shape, spec, by_hand = CASES[name]
    x = arange(shape)
    axes = tuple(axis for axis, on in ((0, inputs), (1, outputs)) if on)
    fitted = view(shape, spec)
    total = fitted.sum(x, inputs, outputs)
    assert total.ndim == x.ndim
    # Each entry of the leaf meets the sum, and the size, of its own matrix.
    sums = jnp.broadcast_to(fitted.expand(total), shape)
    sizes = jnp.broadcast_to(fitted.expand(fitted.size(inputs, outputs)), shape)
    means = fitted.expand(total / fitted.size(inputs, outputs)) * jnp.ones(shape)
    stacks = zip(
        by_hand(np.asarray(x)),
        fitted.to_stacks(sums),
        fitted.to_stacks(sizes),
        fitted.to_stacks(means),
        strict=True,
    )
    for matrices, got, got_size, got_mean in stacks:
        for k, matrix in enumerate(matrices):
            want = np.broadcast_to(matrix.sum(axes, keepdims=True), matrix.shape)
            size = np.prod([matrix.shape[axis] for axis in axes])
            np.testing.assert_array_equal(got[k], want)
            np.testing.assert_array_equal(got_size[k], size)
            # One division, rounded once.
            np.testing.assert_allclose(got_mean[k], want / size, rtol=1e-6)


@cases
def test_max_is_that_of_each_matrix(name):
    shape, spec, by_hand = CASES[name]
    x = arange(shape)
    fitted = view(shape, spec)
    largest = jnp.broadcast_to(fitted.expand(fitted.max(x)), shape)
    for matrices, got in zip(
        by_hand(np.asarray(x)), fitted.to_stacks(largest), strict=True
    ):
        for k, matrix in enumerate(matrices):
            np.testing.assert_array_equal(got[k], matrix.max())
    assert view((0, 3)).max(jnp.ones((0, 3))).item() == 0


def test_blocks_are_cut_from_the_front_and_the_last_one_is_smaller():
    fitted = view((5, 10), MatrixLayout(split_outputs=(7, 3)))
    cut = blocked(fitted, 3)
    assert cut.input_widths == (3, 2)
    assert cut.output_widths == (3, 3, 1, 3)
    assert blocked(fitted, 10) == fitted


def test_a_sum_of_a_split_side_has_one_entry_per_block():
    x = arange((2, 5, 8))
    fitted = view(x.shape, MatrixLayout(split_outputs=(4, 2, 2)))
    total = fitted.sum(x)
    want = [x[..., :4].sum((1, 2)), x[..., 4:6].sum((1, 2)), x[..., 6:].sum((1, 2))]
    np.testing.assert_array_equal(total[:, 0], np.stack(want, -1))
    assert total.shape == (2, 1, 3)
    assert fitted.sum(x, outputs=False).shape == (2, 1, 8)
    assert fitted.sum(x, inputs=False).shape == (2, 5, 3)


def test_a_sum_of_a_split_side_gathers_no_other_axis():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    fitted = view((16, 24), MatrixLayout(split_outputs=(16, 4, 4)))
    with jax.set_mesh(mesh):
        for spec, count in ((P("x", None), 0), (P(None, "x"), 1)):
            x = jax.device_put(jnp.ones((16, 24)), spec)
            text = jax.jit(fitted.sum).lower(x).compile().as_text() or ""
            kinds = [found.kind for found in hlo.collectives(text)]
            assert kinds.count("all-gather") == count


def test_a_sum_without_splits_reshapes_nothing():
    fitted = view((4, 2, 3), MatrixLayout(0, (1, 2)))
    jaxpr = jax.make_jaxpr(fitted.sum)(jnp.ones((4, 2, 3)))
    names = {equation.primitive.name for equation in jaxpr.eqns}
    assert "reshape" not in names and "transpose" not in names


def test_fans():
    plain = view((7, 3, 5), None)
    assert (plain.fan_in(), plain.fan_out()) == (3.0, 5.0)
    conv = view((3, 2, 4, 5), MatrixLayout((0, 1, 2), 3))
    assert (conv.fan_in(), conv.fan_out()) == (24.0, 5.0)
    per_head = view((8, 6), MatrixLayout(split_outputs=3))
    assert (per_head.fan_in(), per_head.fan_out()) == (8.0, 2.0)
    unequal = view((2, 4, 8), MatrixLayout(split_outputs=(6, 2)))
    assert unequal.fan_in() == 4.0
    assert jnp.asarray(unequal.fan_out()).dtype == jnp.float32
    np.testing.assert_array_equal(unequal.fan_out(), [[[6.0, 2.0]]])
    both = view((4, 8), MatrixLayout(split_inputs=(1, 3), split_outputs=(6, 2)))
    np.testing.assert_array_equal(both.size(), [[6.0, 2.0], [18.0, 6.0]])
    scale = jnp.sqrt(jnp.maximum(1.0, unequal.fan_out() / unequal.fan_in()))
    scaled = jnp.ones((2, 4, 8)) * unequal.expand(scale)
    # One square root, rounded once.
    np.testing.assert_allclose(scaled[..., :6], np.sqrt(1.5), rtol=1e-6)
    np.testing.assert_array_equal(scaled[..., 6:], 1.0)


def test_apply_maps_every_matrix_and_comes_back():
    x, y = arange((2, 3, 8)), arange((2, 3, 8)) + 1.0
    fitted = view(x.shape, MatrixLayout(split_outputs=(2, 4, 2)))

    def divided_by_norm(a, b):
        assert a.ndim == 3
        return a * b / jnp.linalg.norm(a, axis=(1, 2), keepdims=True)

    got = fitted.apply(divided_by_norm, x, y)
    for start, stop in ((0, 2), (2, 6), (6, 8)):
        block = np.asarray(x)[..., start:stop]
        norm = np.linalg.norm(block, axis=(1, 2), keepdims=True)
        want = block * np.asarray(y)[..., start:stop] / norm
        # A float32 norm of 12 entries against NumPy's.
        np.testing.assert_allclose(got[..., start:stop], want, rtol=1e-6)


def test_a_shape_without_entries_survives():
    fitted = view((0, 3, 4), MatrixLayout(split_outputs=(1, 3)))
    assert fitted.matrices == ((0, 3, 1), (0, 3, 3))
    x = jnp.zeros((0, 3, 4))
    assert fitted.from_stacks(fitted.to_stacks(x)).shape == x.shape


def test_views_are_of_one_shape():
    with pytest.raises(ValueError, match=r"of shape \(3, 4\), got \(4, 3\)"):
        view((3, 4)).to_stacks(jnp.ones((4, 3)))
    with pytest.raises(ValueError, match=r"Expected stacks \(\(1, 3, 4\),\), got"):
        view((3, 4)).from_stacks([jnp.ones((1, 4, 3))])
    with pytest.raises(ValueError, match=r"Blocks \(2, 2\) do not fit axis 1"):
        view((3, 4), MatrixLayout(split_outputs=2)).sum(jnp.ones((3, 6)))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"inputs": ()}, ValueError, r"`inputs` must name at least one axis"),
        ({"outputs": (1, 1)}, ValueError, r"`outputs` must name .* none twice"),
        ({"inputs": 0.5}, TypeError, r"`inputs` must hold integers, got 0.5"),
        ({"inputs": True}, TypeError, r"`inputs` must hold integers, got True"),
        ({"inputs": "ab"}, TypeError, r"`inputs` must hold integers, got 'ab'"),
        ({"split_inputs": 0}, ValueError, r"`split_inputs` must be a number .* got 0"),
        ({"split_outputs": (2, -1)}, ValueError, r"`split_outputs` .* at least 1"),
        ({"split_outputs": ()}, ValueError, r"`split_outputs` must be a number"),
        (
            {"outputs": (-2, -1), "inputs": -3, "split_outputs": 2},
            ValueError,
            r"`split_outputs` cuts a single axis, but `outputs` names \(-2, -1\)",
        ),
    ],
)
def test_a_layout_checks_itself(arguments, error, message):
    with pytest.raises(error, match=message):
        MatrixLayout(**arguments)


def test_a_layout_is_a_hashable_leaf():
    layout = MatrixLayout(inputs=[0, 1], outputs=2)  # pyright: ignore[reportArgumentType]
    assert layout == MatrixLayout((0, 1), 2) and hash(layout)
    assert jax.tree.leaves({"a": layout}) == [layout]


@pytest.mark.parametrize(
    "shape, spec, message",
    [
        ((7,), None, r"at least 2 axes, got one at 'a/b', shape \(7,\)\. Route it"),
        ((3, 4), MatrixLayout(2, 1), r"`inputs` names axis 2, .* 'a/b', shape \(3, 4"),
        ((3, 4), MatrixLayout(0, -3), r"`outputs` names axis -3, which does not exist"),
        ((3, 4), MatrixLayout(0, -2), r"an axis twice at 'a/b', .* inputs \(0,\)"),
        ((3, 4), MatrixLayout((0, -2), 1), r"an axis twice at 'a/b'"),
        ((3, 4), MatrixLayout(split_outputs=3), r"does not divide the 4 .* at 'a/b'"),
        (
            (3, 4),
            MatrixLayout(split_inputs=(1, 1)),
            r"`split_inputs=\(1, 1\)` adds up to 2, but the axis has 3 .* sum to 3",
        ),
    ],
)
def test_errors_name_the_leaf(shape, spec, message):
    with pytest.raises(ValueError, match=message):
        view(shape, spec, "a/b")
    with pytest.raises(ValueError, match=message):
        tree_map(lambda *_: None, {"a": spec}, {"a": {"b": jnp.ones(shape)}})


# --- trees ---


def shapes(layout, tree):
    return tree_map(lambda v, _: v.matrices, layout, tree)


def test_a_layout_for_all_leaves():
    tree = {"a": jnp.ones((2, 3)), "b": [jnp.ones((4, 2, 3)), None]}
    got = shapes(None, tree)
    assert got == {"a": ((1, 2, 3),), "b": [((4, 2, 3),), None]}
    got = shapes(MuonDimensionNumbers(1, 0), {"a": jnp.ones((2, 3))})
    assert got == {"a": ((1, 3, 2),)}


def test_a_tree_a_prefix_or_a_function():
    tree = {"a": jnp.ones((2, 3)), "b": {"c": jnp.ones((2, 3)), "d": jnp.ones((4, 5))}}
    flipped = MatrixLayout(-1, -2)
    want = {"a": ((1, 2, 3),), "b": {"c": ((1, 3, 2),), "d": ((1, 5, 4),)}}
    assert shapes({"a": None, "b": flipped}, tree) == want
    assert shapes({"a": None, "b": {"c": flipped, "d": flipped}}, tree) == want
    assert shapes(lambda t: {"a": MatrixLayout(), "b": flipped}, tree) == want
    numbers = MuonDimensionNumbers(1, 0)
    assert shapes({"a": None, "b": {"c": numbers, "d": flipped}}, tree) == want


def test_rest_trees_may_hold_subtrees_at_the_leaves():
    tree = {"a": jnp.ones((2, 3)), "b": None, "c": optax.MaskedNode()}
    state = {"a": (jnp.zeros(2), jnp.zeros(3)), "b": None, "c": optax.MaskedNode()}
    got = tree_map(lambda v, x, s: x + s[0][:, None] + s[1][None], None, tree, state)
    np.testing.assert_array_equal(got["a"], jnp.ones((2, 3)))
    assert got["b"] is None and got["c"] == optax.MaskedNode()


@pytest.mark.parametrize("hole", [None, optax.MaskedNode(), {}])
@pytest.mark.parametrize(
    "entry", [None, optax.MaskedNode(), MatrixLayout(), {"deep": MatrixLayout()}]
)
def test_empty_nodes_pass_whatever_the_layout_says(hole, entry):
    tree = {"a": hole, "b": jnp.ones((2, 3))}
    assert shapes({"a": entry, "b": None}, tree) == {"a": hole, "b": ((1, 2, 3),)}


def test_a_wholly_empty_tree_passes():
    for tree in (None, {}, optax.MaskedNode()):
        assert shapes({"a": MatrixLayout()}, tree) == tree


def test_shapes_alone_suffice():
    tree = {"a": jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)}
    assert shapes(None, tree) == {"a": ((2, 3, 4),)}
    got = jax.eval_shape(lambda t: tree_map(lambda v, x: v.sum(x), None, t), tree)
    assert got["a"].shape == (2, 1, 1)


@pytest.mark.parametrize("dtype", ["complex64", "int32", "bool"])
def test_leaves_that_are_not_real_floating_raise_with_their_path(dtype):
    good, bad = jnp.ones((2, 3)), jnp.ones((2, 3), dtype)
    fitted = FittedLayout({"a": view((2, 3)), "b/c": view((2, 3))})
    for layout in (None, {"a": None, "b": None}, fitted):
        with pytest.raises(TypeError, match=f"got dtype {dtype} at 'b/c'"):
            tree_map(lambda *_: None, layout, {"a": good, "b": {"c": bad}})


def test_boxes_are_kept_or_left_out():
    boxed = nnx.State({"a": nnx.Param(jnp.ones((2, 3)))})
    kept = tree_map(lambda v, x: 2 * x, None, boxed)
    assert jax.tree.structure(kept) == jax.tree.structure(boxed)
    bare = tree_map(lambda v, x: v.sum(x), None, boxed, keep_boxes=False)
    assert isinstance(bare["a"], jax.Array) and bare["a"].shape == (1, 1)


def test_boxed_and_bare_trees_take_the_same_layouts():
    model = nnx.List([nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))])
    boxed = nnx.state(model, nnx.Param)
    bare = models.as_pure(boxed)
    flipped = MatrixLayout(-1, -2)
    trees = [
        jax.tree.map(lambda _: flipped, boxed),
        jax.tree.map(lambda _: flipped, bare),
        {0: {"kernel": flipped}},
        [{"kernel": flipped}],
    ]
    assert jax.tree.structure(boxed) != jax.tree.structure(bare)
    for layout in trees:
        for tree in (boxed, bare):
            got = tree_map(lambda v, x: v.apply(lambda s: 2.0 * s, x), layout, tree)
            assert jax.tree.structure(got) == jax.tree.structure(tree)
            doubled = jax.tree.leaves(got)[0]
            np.testing.assert_array_equal(doubled, 2.0 * jax.tree.leaves(tree)[0])
            (view_,) = jax.tree.leaves(tree_map(lambda v, _: [v], layout, bare))
            assert view_.matrices == ((1, 3, 2),)


def test_path_names_drop_the_box_alone():
    model = nnx.Dict(value=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    boxed = nnx.state(model, nnx.Param)
    for tree in (boxed, models.as_pure(boxed)):
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        names = [_paths.path_name(path) for path, _ in flat]
        assert names == ["value/bias", "value/kernel"]
    flat, _ = jax.tree_util.tree_flatten_with_path({"value": [1, {"value": 2}]})
    assert [_paths.path_name(p) for p, _ in flat] == ["value/0", "value/1/value"]


@pytest.mark.parametrize(
    "layout, error, message",
    [
        ({"a": None}, ValueError, r"`layout` has no entry for 'b/c'"),
        (
            {"a": None, "b": None, "x": MatrixLayout()},
            ValueError,
            r"an entry where the tree has no leaf, at 'x'",
        ),
        (
            {"a": {"deeper": MatrixLayout()}, "b": None},
            ValueError,
            r"no entry for 'a' and an entry where .* at 'a/deeper'",
        ),
        ({"a": "matrix", "b": None}, TypeError, r"got 'matrix'\. It is .* at 'a'"),
        ({"a": 1, "b": None}, TypeError, r"must be a `MatrixLayout`.* at 'a'"),
        (
            {"a": optax.MaskedNode(), "b": None},
            ValueError,
            r"masked at 'a', .*\(2, 3\)",
        ),
    ],
)
def test_a_layout_tree_that_does_not_fit_raises(layout, error, message):
    tree = {"a": jnp.ones((2, 3)), "b": {"c": jnp.ones((2, 3))}}
    with pytest.raises(error, match=message):
        shapes(layout, tree)


def test_an_error_lists_ten_leaves_and_counts_the_rest():
    tree = {f"k{i:02}": jnp.ones((2, 2)) for i in range(13)}
    with pytest.raises(ValueError, match=r"'k09' and 3 more\. It must"):
        shapes({}, tree)
