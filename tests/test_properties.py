"""Random layouts, trees and shardings against slow oracles: 11,300 cases.

Slow. The cases are the same in every run; `HYPOTHESIS_SEED` in the environment, any
number, draws others.
"""

import itertools
import math
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_matrix as om
from optax_matrix import _placement
from optax_matrix._layout import view
from optax_matrix._placement.groups import make_plan

pytestmark = pytest.mark.slow
SEED = os.environ.get("HYPOTHESIS_SEED")


def cases(count):
    """Runs a test on so many random cases."""

    def decorate(test):
        test = settings(
            max_examples=count,
            deadline=None,
            derandomize=SEED is None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(test)
        return test if SEED is None else seed(int(SEED))(test)

    return decorate


# ------------------------------------------------------------------------ layouts


@st.composite
def splits(draw, size):
    """None, a number of equal blocks, or widths."""
    kind = draw(st.integers(0, 2))
    if kind == 0 or size == 0:
        return None
    if kind == 1:
        return draw(st.sampled_from([k for k in range(1, size + 1) if size % k == 0]))
    cuts = draw(st.sets(st.integers(1, size - 1), max_size=3)) if size > 1 else set()
    edges = [0, *sorted(cuts), size]
    return tuple(b - a for a, b in itertools.pairwise(edges))


@st.composite
def layouts(draw, min_size=1, max_size=5):
    """A shape and a layout that fits it."""
    shape = draw(st.lists(st.integers(min_size, max_size), min_size=2, max_size=5))
    axes = draw(st.permutations(range(len(shape))))
    inputs = draw(st.integers(1, len(axes) - 1))
    outputs = draw(st.integers(1, len(axes) - inputs))
    sides, cuts = [], []
    for side in (axes[:inputs], axes[inputs : inputs + outputs]):
        size = shape[side[0]]
        cuts.append(draw(splits(size)) if len(side) == 1 else None)
        named = [axis - len(shape) * draw(st.integers(0, 1)) for axis in side]
        single = len(named) == 1 and draw(st.booleans())
        sides.append(named[0] if single else tuple(named))
    return tuple(shape), om.MatrixLayout(*sides, *cuts)


def indices(shape, axes):
    """Every index of some axes, the first one slowest, in the order given."""
    return list(itertools.product(*(range(shape[axis]) for axis in axes)))


def widths(split, size):
    if split is None:
        return [size]
    return [size // split] * split if isinstance(split, int) else list(split)


def matrices(x, layout):
    """Every matrix, entry by entry: by batch, then input block, then output block."""
    shape = x.shape
    sides = []
    for side, split in (
        (layout.inputs, layout.split_inputs),
        (layout.outputs, layout.split_outputs),
    ):
        side = [a % x.ndim for a in (side if isinstance(side, tuple) else (side,))]
        every = indices(shape, side)
        edges = [0, *itertools.accumulate(widths(split, len(every)))]
        sides.append((side, [every[a:b] for a, b in itertools.pairwise(edges)]))
    (ins, in_blocks), (outs, out_blocks) = sides
    batch = [axis for axis in range(x.ndim) if axis not in ins + outs]
    found = []
    for b in indices(shape, batch):
        for rows in in_blocks:
            for columns in out_blocks:
                matrix = np.zeros((len(rows), len(columns)), x.dtype)
                for i, row in enumerate(rows):
                    for j, column in enumerate(columns):
                        at = dict(
                            zip(batch + ins + outs, b + row + column, strict=True)
                        )
                        matrix[i, j] = x[tuple(at[axis] for axis in range(x.ndim))]
                found.append(matrix)
    return found


def by_shape(found):
    stacks = {}
    for matrix in found:
        stacks.setdefault(matrix.shape, []).append(matrix)
    return [np.stack(stack) for stack in stacks.values()]


def check_stacks(shape, layout, array):
    """Cuts an array of some kind into matrices, and joins them again."""
    x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    fitted, found = view(shape, layout, "w"), matrices(x, layout)
    want = by_shape(found)
    got = fitted.to_stacks(array(x))
    assert fitted.count == len(found)
    assert fitted.matrices == tuple(stack.shape for stack in want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(fitted.from_stacks(got), x)
    return x, fitted, want


@pytest.fixture
def in_numpy():
    """Replaces JAX by NumPy in the code that cuts: compiling would take hours."""
    module = sys.modules["optax_matrix._layout.view"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "jnp", np)
        yield


@cases(5000)
@given(layouts())
def test_matrices_are_those_cut_entry_by_entry(in_numpy, case):
    check_stacks(*case, np.asarray)


@cases(150)
@given(layouts(max_size=3))
def test_sums_of_matrices_are_spread_over_their_entries(case):
    shape, _ = case
    x, fitted, want = check_stacks(*case, jnp.asarray)
    sums = fitted.expand(fitted.sum(jnp.asarray(x)))
    spread = fitted.to_stacks(jnp.broadcast_to(sums, shape))
    for a, b in zip(spread, want, strict=True):
        np.testing.assert_allclose(a, b.sum((1, 2), keepdims=True) + 0 * b, rtol=1e-5)


@cases(1000)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    *(st.lists(st.integers(-5, 4), min_size=1, max_size=3, unique=True),) * 2,
    *(st.one_of(st.none(), st.integers(1, 5)),) * 2,
)
def test_a_layout_that_does_not_fit_is_refused_with_the_path(
    shape, inputs, outputs, split_inputs, split_outputs
):
    ndim = len(shape)
    for axes, split in ((inputs, split_inputs), (outputs, split_outputs)):
        assume(split is None or len(axes) == 1)
    layout = om.MatrixLayout(tuple(inputs), tuple(outputs), split_inputs, split_outputs)
    named = [*inputs, *outputs]
    fits = ndim >= 2 and all(-ndim <= axis < ndim for axis in named)
    fits = fits and len({axis % ndim for axis in named}) == len(named)
    for axes, split in ((inputs, split_inputs), (outputs, split_outputs)):
        fits = fits and (split is None or shape[axes[0] % ndim] % split == 0)
    params = {"layer": {"w": jnp.ones(shape)}}
    tx = om.orthogonalize("exact", layout=layout)
    if fits:
        tx.init(params)
    else:
        with pytest.raises(ValueError, match="'layer/w'"):
            tx.init(params)


# ------------------------------------------------------------------------ routing

NAMES = ("a", "b", "mlp", "norm", "kernel", "x/y")
SHAPES = ((), (3,), (2, 3), (2, 3, 4))


def trees(leaves, names=NAMES):
    """Dicts, lists and tuples of leaves, and of nodes without any."""
    empty = st.sampled_from([None, {}, optax.MaskedNode()])
    return st.recursive(
        st.one_of(leaves, leaves, leaves, empty),
        lambda inner: st.one_of(
            st.dictionaries(st.sampled_from(names), inner, min_size=1, max_size=4),
            st.lists(inner, min_size=1, max_size=3),
            st.tuples(inner, inner),
        ),
        max_leaves=8,
    )


def named_leaves(tree, path=()):
    """Leaves by name, found by walking the containers."""
    if isinstance(tree, dict):
        children = [(key, tree[key]) for key in sorted(tree)]
    elif isinstance(tree, list | tuple) and not isinstance(tree, optax.MaskedNode):
        children = list(enumerate(tree))
    elif tree is None or isinstance(tree, optax.MaskedNode):
        return []
    else:
        return [("/".join(map(str, path)), tree)]
    return [
        leaf for key, child in children for leaf in named_leaves(child, (*path, key))
    ]


LABELS = ("matrix", "auxiliary", True, False, om.MatrixLayout(), np.True_)


@cases(2000)
@given(trees(st.sampled_from(SHAPES).map(jnp.ones)), st.integers(0, 10**6))
def test_every_leaf_takes_the_optimizer_that_a_function_says(tree, number):
    leaves = named_leaves(tree)
    assume(leaves)

    def label(path, leaf):
        return LABELS[hash_of(path, number) % len(LABELS)]

    def is_matrix(path, leaf):
        wanted = label(path, leaf)
        said = wanted not in ("auxiliary", False)
        return bool(said) and leaf.ndim >= 2

    table = om.describe(tree, label)
    rows = {row.path: row for row in table.rows}
    assert sorted(rows) == sorted(path for path, _ in leaves)
    for path, leaf in leaves:
        wanted = "matrix" if is_matrix(path, leaf) else "auxiliary"
        assert rows[path].optimizer == wanted, path
    assert table.totals["total"] == sum(leaf.size for _, leaf in leaves)
    # Inside of a mask there may be none.
    masked = "MaskedNode" in str(jax.tree.structure(tree))
    if not masked and not any(is_matrix(*leaf) for leaf in leaves):
        tx = om.partition(lambda _: optax.scale(2.0), optax.scale(3.0), label)
        with pytest.raises(ValueError, match="No leaf takes the matrix optimizer"):
            tx.init(tree)
        return
    tx = om.partition(lambda _: optax.scale(2.0), optax.scale(3.0), label)
    got, _ = tx.update(tree, tx.init(tree), tree)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    for (path, leaf), (same, x) in zip(leaves, named_leaves(got), strict=True):
        assert path == same
        np.testing.assert_array_equal(x, (2 if is_matrix(path, leaf) else 3) * leaf)


def hash_of(path, number):
    """A number that depends on the path, the same in every process."""
    return sum(ord(c) * (i + 7) for i, c in enumerate(path)) * 31 + number


# Names for the default rules: whole words, as docs/routing.md lists them.
MODULES = ("mlp", "attn", "header", "head", "lm_head", "embed", "norm", "LayerNorm_0")
LEAF_NAMES = ("kernel", "bias", "scale", "embedding", "pos_emb", "w", "router", "gamma")
AUXILIARY_NAMES = {"bias", "scale", "gamma", "embedding", "pos_emb"}
HEADS, EMBEDDINGS = {"head", "lm_head"}, {"embed"}
NORMS = {"norm", "LayerNorm_0"}


def ruled(path, leaves):
    """What the documented rules say of leaves with at most two axes and no stacks."""
    shape, *modules, name = leaves[path], *path.split("/")
    if len(shape) < 2 or name in AUXILIARY_NAMES:
        return "auxiliary"  # rules 1 and 2
    for depth, module in enumerate(modules):
        if module in HEADS | EMBEDDINGS:  # rule 3
            inside = "/".join(modules[: depth + 1]) + "/"
            beside = [
                other
                for other, its in leaves.items()
                if other.startswith(inside)
                and len(its) >= 2
                and other.rsplit("/", 1)[-1] not in AUXILIARY_NAMES
            ]
            if len(beside) == 1:
                return "auxiliary"
    if any(module in HEADS | EMBEDDINGS for module in modules):
        return "ambiguous"
    if name == "router":
        return "auxiliary"  # rule 4
    if modules and modules[-1] in NORMS:
        return "ambiguous" if name == "kernel" else "auxiliary"
    return "matrix" if name == "kernel" else "ambiguous"  # rules 5 and 8


@cases(2000)
@given(
    st.dictionaries(
        st.tuples(
            st.lists(st.sampled_from(MODULES), min_size=1, max_size=3).map(tuple),
            st.sampled_from(LEAF_NAMES),
        ),
        st.sampled_from([(4,), (4, 3), (5, 4)]),
        min_size=1,
        max_size=6,
    )
)
def test_the_default_rules_are_those_of_the_page(found):
    leaves = {
        "/".join((*modules, name)): shape for (modules, name), shape in found.items()
    }
    # A stacked norm is evidence for other rules.
    for path, shape in leaves.items():
        *modules, name = path.split("/")
        assume(len(shape) < 2 or (name != "scale" and not NORMS & {*modules[-1:]}))
    # A leaf is no module.
    assume(not any(a != b and b.startswith(a + "/") for a in leaves for b in leaves))
    tree = {}
    for path, shape in leaves.items():
        *modules, name = path.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[name] = jax.ShapeDtypeStruct(shape, "float32")
    want = {path: ruled(path, leaves) for path in leaves}
    if "ambiguous" in want.values():
        with pytest.raises(ValueError, match="cannot tell") as error:
            om.describe(tree)
        for path, decision in want.items():
            assert (f"'{path}'" in str(error.value)) == (decision == "ambiguous")
    else:
        got = {row.path: row.optimizer for row in om.describe(tree).rows}
        assert got == want


# ---------------------------------------------------------------------- shardings

MESHES = (((8,), ("x",)), ((4, 2), ("x", "y")), ((2, 2, 2), ("x", "y", "z")))


def scaled(split, axes, factors):
    """The widths of blocks of an axis that was multiplied."""
    axis = axes[0] if isinstance(axes, tuple) else axes
    if not isinstance(split, tuple):
        return split
    return tuple(width * factors[axis] for width in split)


@st.composite
def sharded(draw, kinds=(AxisType.Explicit, AxisType.Auto)):
    """A mesh, and shapes, layouts and partitions of some leaves on it."""
    sizes, names = draw(st.sampled_from(MESHES))
    size_of = dict(zip(names, sizes, strict=True))
    leaves = {}
    for i in range(draw(st.integers(1, 3))):
        shape, layout = draw(layouts(max_size=4))
        free, spec, full = list(names), [], []
        for n in shape:
            count = draw(st.integers(0, 2)) if free else 0
            taken = [
                free.pop(draw(st.integers(0, len(free) - 1)))
                for _ in range(count)
                if free
            ]
            spec.append(tuple(taken) if len(taken) > 1 else (taken or [None])[0])
            full.append(n * math.prod(size_of[name] for name in taken))

        factors = [whole // n for whole, n in zip(full, shape, strict=True)]
        layout = om.MatrixLayout(
            layout.inputs,
            layout.outputs,
            scaled(layout.split_inputs, layout.inputs, factors),
            scaled(layout.split_outputs, layout.outputs, factors),
        )
        leaves[f"w{i}"] = tuple(full), layout, P(*spec)
    return draw(st.sampled_from(kinds)), sizes, names, leaves


@cases(1000)
@given(sharded(), st.sampled_from([None, 1, 2]))
def test_every_matrix_has_one_owner(case, stack_size):
    _, sizes, names, leaves = case
    mesh = jax.sharding.AbstractMesh(sizes, names)
    size_of = dict(zip(names, sizes, strict=True))
    params = {
        key: jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, spec))
        for key, (shape, _, spec) in leaves.items()
    }
    tree = {key: layout for key, (_, layout, _) in leaves.items()}
    resolved = _placement.resolve(params, tree, _placement.as_placement(None))
    plan = make_plan(resolved, True, stack_size)
    owned = {}
    for g, group in enumerate(plan.groups):
        slots = [0] * group.owners
        for k in range(group.count):
            slots[(group.first + k) % group.owners] += 1
        assert max(slots) == group.slots and sum(slots) == group.count
        assert max(slots) - min(slots) <= 1
        rounds = list(group.rounds())
        assert [a for a, _ in rounds[1:]] == [b for _, b in rounds[:-1]]
        assert rounds[0][0] == 0 and rounds[-1][1] == group.slots
        assert stack_size is None or all(b - a <= stack_size for a, b in rounds)
        # Devices that differ in the other mesh axes have other entries of the batch.
        slices = math.prod(sizes) // group.owners
        for member in group.members:
            leaf = f"w{member.leaf}"
            blocks = sum(count for count, *_ in group.stacks)
            owned[leaf] = owned.get(leaf, 0) + member.count * blocks * slices
        del g
    for key, (shape, layout, spec) in leaves.items():
        whole = view(shape, layout).count
        # A mesh axis that shards the batch has slices of it; any other one owners.
        assert owned[key] == whole, (key, spec, size_of)


def polar(x):
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def cut_and_joined(x, layout):
    """The polar factor of every matrix, put back entry by entry."""
    place = np.arange(x.size, dtype=np.float64).reshape(x.shape)
    out = np.zeros(x.size)
    for matrix, where in zip(matrices(x, layout), matrices(place, layout), strict=True):
        out[where.astype(int)] = polar(matrix)
    return out.reshape(x.shape)


@cases(150)
@given(sharded())
def test_orthogonalized_on_eight_devices_is_that_of_every_matrix(case):
    kind, sizes, names, leaves = case
    assume(all(math.prod(shape) <= 4096 for shape, *_ in leaves.values()))
    mesh = jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))
    rng = np.random.default_rng(0)
    xs = {key: rng.standard_normal(shape) for key, (shape, *_) in leaves.items()}
    places = {key: NamedSharding(mesh, spec) for key, (*_, spec) in leaves.items()}
    layout = {key: layout for key, (_, layout, _) in leaves.items()}
    tx = om.orthogonalize("exact", layout=layout, placement=om.Placement(places))
    with jax.set_mesh(mesh), jax.enable_x64(True):
        given = {
            key: jax.device_put(jnp.asarray(x), places[key]) for key, x in xs.items()
        }
        got, _ = jax.jit(tx.update)(given, tx.init(given))
    for key, x in xs.items():
        np.testing.assert_allclose(got[key], cut_and_joined(x, layout[key]), atol=1e-8)
