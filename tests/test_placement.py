"""Spread over a mesh: equal to one device, in few exchanges, evenly, as predicted."""

import collections
import dataclasses

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_matrix as om
from benchmarks import hlo
from optax_matrix import _placement
from optax_matrix._placement.groups import make_plan
from tests import problems

NS = om.NewtonSchulz(steps=2)
ONE = ((8,), ("x",))
TWO = ((2, 4), ("d", "f"))


def many(count, shape, spec):
    return {f"w{i}": (shape, spec) for i in range(count)}


def gpt(layers):
    """q, k, v, o, up and down as they lie under FSDP and tensor parallelism."""
    tree = {}
    for i in range(layers):
        tree |= {f"{n}{i}": ((16, 16), P("d", "f")) for n in "qkv"}
        tree[f"o{i}"] = (16, 16), P("f", "d")
        tree[f"up{i}"] = (16, 64), P("d", "f")
        tree[f"down{i}"] = (64, 16), P("f", "d")
    return tree


EIGHT_WAYS = [
    *(P(), P("d"), P("f"), P(None, "f"), P("d", "f"), P(("d", "f"))),
    *(P(None, ("d", "f")), P("f", "d")),
]
SPLIT = om.MatrixLayout(split_outputs=(16, 8, 8))
HEADS, OUT = om.MatrixLayout(0, (1, 2)), om.MatrixLayout((0, 1), 2)

# name: mesh, leaves, exchanges by kind, busiest owner over an even split
CASES = {
    "inputs": (ONE, many(8, (16, 64), P("x", None)), {"all-to-all": 2}, 1),
    "outputs": (ONE, many(8, (16, 64), P(None, "x")), {"all-to-all": 2}, 1),
    "replicated": (ONE, many(8, (16, 64), P()), {"all-gather": 1}, 1),
    "both sides": (TWO, many(16, (16, 64), P("d", "f")), {"all-to-all": 2}, 1),
    "both sides, other order": (
        TWO,
        many(16, (16, 64), P("f", "d")),
        {"all-to-all": 2},
        1,
    ),
    "one side over both": (
        TWO,
        many(8, (16, 64), P(None, ("f", "d"))),
        {"all-to-all": 2},
        1,
    ),
    "HSDP": (TWO, many(8, (16, 64), P("f")), {"all-to-all": 2}, 1),
    "layers": (ONE, {"w": ((8, 16, 64), P("x"))}, {}, 1),
    "stacked": (ONE, {"w": ((8, 16, 64), P(None, "x"))}, {"all-to-all": 2}, 1),
    "experts": (TWO, {"w": ((8, 16, 64), P("d", "f"))}, {"all-to-all": 2}, 1),
    "experts alone": (TWO, {"w": ((8, 16, 64), P("d"))}, {"all-gather": 1}, 1),
    # q, k, v and o are one group, up and down another.
    "a transformer": (TWO, gpt(4), {"all-to-all": 4}, 1),
    "a mix": (
        TWO,
        {f"w{i}": ((16, 64), spec) for i, spec in enumerate(EIGHT_WAYS)},
        # Eight groups of one matrix each, of which one is replicated.
        {"all-to-all": 14, "all-gather": 1},
        8,
    ),
    "more than devices": (ONE, many(12, (16, 64), P("x")), {"all-to-all": 2}, 16 / 12),
    "fewer than devices": (
        ONE,
        many(3, (16, 66), P(None, None)),
        {"all-gather": 1},
        8 / 3,
    ),
    "eleven on eight": (
        ONE,
        many(11, (16, 64), P(None, "x")),
        {"all-to-all": 2},
        16 / 11,
    ),
    "one matrix": (TWO, many(1, (64, 16), P("f", "d")), {"all-to-all": 2}, 8),
}


def arrays(leaves):
    return {k: problems.normal(s, i) for i, (k, (s, _)) in enumerate(leaves.items())}


def placed(leaves, mesh):
    return {k: NamedSharding(mesh, spec) for k, (_, spec) in leaves.items()}


