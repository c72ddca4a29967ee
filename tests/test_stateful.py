"""Preconditioners on a mesh: state and refreshes lie with the owners of matrices."""

import collections
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_matrix as om
from benchmarks import hlo
from optax_matrix import _transforms
from tests import problems

ONE = ((8,), ("x",))
TWO = ((2, 4), ("d", "f"))
STEPS = 5
SLOW = pytest.mark.slow


def many(count, shape, spec):
    return {f"w{i}": (shape, spec) for i in range(count)}


# name: mesh, leaves, exchanges by kind, matrices of the busiest owner over an even
# split. The longer sides are left out below (`max_dim`): their first statistics
# have a null space, whose basis is rounding.
CASES = {
    "inputs": (ONE, many(8, (8, 16), P("x", None)), {"all-to-all": 2}, 1),
    "replicated": (ONE, many(8, (16, 8), P()), {"all-gather": 1}, 1),
    "both sides": (TWO, many(16, (8, 8), P("d", "f")), {"all-to-all": 2}, 1),
    "layers": (ONE, {"w": ((8, 8, 4), P("x"))}, {}, 1),
    "stacked": (ONE, {"w": ((8, 8, 4), P(None, "x"))}, {"all-to-all": 2}, 1),
    "experts": (TWO, {"w": ((8, 8, 4), P("d", "f"))}, {"all-to-all": 2}, 1),
    "more than devices": (ONE, many(11, (8, 8), P("x")), {"all-to-all": 2}, 16 / 11),
    "fewer than devices": (
        ONE,
        many(3, (8, 8), P(None, "x")),
        {"all-to-all": 2},
        8 / 3,
    ),
    "a mix": (
        TWO,
        many(5, (8, 16), P("d", "f"))
        | {"t": ((3, 8, 16), P(None, None, ("d", "f"))), "u": ((16, 8), P("f"))}
        | {"r": ((8, 8), P()), "s": ((4, 8, 8), P("f"))},
        # Two shardings of 8x16, 16x8, and 8x8 with four layers on an axis and without.
        {"all-to-all": 6, "all-gather": 2},
        None,
    ),
}
MORE = ["layers", "stacked", "experts", "both sides", "a mix", "fewer than devices"]
RULES = {
    "soap": lambda **k: om.soap_precondition(
        refresh=2, preconditioner=om.SOAP(max_dim=8), **k
    ),
    "shampoo": lambda **k: om.shampoo_precondition(
        refresh=2, damping=1e-2, preconditioner=om.Shampoo(max_dim=8), **k
    ),
    "kl": lambda **k: om.kl_soap_precondition(
        refresh=2, preconditioner=om.KL(max_dim=8), **k
    ),
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
    counts = collections.Counter()
    for collective in hlo.collectives(text):
        assert "/exchange/" in collective.op_name
        counts[collective.kind] += collective.count
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
def test_equal_to_one_device_and_with_the_owners(name, rule, kind):
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
    # Each matrix is factorized by its owner alone.
    calls, alone = (hlo.custom_calls(t) for t in (text, single.as_text()))
    count = sum(math.prod(shape[:-2]) for shape, _ in leaves.values())
    most = {k: -(-count // 8) * n // count for k, n in alone.items()}
    assert any(alone) and (bound is None or calls == most)
    assert exchanges(text) == wanted
    if bound is None:
        return
    even = hlo.dot_flops(single.as_text()) / 8
    assert hlo.dot_flops(text) == pytest.approx(bound * even, rel=1e-9)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(whole.matrices))
    for device in jax.devices():
        found = bytes_on(device, state.matrices)
        assert found == pytest.approx(bound * total / 8, rel=1e-9)


# Tall, wide, per head, fused and cut by the owner, stacked; sharded and replicated.
UNEVEN = {
    "wide": ((15, 20), P(None, "f")),
    "tall": ((20, 15), P("f", None)),
    "heads": ((15, 2, 10), P(None, "d")),
    "fused": ((15, 40), P(None, ("d", "f"))),
    "three": ((3, 15, 15), P()),
    "layers": ((2, 3, 15, 15), P("d")),
}
LAYOUT = dict.fromkeys(UNEVEN) | {
    "heads": om.MatrixLayout(0, (1, 2)),
    "fused": om.MatrixLayout(split_outputs=(24, 16)),
}
ALL = {
    "soap": lambda **k: om.soap_precondition(
        preconditioner=om.SOAP(max_dim=15, stagger=True), **k
    ),
    "shampoo": lambda **k: om.shampoo_precondition(damping=1e-2, **k),
    "staggered": lambda **k: om.shampoo_precondition(
        damping=1e-2, preconditioner=om.Shampoo(stagger=True), **k
    ),
    "blocks": lambda **k: om.shampoo_precondition(
        damping=1e-2, preconditioner=om.Shampoo(stagger=True, block_size=10), **k
    ),
    "newton": lambda **k: om.shampoo_precondition(
        None, damping=0.1, preconditioner=om.Shampoo(root="newton"), **k
    ),
    "one-sided": lambda **k: om.shampoo_precondition(
        b2=None,
        damping=1e-2,
        preconditioner=om.Shampoo(exponents=(None, -0.5)),
        **k,
    ),
    "kl_soap": lambda **k: om.kl_soap_precondition(
        preconditioner=om.KL(max_dim=15), **k
    ),
    "kl_shampoo": lambda **k: om.kl_shampoo_precondition(
        preconditioner=om.KL(max_dim=15), **k
    ),
}


def mesh_of(devices):
    """A mesh with the axes of `TWO` over some of the devices."""
    sizes = {8: (2, 4), 4: (2, 2), 2: (1, 2), 1: (1, 1)}[devices]
    among = jax.devices()[:devices]
    return jax.make_mesh(sizes, ("d", "f"), (AxisType.Explicit,) * 2, devices=among)


def laid_out(leaves):
    return {k: LAYOUT[k] for k in leaves}


def on_a_mesh(make, leaves, devices, stack_size=None):
    """The mesh, the transformation, and how gradients get there."""
    mesh = mesh_of(devices)
    shardings = {k: NamedSharding(mesh, spec) for k, (_, spec) in leaves.items()}
    placement = om.Placement(shardings, stack_size)
    tx = make(refresh=2, layout=laid_out(leaves), placement=placement)
    return mesh, tx, lambda t: jax.device_put(gradients(leaves, t), shardings)


@pytest.mark.parametrize(
    "rule, stack_size",
    [
        pytest.param("staggered", 2, marks=SLOW),
        *(pytest.param(rule, None, marks=SLOW) for rule in ALL),
    ],
)
def test_uneven_leaves_equal_one_device(rule, stack_size):
    want = on_one(ALL[rule](refresh=2, layout=LAYOUT), UNEVEN)[1]
    mesh, tx, grads = on_a_mesh(ALL[rule], UNEVEN, 8, stack_size)
    with jax.set_mesh(mesh):
        state, update = tx.init(grads(0)), jax.jit(tx.update)
        for t in range(STEPS):
            got, state = update(grads(t), state)
            chex.assert_trees_all_close(got, want[t], atol=2e-5, rtol=2e-4)
        assert update._cache_size() == 1


SAVED = {k: UNEVEN[k] for k in ("fused", "three", "layers")}


@pytest.mark.parametrize(
    "rule, devices, leaves",
    [
        ("staggered", (8, 4, 1), {k: SAVED[k] for k in ("three", "layers")}),
        *(
            pytest.param(rule, (8, 4, 2, 1), SAVED, marks=SLOW)
            for rule in ("soap", "blocks", "kl_soap")
        ),
    ],
)
def test_saved_state_goes_on_with_other_devices(rule, devices, leaves, tmp_path):
    want = on_one(ALL[rule](refresh=2, layout=laid_out(leaves)), leaves)[1]
    mesh, tx, grads = on_a_mesh(ALL[rule], leaves, 8)
    with jax.set_mesh(mesh):
        state, update = tx.init(grads(0)), jax.jit(tx.update)
        for t in range(3):
            _, state = update(grads(t), state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        # Without a target: nested dicts, with the shapes that were saved.
        saved = checkpointer.restore(tmp_path / "state")
    for count in devices:
        mesh, tx, grads = on_a_mesh(ALL[rule], leaves, count)
        with jax.set_mesh(mesh):
            state = om.relay_state(saved, tx.init(grads(0)))
            update = jax.jit(tx.update)
            for t in range(3, STEPS):
                got, state = update(grads(t), state)
                chex.assert_trees_all_close(got, want[t], atol=2e-5, rtol=2e-4)
            assert update._cache_size() == 1
    # And without a mesh.
    tx = ALL[rule](refresh=2, layout=laid_out(leaves))
    state = om.relay_state(saved, tx.init(gradients(leaves, 0)))
    got, _ = jax.jit(tx.update)(gradients(leaves, 3), state)
    chex.assert_trees_all_close(got, want[3], atol=2e-5, rtol=2e-4)


def test_moments_in_8_bits_move_to_another_mesh():
    tx = om.soap_precondition(mu_dtype="float8_e4m3fn")
    grads = [
        {f"w{i}": problems.normal((32, 32), 3 * t + i) for i in range(3)}
        for t in range(3)
    ]
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Explicit,))
    place = NamedSharding(mesh, P("x", None))
    with jax.set_mesh(mesh):
        spread = [jax.device_put(g, place) for g in grads]
        state, update = tx.init(spread[0]), jax.jit(tx.update)
        for g in spread[:2]:
            _, state = update(g, state)
        want, _ = update(spread[2], state)
    moved = om.relay_state(jax.device_get(state), tx.init(grads[0]))
    momentum = moved.matrices["32x32"].state.momentum
    assert momentum.codes.dtype == "float8_e4m3fn" and len(momentum.codes) == 3
    got, _ = jax.jit(tx.update)(grads[2], moved)
    chex.assert_trees_all_close(got, jax.device_get(want), rtol=1e-4, atol=1e-5)


def test_relaying_says_what_does_not_fit():
    tx, params = om.soap_precondition(), {"w": problems.normal((4, 8))}
    state = tx.init(params)
    larger = tx.init(params | {"x": problems.normal((4, 8))})
    for saved, like, counts in ((state, larger, "1.*2"), (larger, state, "2.*1")):
        with pytest.raises(ValueError, match=rf"(?s){counts}") as raised:
            om.relay_state(saved, like)
        assert "of the shape of 'matrices/4x8'" in str(raised.value)
    narrow = om.soap_precondition(preconditioner=om.SOAP(max_dim=4))
    with pytest.raises(ValueError, match=r"no leaf 'matrices/4x8/state/right"):
        om.relay_state(narrow.init(params), state)
    adam = optax.scale_by_adam().init(params)
    other = optax.scale_by_adam().init({"w": problems.normal((8, 4))})
    with pytest.raises(ValueError, match=r"shape \(4, 8\) at 'mu/w'.*\(8, 4\)"):
        om.relay_state(adam, other)


def test_relaying_keeps_other_kinds_of_leaves():
    noise = optax.add_noise(0.1, 0.5, key=jax.random.key(3))
    tx = optax.chain(noise, om.soap_precondition())
    params = {"w": problems.normal((4, 8))}
    _, saved = tx.update(params, tx.init(params))
    again = om.relay_state(saved, tx.init(params))
    chex.assert_trees_all_equal(
        jax.random.key_data(again[0].rng_key), jax.random.key_data(saved[0].rng_key)
    )
    host = {"numpy": np.arange(3), "python": 2.5}
    like = {"numpy": np.zeros(3, int), "python": 0.0}
    chex.assert_trees_all_equal(om.relay_state(host, like), host)


RULE = {
    "soap": om.SOAP(max_dim=6),
    "shampoo": om.Shampoo(max_dim=20),
    "one-sided": om.Shampoo(exponents=(None, -0.5), max_dim=20),
    "kl": om.KL(max_dim=20),
    "kl left": om.KL(max_dim=5),
}


@pytest.mark.parametrize("rule", RULE)
@pytest.mark.parametrize("m, n", [(6, 6), (6, 4), (4, 6), (5, 20)])
def test_rules_say_what_an_update_multiplies(rule, m, n):
    scalars = collections.defaultdict(lambda: jnp.asarray(0.5), count=jnp.asarray(3))
    rule = _transforms.rule_of(RULE[rule])
    state = rule.init(m, n, "float32")

    def step(x, state):
        y, state = rule.observe(x, state, scalars)
        return rule.apply(y, state), state

    text = jax.jit(step).lower(jnp.ones((m, n)), state).compile().as_text()
    assert hlo.dot_flops(text) == rule.flops(m, n)


@pytest.mark.parametrize("settings", [om.SOAP(max_dim=8), om.Shampoo(max_dim=8)])
def test_described_as_compiled(settings):
    make = {om.SOAP: om.soap_precondition, om.Shampoo: om.shampoo_precondition}
    leaves = many(11, (8, 16), P("x", None))
    mesh = jax.make_mesh(*ONE, (AxisType.Explicit,))
    # Refreshed so rarely that the products of a refresh are in no branch.
    tx = make[type(settings)](preconditioner=settings)
    with jax.set_mesh(mesh):
        shardings = {k: NamedSharding(mesh, spec) for k, (_, spec) in leaves.items()}
        params = jax.device_put(gradients(leaves, 0), shardings)
        state = tx.init(params)
        text = jax.jit(tx.update).lower(params, state).compile().as_text()
    total = om.describe_placement(
        params, settings, backend="cpu", routing="matrix"
    ).totals
    moved = sum(collective.bytes for collective in hlo.collectives(text))
    assert moved == total["exchanged_bytes"]
    assert exchanges(text) == {"all-to-all": total["exchanges"]}
    rule = _transforms.rule_of(settings)
    assert total["flops"] == 2 * rule.flops(8, 16)
    states = {k: v.state for k, v in state.matrices.items()}
    assert bytes_on(jax.devices()[0], states) == total["state_bytes"]


def test_refreshes_are_shared_and_staggered():
    leaves = many(16, (8, 8), P("x"))
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Explicit,))
    tx = om.soap_precondition(refresh=2, preconditioner=om.SOAP(stagger=True))
    with jax.set_mesh(mesh):
        shardings = {k: NamedSharding(mesh, spec) for k, (_, spec) in leaves.items()}
        params = jax.device_put(gradients(leaves, 0), shardings)
        state, update = tx.init(params), jax.jit(tx.update)
        _, state = update(params, state)
        seen = []
        for t in range(1, 5):
            before = np.asarray(state.matrices["8x8"].state.left.basis)
            grads = jax.device_put(gradients(leaves, t), shardings)
            _, state = update(grads, state)
            after = np.asarray(state.matrices["8x8"].state.left.basis)
            moved = np.abs(after - before).max(axis=(1, 2)) > 0
            seen.append(set(np.flatnonzero(moved)))
    # Two on every device: one of them in each update, and in turns.
    assert [len(moved) for moved in seen] == [8, 8, 8, 8]
    assert all({i // 2 for i in moved} == set(range(8)) for moved in seen)
    assert seen[0] == seen[2] != seen[1] == seen[3]


def test_blocks_of_a_whole_side_are_spread_like_matrices():
    leaves = {"w": ((16, 16), P())}
    want = on_one(
        om.soap_precondition(refresh=2, preconditioner=om.SOAP(block_size=4)), leaves
    )[1]
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Explicit,))
    tx = om.soap_precondition(refresh=2, preconditioner=om.SOAP(block_size=4))
    with jax.set_mesh(mesh):
        params = jax.device_put(gradients(leaves, 0), P())
        state, update = tx.init(params), jax.jit(tx.update)
        for t in range(STEPS):
            grads = jax.device_put(gradients(leaves, t), P())
            got, state = update(grads, state)
            chex.assert_trees_all_close(got, want[t], atol=1e-5, rtol=1e-4)
    # Sixteen blocks, two on each device.
    (shard, *_) = state.matrices["4x4"].state.momentum.addressable_shards
    assert shard.data.shape == (2, 4, 4)


def test_state_for_another_mesh_raises():
    leaves = many(3, (8, 8), P("x"))
    tx = om.soap_precondition()
    state = tx.init(gradients(leaves, 0))
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Explicit,))
    with jax.set_mesh(mesh):
        grads = jax.device_put(gradients(leaves, 0), P("x"))
        match = r"'8x8': 3.*need .*'8x8': 8.*`placement`"
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
        om.soap_precondition: 2 * m * n + (3 * (m * m + n * n) + m + n) // 2,
        om.shampoo_precondition: m * n + m * (m + 1) + n * (n + 1),
        om.kl_soap_precondition: 2 * m * n + 3 * (m * m + n * n + m + n) // 2,
        om.kl_shampoo_precondition: m * n + 3 * (m * m + n * n + m + n) // 2,
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
    """Compiles for one and a half matrices per device, beside one device."""
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
    assert exchanges(text) == {"all-to-all": 2}
    assert 3 * hlo.dot_flops(text) * devices == 4 * hlo.dot_flops(single)
    return devices


@pytest.mark.slow
def test_64_and_256_devices_keep_the_bounds():
    assert problems.printed_by(MANY).split() == ["64", "256"]
