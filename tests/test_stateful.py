"""Preconditioners on a mesh: each device has its share of state and refreshes."""

import collections
import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_matrix as om
from benchmarks import hlo
from optax_matrix import _linalg
from optax_matrix._transforms._kl import KLRule
from optax_matrix._transforms.shampoo_precondition import ShampooRule
from optax_matrix._transforms.soap_precondition import SoapRule
from tests import problems

ONE = ((8,), ("x",))
TWO = ((2, 4), ("d", "f"))
STEPS = 5
SLOW = pytest.mark.slow


def many(count, shape, spec):
    return {f"w{i}": (shape, spec) for i in range(count)}


# name: mesh, leaves, exchanges by kind, work and state of the busiest device over an
# even split. The longer sides are left out below (`max_dim`): their first statistics
# have a null space, whose basis is rounding.
CASES = {
    "inputs": (ONE, many(8, (8, 16), P("x", None)), {"all-to-all": 2}, 1),
    "replicated": (ONE, many(8, (16, 8), P()), {"all-gather": 1}, 1),
    "both sides": (TWO, many(16, (8, 8), P("d", "f")), {"all-to-all": 2}, 1),
    "layers": (ONE, {"w": ((8, 8, 4), P("x"))}, {}, 1),
    "stacked": (ONE, {"w": ((8, 8, 4), P(None, "x"))}, {"all-to-all": 2}, 1),
    "experts": (TWO, {"w": ((8, 8, 4), P("d", "f"))}, {"all-to-all": 2}, 1),
    # In parts: 12 of 11 halves and wholes; health is counted once for each part.
    "more than devices": (ONE, many(11, (8, 8), P("x")), {"all-to-all": 2}, 1.1),
    "fewer than devices": (ONE, many(3, (8, 8), P(None, "x")), {"all-to-all": 2}, 1.06),
    "a mix": (
        TWO,
        many(5, (8, 16), P("d", "f"))
        | {"t": ((3, 8, 16), P(None, None, ("d", "f"))), "u": ((16, 8), P("f"))}
        | {"r": ((8, 8), P()), "s": ((4, 8, 8), P("f"))},
        # 16x8, 8x16 and twice 8x8: with its four layers on one axis and without.
        {"all-to-all": 4, "all-gather": 2},
        None,
    ),
}
MORE = ["layers", "stacked", "experts", "both sides", "a mix", "fewer than devices"]
RULES = {
    "soap": lambda **k: om.soap_precondition(refresh=2, max_dim=8, **k),
    "shampoo": lambda **k: om.shampoo_precondition(
        refresh=2, max_dim=8, damping=1e-2, **k
    ),
    "kl": lambda **k: om.kl_soap_precondition(refresh=2, max_dim=8, **k),
}


def gradients(leaves, step):
    return {
        k: problems.normal(s, 100 * step + i)
        for i, (k, (s, _)) in enumerate(leaves.items())
    }


def on_one(tx, leaves):
    state, update = tx.init(gradients(leaves, 0)), jax.jit(tx.update)
    program = update.lower(gradients(leaves, 0), state).compile()
    outs = []
    for t in range(STEPS):
        out, state = program(gradients(leaves, t), state)
        outs.append(out)
    return program, outs, state


def exchanges(text):
    """By kind; those between the parts of a matrix are of kind "parts"."""
    counts = collections.Counter()
    for collective in hlo.collectives(text):
        between = "/exchange/" not in collective.op_name
        counts["parts" if between else collective.kind] += collective.count
    return dict(counts)


def bytes_on(device, tree):
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