def compiled(tx, tree):
    return jax.jit(tx.update).lower(tree, tx.init(tree), tree).compile()


def test_parameters_without_shardings_are_refused():
    shapes = {"a": {"kernel": jax.ShapeDtypeStruct((4, 4), "float32")}}
    with pytest.raises(TypeError, match="got ShapeDtypeStruct at 'a/kernel'"):
        om.Placement(shapes)


def on_mesh(leaves, shape, names, kind, method=NS, layout=None, devices=None):
    """The compiled update, its results, and the shardings it began with."""
    mesh = jax.make_mesh(shape, names, (kind,) * len(names), devices=devices)
    shardings = placed(leaves, mesh)
    tree = jax.device_put(arrays(leaves), shardings)
    told = om.Placement(tree) if kind is AxisType.Auto else None
    tx = om.orthogonalize(method, layout=layout, placement=told)
    with jax.set_mesh(mesh):
        program = compiled(tx, tree)
        return program, program(tree, tx.init(tree), tree)[0], shardings


def on_one(leaves, method=NS, layout=None):
    tree, tx = arrays(leaves), om.orthogonalize(method, layout=layout)
    program = compiled(tx, tree)
    return program, program(tree, tx.init(tree), tree)[0]


def exchanges(text):
    counts = collections.Counter()
    for collective in hlo.collectives(text):
        counts[collective.kind] += collective.count
    return dict(counts)


def received(text):
    """Bytes that one device receives; all collectives are exchanges."""
    found = hlo.collectives(text)
    assert all("/exchange/" in collective.op_name for collective in found)
    return sum(collective.bytes for collective in found)


def all_flops(text):
    """FLOPs of products, and of factorizations and triangular solves."""
    return hlo.dot_flops(text) + hlo.solver_flops(text)


def described(leaves, mesh, method=NS):
    """The prediction, made without devices."""
    abstract = jax.sharding.AbstractMesh(*mesh)
    params = {
        k: jax.ShapeDtypeStruct(s, "float32", sharding=NamedSharding(abstract, spec))
        for k, (s, spec) in leaves.items()
    }
    return om.describe_placement(
        params, method, backend="cpu", routing=lambda path, leaf: True
    )


# Made of what the others have.
MARKS = {"a mix": pytest.mark.slow}
AUTO = ["replicated", "a transformer", "HSDP", "one matrix", "experts"]


@pytest.mark.parametrize(
    "name, kind",
    [
        *(
            pytest.param(name, AxisType.Explicit, marks=MARKS.get(name, ()))
            for name in CASES
        ),
        *((name, AxisType.Auto) for name in AUTO),
    ],
)
def test_equal_to_one_device_in_few_exchanges(name, kind):
    mesh, leaves, wanted, uneven = CASES[name]
    single, want = on_one(leaves)
    program, got, shardings = on_mesh(leaves, *mesh, kind)
    chex.assert_trees_all_close(got, want, atol=2e-6)
    for key, leaf in got.items():
        assert leaf.sharding.is_equivalent_to(shardings[key], leaf.ndim), key
    text = program.as_text()
    assert exchanges(text) == wanted
    even = hlo.dot_flops(single.as_text()) / 8
    assert hlo.dot_flops(text) == pytest.approx(uneven * even, rel=1e-9)
    # The formulas of `describe_placement` are the numbers of the compiled program.
    cost = described(leaves, mesh)
    total = cost.totals
    assert hlo.dot_flops(text) == sum(group.flops for group in cost.groups)
    assert total["flops"] <= hlo.dot_flops(text)
    assert even == total["even_flops"]
    assert received(text) == total["exchanged_bytes"]
    assert total["exchanges"] == sum(wanted.values())
    # No more bytes than needed, but for slots that are empty.
    least = total["least_bytes"]
    assert least <= total["exchanged_bytes"] <= uneven * least * (1 + 1e-9)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_fused_and_per_head_leaves(kind):
    layout = {"qkv": SPLIT, "heads": HEADS, "out": OUT, "across": SPLIT}
    leaves = {
        "qkv": ((16, 32), P("d", None)),
        # The blocks end between shards: the owner cuts.
        "across": ((16, 32), P(None, "f")),
        "heads": ((16, 4, 8), P("d", "f")),
        "out": ((4, 8, 16), P(None, "f")),
    }
    _, want = on_one(leaves, layout=layout)
    program, got, shardings = on_mesh(leaves, *TWO, kind, layout=layout)
    chex.assert_trees_all_close(got, want, atol=2e-6)
    for key, leaf in got.items():
        assert leaf.sharding.is_equivalent_to(shardings[key], leaf.ndim), key
    # 16 × 16 and 16 × 8 of qkv, across, heads, and out, whose heads are not sharded.
    groups = 5
    assert exchanges(program.as_text())["all-to-all"] == 2 * groups


@pytest.mark.parametrize("method", [om.Halley(lower_bound=0.1), om.Exact(), NS])
def test_every_method_and_a_nan_on_a_mesh(method):
    leaves = many(3, (8, 32), P("x", None)) | {"square": ((8, 8), P(None, "x"))}
    tree = arrays(leaves)
    tree["w1"] = tree["w1"].at[2, 3].set(jnp.nan)
    tree["w2"] = jnp.zeros_like(tree["w2"])
    tx = om.orthogonalize(method)
    want, _ = jax.jit(tx.update)(tree, tx.init(tree))
    mesh = jax.make_mesh(*ONE, (AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(tree, placed(leaves, mesh))
        got, _ = jax.jit(tx.update)(sharded, tx.init(sharded))
    assert jnp.isnan(got["w1"]).all() and jnp.isnan(want["w1"]).all()
    assert not jnp.asarray(got["w2"]).any()
    chex.assert_trees_all_close(
        got | {"w1": None}, want | {"w1": None}, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "spec, moved",
    [
        # One owner receives seven pieces of eight, and sends all eight pieces; the
        # others receive one piece.
        (P("x"), 4 * (16 * 64 // 8) * (7 + 7)),
        # Pieces of a quarter; every device receives one from the owner.
        (P(), 4 * 16 * 64 * 7),
    ],
)
def test_bytes_by_hand(spec, moved):
    total = described(many(1, (16, 64), spec), ONE).totals
    assert total["exchanged_bytes"] == moved


def test_small_groups_share_the_devices():
    # Three groups of three matrices on eight devices: owners 0 to 2, 3 to 5, 6 to 0.
    leaves = {}
    for i, n in enumerate((24, 32, 40)):
        leaves |= {f"{i}{j}": ((16, n), P("x")) for j in range(3)}
    mesh = jax.make_mesh(*ONE, (AxisType.Explicit,))
    tree = {
        k: jax.ShapeDtypeStruct(s, "float32", sharding=NamedSharding(mesh, p))
        for k, (s, p) in leaves.items()
    }
    resolved = _placement.resolve(tree, None, om.Placement())
    firsts = [group.first for group in make_plan(resolved, True, None).groups]
    assert firsts == [0, 3, 6]
    # Device 0 alone owns two, one of the smallest and one of the largest.
    cost = om.describe_placement(tree, NS, backend="cpu", routing="matrix")
    assert cost.totals["flops"] == NS.flops(16, 24) + NS.flops(16, 40)
    assert sum(group.flops for group in cost.groups) > cost.totals["flops"]
    # Their matrices get where they belong.
    _, want = on_one(leaves)
    _, got, _ = on_mesh(leaves, *ONE, AxisType.Explicit)
    chex.assert_trees_all_close(got, want, atol=2e-6)


@pytest.mark.parametrize("spec", [P(), P("x"), P(None, "x")])
@pytest.mark.parametrize("count", [1, 8])
def test_a_square_matrix_is_never_turned(spec, count):
    # AOL rescales rows, and so a transposed matrix is not the same.
    leaves, method = many(count, (16, 16), spec), om.NewtonSchulz(coefficients="aol")
    _, want = on_one(leaves, method)
    _, got, _ = on_mesh(leaves, *ONE, AxisType.Explicit, method)
    chex.assert_trees_all_close(got, want, atol=1e-5)


def test_gradients_go_through_exchanges():
    leaves = many(3, (8, 24), P("x", None))
    tx = om.orthogonalize(NS)

    def loss(tree):
        done, _ = tx.update(tree, optax.EmptyState())
        weights = jnp.reshape(jnp.arange(8 * 24.0), (8, 24)) / 100
        return sum(jnp.sum(weights * x) for x in done.values())

    want = jax.grad(loss)(arrays(leaves))
    mesh = jax.make_mesh(*ONE, (AxisType.Explicit,))
    with jax.set_mesh(mesh):
        tree = jax.device_put(arrays(leaves), placed(leaves, mesh))
        got = jax.jit(jax.grad(loss))(tree)
    chex.assert_trees_all_close(got, want, atol=1e-4)


@pytest.mark.parametrize("stack_size", [2, 8])
def test_stacks_on_a_mesh(stack_size):
    leaves = many(23, (16, 64), P("x", None))
    _, want = on_one(leaves)
    mesh = jax.make_mesh(*ONE, (AxisType.Explicit,))
    told = om.Placement(placed(leaves, mesh), stack_size)
    tx = om.orthogonalize(NS, placement=told)
    with jax.set_mesh(mesh):
        tree = jax.device_put(arrays(leaves), placed(leaves, mesh))
        program = compiled(tx, tree)
        got, _ = program(tree, optax.EmptyState(), tree)
    chex.assert_trees_all_close(got, want, atol=2e-6)
    (cost,) = om.describe_placement(
        tree, NS, backend="cpu", routing="matrix", placement=told
    ).groups
    rounds = -(-3 // stack_size)
    assert (cost.per_owner, cost.exchanges) == (3, 2 * rounds)
    assert exchanges(program.as_text()) == {"all-to-all": 2 * rounds}
    assert cost.round_bytes == min(stack_size, 3) * 16 * 64 * 4


@pytest.mark.parametrize("set_mesh", [True, False])
def test_auto_axes_without_being_told(set_mesh):
    leaves = many(8, (16, 64), P("x", None)) | {"r": ((16, 64), P())}
    _, want = on_one(leaves)
    mesh = jax.make_mesh(*ONE, (AxisType.Auto,))
    tree = jax.device_put(arrays(leaves), placed(leaves, mesh))
    tx = om.orthogonalize(NS)
    if set_mesh:
        with jax.set_mesh(mesh):
            program = compiled(tx, tree)
            # Assumed to be replicated: 8 leaves are gathered first, then all results.
            assert exchanges(program.as_text()) == {"all-gather": 8 + 1}
    else:
        program = compiled(tx, tree)
    chex.assert_trees_all_close(
        program(tree, optax.EmptyState(), tree)[0], want, atol=2e-6
    )


def test_eager_updates_see_the_arrays():
    leaves = many(8, (16, 64), P("x", None))
    _, want = on_one(leaves)
    mesh = jax.make_mesh(*ONE, (AxisType.Auto,))
    tree = jax.device_put(arrays(leaves), placed(leaves, mesh))
    tx = om.orthogonalize(NS)
    got, _ = tx.update(tree, tx.init(tree))
    chex.assert_trees_all_close(got, want, atol=2e-6)
    assert got["w0"].sharding.is_equivalent_to(tree["w0"].sharding, 2)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_a_capped_group_goes_in_rounds(kind):
    leaves = many(24, (16, 64), P("x", None))
    _, want = on_one(leaves)
    mesh = jax.make_mesh(*ONE, (kind,))
    tree = jax.device_put(arrays(leaves), placed(leaves, mesh))
    memory = {}
    for stack_size in (1, 3):
        tx = om.orthogonalize(NS, placement=om.Placement(tree, stack_size))
        with jax.set_mesh(mesh):
            program = compiled(tx, tree)
        got, _ = program(tree, optax.EmptyState(), tree)
        chex.assert_trees_all_close(got, want, atol=2e-6)
        assert exchanges(program.as_text()) == {"all-to-all": 2 * 3 // stack_size}
        found = program.memory_analysis()
        assert found is not None
        memory[stack_size] = found.temp_size_in_bytes
    assert memory[1] < memory[3]


ROUNDS = """
import os
# By default XLA for CPU orders a program for concurrency, and all rounds run abreast.
os.environ["XLA_FLAGS"] = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
import jax
jax.config.update("jax_num_cpu_devices", 8)
from tests import test_placement as t
for count in (8, 64):
    for stack_size in (1, count):
        print(t.temporary_bytes(count, stack_size))
"""


def temporary_bytes(count, stack_size):
    mesh = jax.make_mesh(*ONE, (AxisType.Explicit,))
    tree = described_leaves(many(count, (16, 64), P("x", None)), mesh)
    tx = om.orthogonalize(NS, placement=om.Placement(tree, stack_size))
    with jax.set_mesh(mesh):
        found = compiled(tx, tree).memory_analysis()
    assert found is not None
    return found.temp_size_in_bytes


@pytest.mark.slow
def test_rounds_take_the_memory_of_one():
    eight, _, many_in_rounds, many_at_once = map(
        int, problems.printed_by(ROUNDS).split()
    )
    assert many_in_rounds < 1.2 * eight
    assert many_at_once > 6 * eight


@dataclasses.dataclass(frozen=True)
class Signs:
    """A method of a user's own, which is not transposable and has no formula."""

    def polar(self, x):
        return jnp.sign(x) + jax.lax.broadcasted_iota(x.dtype, x.shape, x.ndim - 1)


def test_a_method_of_your_own_gets_matrices_that_are_not_transposed():
    leaves = many(3, (16, 8), P("x", None)) | {"t": ((8, 16), P(None, "x"))}
    _, want = on_one(leaves, Signs())
    program, got, _ = on_mesh(leaves, *ONE, AxisType.Explicit, Signs())
    chex.assert_trees_all_equal(got, want)
    assert exchanges(program.as_text()) == {"all-to-all": 4}


def test_vmap_over_an_ensemble_of_sharded_trees():
    leaves = many(3, (16, 64), P("x", None))
    _, want = on_one(leaves)
    mesh = jax.make_mesh(*ONE, (AxisType.Explicit,))
    tx = om.orthogonalize(NS)
    with jax.set_mesh(mesh):
        tree = jax.device_put(arrays(leaves), placed(leaves, mesh))
        both = jax.tree.map(lambda x: jnp.stack([x, -x]), tree)
        got = jax.jit(jax.vmap(lambda t: tx.update(t, optax.EmptyState())[0]))(both)
    for sign, i in ((1, 0), (-1, 1)):
        member = jax.tree.map(lambda x, i=i, s=sign: s * x[i], jax.device_get(got))
        chex.assert_trees_all_close(member, jax.device_get(want), atol=2e-6)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("told", [True, False])
def test_inside_a_users_shard_map_nothing_is_spread(kind, told):
    leaves = many(2, (16, 64), P())
    _, want = on_one(leaves)
    mesh = jax.make_mesh(*ONE, (kind,))
    rows = NamedSharding(mesh, P("x", None))
    tx = om.orthogonalize(NS, placement=om.Placement(rows) if told else None)

    def body(tree):
        return tx.update(tree, tx.init(tree))[0]

    with jax.set_mesh(mesh):
        mapped = jax.jit(jax.shard_map(body, in_specs=P(), out_specs=P()))
        chex.assert_trees_all_close(mapped(arrays(leaves)), want, atol=2e-6)


MANY = """
import jax
jax.config.update("jax_num_cpu_devices", {devices})
from tests import test_placement as t
t.on_many_devices({sides}, t.AxisType.{kind}, {method!r}, {count})
"""


def on_many_devices(sides, kind, name, count):
    method, (n, f) = {"newton_schulz": NS, "halley": om.Halley()}[name], sides
    mesh = sides, ("d", "f")
    leaves = {"w": ((count, n, 4 * f), P(None, "d", "f"))}
    tree = described_leaves(leaves, jax.make_mesh(*mesh, (kind,) * 2))
    text = abstractly_compiled(leaves, tree, kind, method)
    total = described(leaves, mesh, method).totals
    assert exchanges(text) == {"all-to-all": 2}
    assert all_flops(text) == total["flops"]
    even = count / (n * f)
    assert total["flops_over_even"] == pytest.approx(-(-count // (n * f)) / even)
    assert received(text) == total["exchanged_bytes"]
    if even == 2:
        assert total["exchanged_bytes"] == total["least_bytes"]
    print("kept on", jax.device_count())


def described_leaves(leaves, mesh):
    return {
        k: jax.ShapeDtypeStruct(s, "float32", sharding=NamedSharding(mesh, spec))
        for k, (s, spec) in leaves.items()
    }


def abstractly_compiled(leaves, tree, kind, method):
    told = om.Placement(tree) if kind is AxisType.Auto else None
    tx = om.orthogonalize(method, placement=told)
    update = jax.jit(lambda tree: tx.update(tree, optax.EmptyState())[0])
    return update.lower(tree).compile().as_text()


@pytest.mark.parametrize(
    "method, sides, kind, count",
    [
        ("newton_schulz", (8, 8), "Explicit", 128),
        pytest.param("halley", (8, 8), "Auto", 12, marks=pytest.mark.slow),
        pytest.param("newton_schulz", (16, 16), "Auto", 512, marks=pytest.mark.slow),
        pytest.param("halley", (16, 16), "Explicit", 300, marks=pytest.mark.slow),
    ],
)
def test_64_and_256_devices_keep_the_bounds(method, sides, kind, count):
    devices = sides[0] * sides[1]
    program = MANY.format(
        devices=devices, sides=sides, kind=kind, method=method, count=count
    )
    assert problems.printed_by(program).strip() == f"kept on {devices}"


@pytest.mark.parametrize("devices", [16, 64, 256])
def test_described_for_any_number_of_devices(devices):
    leaves = {f"w{i}": ((devices, 4 * devices), P("x", None)) for i in range(devices)}
    cost = described(leaves, ((devices,), ("x",)))
    assert cost.totals["flops_over_even"] == 1
    assert cost.totals["exchanges"] == 2
    assert cost.totals["exchanged_bytes"] == cost.totals["least_bytes"]
    assert str(devices) in str(cost)


def test_bad_placements_say_what_is_wrong():
    with pytest.raises(TypeError, match=r"'w'.*jax\.tree\.map"):
        om.Placement({"w": P("x")})
    with pytest.raises(ValueError, match="stack_size"):
        om.Placement(stack_size=0)
    with pytest.raises(TypeError, match="`placement` must be a `Placement`"):
        om.orthogonalize(placement={"w": P("x")})
    with pytest.raises(TypeError, match="formula"):
        om.describe_placement(
            {"w": jnp.ones((2, 2))}, "exact", backend="cpu", routing="matrix"
        )
    with pytest.raises(ValueError, match="`backend` must be one of 'cpu', 'gpu'"):
        om.describe_placement({"w": jnp.ones((2, 2))}, backend="h100", routing="matrix")
    mesh = jax.sharding.AbstractMesh((8,), ("x",))
    rows = NamedSharding(mesh, P("x", None))
    tx = om.orthogonalize(placement=om.Placement({"odd": rows}))
    odd = {"odd": jnp.ones((12, 8))}
    with pytest.raises(ValueError, match=r"axis 0 into 8 at 'odd', shape \(12, 8\)"):
        tx.init(odd)
    with pytest.raises(ValueError, match="`sharding` has no entry for 'other'"):
        tx.init(odd | {"other": jnp.ones((8, 8))})