@pytest.mark.parametrize(
    ("name", "rule", "kind"),
    [
        *((name, "soap", AxisType.Explicit) for name in CASES if name not in MORE),
        *(pytest.param(name, "soap", AxisType.Explicit, marks=SLOW) for name in MORE),
        pytest.param("a mix", "soap", AxisType.Auto, marks=SLOW),
        pytest.param("a mix", "shampoo", AxisType.Explicit, marks=SLOW),
        pytest.param("fewer than devices", "shampoo", AxisType.Auto, marks=SLOW),
        pytest.param("both sides", "kl", AxisType.Auto, marks=SLOW),
    ],
)
def test_equal_to_one_device_and_evenly_shared(name, rule, kind):
    (shape, names), leaves, wanted, bound = CASES[name]
    single, want, whole = on_one(RULES[rule](), leaves)
    mesh = jax.make_mesh(shape, names, (kind,) * len(names))
    shardings = {k: NamedSharding(mesh, spec) for k, (_, spec) in leaves.items()}
    placement = om.Placement(shardings) if kind is AxisType.Auto else None
    tx = RULES[rule](placement=placement)
    with jax.set_mesh(mesh):
        params = jax.device_put(gradients(leaves, 0), shardings)
        state, update = tx.init(params), jax.jit(tx.update)
        types, got, grads = jax.tree.map(jax.typeof, state), params, params
        for t in range(STEPS):
            grads = jax.device_put(gradients(leaves, t), shardings)
            got, state = update(grads, state)
            chex.assert_trees_all_close(got, want[t], atol=1e-5, rtol=1e-4)
        assert update._cache_size() == 1
        assert jax.tree.map(jax.typeof, state) == types
        text = update.lower(grads, state).compile().as_text()
    for key, leaf in got.items():
        assert leaf.sharding.is_equivalent_to(shardings[key], leaf.ndim), key
    # One device factorizes a matrix, also if others share it.
    calls, alone = (hlo.custom_calls(t) for t in (text, single.as_text()))
    count = sum(math.prod(shape[:-2]) for shape, _ in leaves.values())
    most = {k: -(-count // 8) * n // count for k, n in alone.items()}
    assert any(alone) and (bound is None or calls == most)
    counts = exchanges(text)
    cut = any(".in" in name for name in state.matrices)
    assert (counts.pop("parts", 0) > 0) == cut == (bound != 1)
    assert counts == wanted
    if bound is None:
        return
    even = hlo.dot_flops(single.as_text()) / 8
    assert hlo.dot_flops(text) <= bound * even * 1.005
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(whole.matrices))
    for device in jax.devices():
        assert bytes_on(device, state.matrices) <= bound * total / 8


# Tall, wide, per head, stacked; rows that parts do not divide; sharded and replicated.
UNEVEN = {
    "wide": ((15, 20), P(None, "f")),
    "tall": ((20, 15), P("f", None)),
    "heads": ((15, 2, 10), P(None, "d")),
    "three": ((3, 15, 15), P()),
}
HEADS = {"heads": om.MatrixLayout(0, (1, 2))}
CUT = {
    "soap": lambda **k: om.soap_precondition(max_dim=15, **k),
    "shampoo": lambda **k: om.shampoo_precondition(damping=1e-2, **k),
    "newton": lambda **k: om.shampoo_precondition(
        None, root="newton", damping=0.1, **k
    ),
    "one-sided": lambda **k: om.shampoo_precondition(
        b2=None, exponents=(None, -0.5), damping=1e-2, **k
    ),
    "bfloat16": lambda **k: om.shampoo_precondition(
        damping=0.1, moment_dtype="bfloat16", factor_dtype="bfloat16", **k
    ),
    "kl_soap": lambda **k: om.kl_soap_precondition(max_dim=15, **k),
    "kl_shampoo": lambda **k: om.kl_shampoo_precondition(max_dim=15, **k),
}


@pytest.mark.parametrize(
    "rule, stagger, stack_size",
    [
        *(pytest.param(rule, False, None, marks=SLOW) for rule in CUT),
        pytest.param("soap", True, None, marks=SLOW),
        ("shampoo", True, None),
        pytest.param("shampoo", False, 2, marks=SLOW),
    ],
)
def test_matrices_in_parts_equal_whole_ones(rule, stagger, stack_size):
    # Staggered, one stack alone has the same turns on any number of devices.
    leaves = {k: v for k, v in UNEVEN.items() if k == "three" or not stagger}
    layout = {**dict.fromkeys(leaves), **(HEADS if "heads" in leaves else {})}
    make = functools.partial(CUT[rule], refresh=2, stagger=stagger, layout=layout)
    want = on_one(make(), leaves)[1]
    mesh = jax.make_mesh(*TWO, (AxisType.Explicit,) * 2)
    shardings = {k: NamedSharding(mesh, spec) for k, (_, spec) in leaves.items()}
    tx = make(placement=om.Placement(shardings, stack_size))
    close = {"bfloat16": 0.02}.get(rule, 2e-5)
    with jax.set_mesh(mesh):
        params = jax.device_put(gradients(leaves, 0), shardings)
        state, update = tx.init(params), jax.jit(tx.update)
        for t in range(STEPS):
            grads = jax.device_put(gradients(leaves, t), shardings)
            got, state = update(grads, state)
            chex.assert_trees_all_close(got, want[t], atol=close, rtol=10 * close)
        assert update._cache_size() == 1
    # A device takes no more at once than a stack has.
    names = {"15x15.in2" if stack_size == 2 else "15x15.in8"}
    assert set(state.matrices) == names | (
        set() if stagger else {"15x20.in4", "20x15.in8"}
    )


def test_parts_of_equal_pieces_that_lie_differently():
    leaves = {"a": ((8, 16), P("x", None)), "b": ((8, 16), P(None, "x"))}
    make = functools.partial(om.shampoo_precondition, None, damping=1e-2)
    want = on_one(make(), leaves)[1]
    mesh = jax.make_mesh(*ONE, (AxisType.Explicit,))
    with jax.set_mesh(mesh):
        tx, shardings = (
            make(),
            {k: NamedSharding(mesh, s) for k, (_, s) in leaves.items()},
        )
        state = tx.init(jax.device_put(gradients(leaves, 0), shardings))
        grads = jax.device_put(gradients(leaves, 0), shardings)
        got, _ = jax.jit(tx.update)(grads, state)
    chex.assert_trees_all_close(got, want[0], atol=2e-5, rtol=2e-4)
    assert set(state.matrices) == {"8x16.in4"}


@pytest.mark.parametrize("flops_per_byte", [0, 1000])
def test_a_matrix_without_statistics_is_not_shared(flops_per_byte):
    leaves = {"w": ((6, 8), P())}
    want = on_one(om.soap_precondition(max_dim=5), leaves)[1]
    mesh = jax.make_mesh(*ONE, (AxisType.Explicit,))
    told = om.Placement(NamedSharding(mesh, P()), flops_per_byte=flops_per_byte)
    tx = om.soap_precondition(max_dim=5, placement=told)
    with jax.set_mesh(mesh):
        state, update = tx.init(jax.device_put(gradients(leaves, 0), P())), tx.update
        for t in range(STEPS):
            grads = jax.device_put(gradients(leaves, t), P())
            got, state = jax.jit(update)(grads, state)
            chex.assert_trees_all_close(got, want[t], atol=1e-6)
    assert set(state.matrices) == {"6x8"}


RULE = {
    "soap": SoapRule(6, None, None, "highest"),
    "shampoo": ShampooRule(
        (-0.25, -0.25), "eigh", True, False, 20, None, None, "highest"
    ),
    "one-sided": ShampooRule(
        (None, -0.5), "eigh", False, True, 20, None, None, "highest"
    ),
    "kl": KLRule(True, 20, None, None, "highest"),
}


@pytest.mark.parametrize("rule", RULE)
@pytest.mark.parametrize("m, n, parts", [(6, 6, 1), (6, 4, 2), (4, 6, 3), (5, 20, 4)])
def test_rules_say_what_a_part_of_an_update_multiplies(rule, m, n, parts):
    def own(x):
        return x[: -(-x.shape[0] // parts)]

    def gather(x, rows):
        return jnp.concatenate([x] * parts)[:rows]

    shared = _linalg.Parts(parts, lambda x: x, lambda x: x, own, gather)
    scalars = collections.defaultdict(lambda: jnp.asarray(0.5), count=jnp.asarray(3))
    rule = RULE[rule]
    state = jax.tree.map(lambda x: own(x) if x.ndim else x, rule.init(m, n, "float32"))

    def step(x, state):
        y, state = rule.before(x, state, scalars, shared)
        return rule.after(y, state, scalars, shared), state

    text = jax.jit(step).lower(jnp.ones((m, n)), state).compile().as_text()
    assert hlo.dot_flops(text) == rule.flops(m, n, parts)


@pytest.mark.parametrize(
    "rule",
    [
        "one-sided",
        *(
            pytest.param(rule, marks=SLOW)
            for rule in ("soap", "shampoo", "kl", "kl left", "kl right")
        ),
    ],
)
def test_rules_say_what_a_part_of_an_update_receives(rule):
    leaves = many(3, (8, 16), P("x"))
    makers = {
        "soap": lambda: om.soap_precondition(max_dim=8),
        "shampoo": om.shampoo_precondition,
        "one-sided": lambda: om.shampoo_precondition(None, None, exponents=(None, -1)),
        "kl": om.kl_soap_precondition,
        "kl left": lambda: om.kl_soap_precondition(max_dim=8),
        "kl right": lambda: om.kl_soap_precondition(max_dim=8),
    }
    if rule == "kl right":
        leaves = many(3, (16, 8), P("x"))
    mesh = jax.make_mesh(*ONE, (AxisType.Explicit,))
    tx = makers[rule]()
    with jax.set_mesh(mesh):
        params = jax.device_put(gradients(leaves, 0), P("x"))
        text = jax.jit(tx.update).lower(params, tx.init(params)).compile().as_text()
    received = sum(
        c.bytes
        for c in hlo.collectives(text)
        if "/exchange/" not in c.op_name and "branch" not in c.op_name
    )
    both = rule in ("shampoo", "one-sided", "kl")
    one = dataclasses.replace(RULE[rule.split()[0]], max_dim=20 if both else 8)
    want = 3 * one.traffic(*leaves["w0"][0], 8, "float32").bytes
    # The KL rules also send some vectors.
    assert want <= received <= want * (1.15 if rule.startswith("kl") else 1)


def test_refreshes_are_shared_and_staggered():
    leaves = many(16, (8, 8), P("x"))
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Explicit,))
    tx = om.soap_precondition(refresh=2, stagger=True)
    with jax.set_mesh(mesh):
        shardings = {k: NamedSharding(mesh, spec) for k, (_, spec) in leaves.items()}
        params = jax.device_put(gradients(leaves, 0), shardings)
        state, update = tx.init(params), jax.jit(tx.update)
        _, state = update(params, state)
        seen = []
        for t in range(1, 5):
            before = np.asarray(state.matrices["8x8"].left.basis)
            grads = jax.device_put(gradients(leaves, t), shardings)
            _, state = update(grads, state)
            after = np.asarray(state.matrices["8x8"].left.basis)
            moved = np.abs(after - before).max(axis=(1, 2)) > 0
            seen.append(set(np.flatnonzero(moved)))
    # Two on every device: one of them in each update, and in turns.
    assert [len(moved) for moved in seen] == [8, 8, 8, 8]
    assert all({i // 2 for i in moved} == set(range(8)) for moved in seen)
    assert seen[0] == seen[2] != seen[1] == seen[3]


def test_blocks_of_a_whole_side_are_spread_like_matrices():
    leaves = {"w": ((16, 16), P())}
    want = on_one(om.soap_precondition(refresh=2, block_size=4), leaves)[1]
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Explicit,))
    tx = om.soap_precondition(refresh=2, block_size=4)
    with jax.set_mesh(mesh):
        params = jax.device_put(gradients(leaves, 0), P())
        state, update = tx.init(params), jax.jit(tx.update)
        for t in range(STEPS):
            grads = jax.device_put(gradients(leaves, t), P())
            got, state = update(grads, state)
            chex.assert_trees_all_close(got, want[t], atol=1e-5, rtol=1e-4)
    # Sixteen blocks, two on each device.
    (shard, *_) = state.matrices["4x4"].momentum.addressable_shards
    assert shard.data.shape == (2, 4, 4)


def test_state_for_another_mesh_raises():
    leaves = many(3, (8, 8), P("x"))
    tx = om.soap_precondition()
    state = tx.init(gradients(leaves, 0))
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Explicit,))
    with jax.set_mesh(mesh):
        grads = jax.device_put(gradients(leaves, 0), P("x"))
        match = r"'8x8': 3.*need .*'8x8\.in8': 24.*`placement`"
        with pytest.raises(ValueError, match=match):
            jax.jit(tx.update)(grads, state)
    other = tx.init({"w": problems.normal((4, 8))})
    with pytest.raises(ValueError, match=r"'4x8': 1.*need .*'8x8': 3"):
        tx.update(gradients(leaves, 0), other)


def test_a_round_of_stacks_and_a_loop_agree():
    leaves = many(5, (6, 6), P())
    want = on_one(om.soap_precondition(refresh=2), leaves)[1]
    for size in (2, 8):
        tx = om.soap_precondition(refresh=2, placement=om.Placement(stack_size=size))
        got = on_one(tx, leaves)[1]
        chex.assert_trees_all_close(got, want, atol=1e-5, rtol=1e-4)


def test_state_of_a_matrix_is_what_the_docstring_says():
    params, m, n = {"w": problems.normal((5, 7))}, 5, 7
    numbers = {
        om.soap_precondition: 2 * m * n + 2 * m * m + 2 * n * n,
        om.shampoo_precondition: m * n + 2 * m * m + 2 * n * n,
        om.kl_soap_precondition: 2 * m * n + 2 * m * m + 2 * n * n + m + n,
        om.kl_shampoo_precondition: m * n + 2 * m * m + 2 * n * n + m + n,
    }
    for transform, number in numbers.items():
        state = transform().init(params)
        floats = [x for x in jax.tree.leaves(state) if x.dtype == "float32"]
        assert sum(math.prod(x.shape) for x in floats) == number


MANY = """
import jax
jax.config.update("jax_num_cpu_devices", 256)
from tests import test_stateful as t
for sizes in ((8, 8), (16, 16)):
    print(t.abstractly_bounded(sizes))
"""


def abstractly_bounded(sizes):
    """Compiles for a matrix and a half a device, and holds it against one device."""
    devices = math.prod(sizes)
    mesh = jax.make_mesh(sizes, ("d", "f"), (AxisType.Explicit,) * 2)
    sharding = NamedSharding(mesh, P(None, "d", "f"))
    shape, tx = (3 * devices // 2, 16, 16), om.soap_precondition(refresh=2)
    leaves = {"w": jax.ShapeDtypeStruct(shape, "float32", sharding=sharding)}
    with jax.set_mesh(mesh):
        state = jax.eval_shape(tx.init, leaves)
        text = jax.jit(tx.update).lower(leaves, state).compile().as_text()
    whole = {"w": jax.ShapeDtypeStruct(shape, "float32")}
    state = jax.eval_shape(tx.init, whole)
    single = jax.jit(tx.update).lower(whole, state).compile().as_text()
    counts = exchanges(text)
    assert counts.pop("parts") and counts == {"all-to-all": 2}
    assert hlo.dot_flops(text) == hlo.dot_flops(single) / devices
    return devices


@pytest.mark.slow
def test_64_and_256_devices_keep_the_bounds():
    assert problems.printed_by(MANY).split() == ["64", "256"]
