"""What `benchmarks.collectives` compiles, predicts and writes down."""

import functools
import itertools
import math
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType

from benchmarks import collectives

pytestmark = pytest.mark.slow
STACKED = "stack of 8, by inputs"  # few leaves: what takes time is compiling


class Sharded(NamedTuple):
    reduction_axis: int
    output_axis: int
    sharding: Any


def stand_in() -> types.ModuleType:
    """Optax's muon as if it were MaxText's, which the tests cannot install."""

    def muon(learning_rate: float, *, muon_weight_dimension_numbers: dict[str, Any]):
        on_mesh = not jax.sharding.get_abstract_mesh().empty
        for numbers in muon_weight_dimension_numbers.values():
            assert isinstance(numbers.sharding, jax.NamedSharding) == on_mesh
        numbers = {
            name: optax.contrib.MuonDimensionNumbers(*numbers[:2])
            for name, numbers in muon_weight_dimension_numbers.items()
        }
        return optax.contrib.muon(learning_rate, muon_weight_dimension_numbers=numbers)

    module: Any = types.ModuleType(collectives.MAXTEXT_MODULE)
    module.muon, module.ShardedMuonDimensionNumbers = muon, Sharded
    return module


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    path = tmp_path_factory.mktemp("collectives") / "small.json"
    case = collectives.cases(16)[STACKED]
    few = {name: case.leaves[name] for name in ("q", "up", "down")}
    small = {STACKED: case._replace(leaves=few)}
    model = collectives.MODELS["7B"]._replace(layers=8, devices=(8,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "cases", lambda width: small)
        patch.setattr(collectives, "MODELS", {"small": model})
        patch.setattr(sys, "argv", ["collectives", "--out", "small.json"])
        patch.setitem(sys.modules, collectives.MAXTEXT_MODULE, stand_in())
        return collectives.run(path), path


def check(row: dict[str, Any], costs: dict[str, float]) -> None:
    """The formulas say what the program does, and nothing but exchanges is in it."""
    assert set(row["collectives"]) == {"all-to-all"}
    assert sum(row["collectives"].values()) == costs["exchanges"]
    assert row["received_bytes"] == costs["exchanged_bytes"]
    assert row["dot_flops"] == costs["program_flops"] >= costs["flops"]


def test_ours_is_predicted_for_both_kinds_of_axes(
    written: tuple[dict[str, Any], Path],
) -> None:
    case = written[0]["compiled"][STACKED]
    ours = [row for row in case["rows"] if row["optimizer"] == collectives.OURS]
    assert [row["axes"] for row in ours] == ["Explicit", "Auto"]
    for row in ours:
        check(row, case["predicted"])
        assert row["flops_over_even"] == 1
        assert row["updates_sharded_as_parameters"] and row["state_sharded_as_before"]


@pytest.mark.parametrize(
    "name",
    [
        "FSDP on inputs",
        "FSDP on inputs, 3 layers",
        "stack of 12, by inputs",
        "scan axis 1 of 12, by inputs",
    ],
)
def test_ours_exchanges_matrices_of_one_shape_together(name: str) -> None:
    case = collectives.cases(16)[name]
    row = collectives.compiled(collectives.OURS, case, AxisType.Auto)
    check(row, collectives.predict(case))
    assert row["collectives"]["all-to-all"] < len(case.leaves) * 2


def test_optax_needs_axes_that_the_compiler_may_choose(
    written: tuple[dict[str, Any], Path],
) -> None:
    rows = written[0]["compiled"][STACKED]["rows"]
    explicit, auto = (row for row in rows if row["optimizer"] == collectives.PEER)
    assert explicit["error"].startswith("ShardingTypeError: ")
    assert "\n" not in explicit["error"]
    assert sum(auto["collectives"].values()) > 30
    assert auto["flops_over_even"] > 1


def test_every_case_is_its_model_and_divides() -> None:
    for name, case in collectives.cases(16).items():
        matrices, elements = 0, 0
        inputs, outputs = case.axes
        for shape, _ in case.leaves.values():
            one = shape[inputs] * shape[outputs]
            matrices += math.prod(shape) // one
            elements += math.prod(shape)
            assert one in (16**2, 4 * 16**2)
        if name.startswith("MoE"):
            assert (matrices, elements) == (64, 64 * 4 * 16**2)
        else:
            layers = {"3 layers": 3, "of 8": 8, "of 12": 12}
            (count,) = [n for key, n in layers.items() if key in name] or [4]
            assert (matrices, elements) == (6 * count, count * 12 * 16**2)
        assert collectives.predict(case)["even_flops"] > 0


def test_replicated_leaves_keep_the_peer_whole_on_every_device() -> None:
    leaves: collectives.Shapes = {"w": ((16, 64), P())}
    case = collectives.Case(((8,), ("x",)), leaves)
    one = collectives.compiled(collectives.PEER, case, None)
    row = collectives.compiled(collectives.PEER, case, AxisType.Explicit)
    assert row["dot_flops"] == one["dot_flops"] and not row["collectives"]


def test_maxtext_is_left_out_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, collectives.MAXTEXT_MODULE, None)
    names, left_out = collectives.contenders()
    assert names == [collectives.PEER, collectives.OURS]
    assert left_out[collectives.MAXTEXT].startswith("ModuleNotFoundError: ")


@pytest.mark.parametrize("name", [STACKED, "scan axis 1 of 8, by inputs"])
def test_all_make_the_same_updates(name: str) -> None:
    case = collectives.cases(4)[name]
    keys = jax.random.split(jax.random.key(0), len(case.leaves))
    grads = {
        leaf: jax.random.normal(key, shape)
        for key, (leaf, (shape, _)) in zip(keys, case.leaves.items(), strict=True)
    }
    params = {k: jax.ShapeDtypeStruct(g.shape, g.dtype) for k, g in grads.items()}
    expected, *others = (
        jax.jit(lambda x, tx=tx: tx.update(x, tx.init(x), x)[0])(grads)
        for tx in (
            collectives.optimizer(optimizer, case, params)
            for optimizer in collectives.contenders()[0]
        )
    )
    for updates in others:
        for leaf, update in updates.items():
            np.testing.assert_allclose(update, expected[leaf], atol=2e-6)


def test_maxtext_runs_its_collectives_in_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maxtext = pytest.importorskip(collectives.MAXTEXT_MODULE)
    real = maxtext.muon
    case = collectives.Case(((8,), ("x",)), {"w": ((16, 64), P("x", None))})

    def count(steps: int) -> int:
        muon = functools.partial(real, ns_steps=steps)
        monkeypatch.setattr(maxtext, "muon", muon)
        row = collectives.compiled(collectives.MAXTEXT, case, AxisType.Explicit)
        return sum(row["collectives"].values())

    assert [count(steps) - count(0) for steps in (1, 2, 5)] == [3, 6, 15]


def test_maxtext_needs_stacks_that_divide_on_explicit_axes() -> None:
    pytest.importorskip(collectives.MAXTEXT_MODULE)
    rows = [
        collectives.compiled(collectives.MAXTEXT, collectives.cases(16)[name], kind)
        for kind in (AxisType.Explicit, AxisType.Auto)
        for name in (f"stack of {n}, by inputs" for n in (8, 12))
    ]
    assert ["error" in row for row in rows] == [False, True, False, False]
    # Twelve matrices take as much room as sixteen.
    assert rows[3]["dot_flops"] == 2 * rows[2]["dot_flops"]


@pytest.mark.parametrize(
    ("name", "elements", "active"),
    [("7B", 6.5e9, 6.5e9), ("70B", 69e9, 69e9), ("1T MoE", 1.04e12, 27.7e9)],
)
def test_the_models_are_of_their_sizes(
    name: str, elements: float, active: float
) -> None:
    model = collectives.MODELS[name]
    found = model.layers * sum(map(math.prod, model.matrices.values()))
    assert found == pytest.approx(elements, rel=0.02)
    assert model.step_flops() == pytest.approx(6 * active * 4e6, rel=0.02)


def test_a_model_is_predicted(written: tuple[dict[str, Any], Path]) -> None:
    rows = written[0]["predicted"]["small"]
    found = {(row["method"], row["dtype"]): row for row in rows}
    methods, dtypes = ("newton_schulz", "halley"), ("float32", "bfloat16")
    assert list(found) == list(itertools.product(methods, dtypes))
    wide, narrow = (found["newton_schulz", dtype] for dtype in dtypes)
    assert wide["exchanged_bytes"] == 2 * narrow["exchanged_bytes"]
    parameters = 8 * (4 * 4096**2 + 3 * 4096 * 11008)
    for row in rows:
        assert row["devices"] == 8 and row["sharding"] == "FSDP 8"
        assert row["flops_over_even"] == 1
        assert row["exchanged_bytes"] >= row["least_bytes"] > 0
        share = row["flops"] / (6 * parameters * 4e6 / 8)
        assert row["share_of_step"] == pytest.approx(share)


SMALL = {"up": (16, 64), "down": (64, 16), "q": (16, 16)}


def test_optax_of_a_model_is_a_layer_times_the_layers() -> None:
    model = collectives.MODELS["7B"]._replace(matrices=SMALL, devices=(8,))
    one, three = (
        collectives.compile_peer(collectives.PEER, model._replace(layers=layers))[0]
        for layers in (1, 3)
    )
    _, mesh, spec = model.shard(8)
    leaves = {f"{n}{i}": (s, spec(n)) for i in range(3) for n, s in SMALL.items()}
    whole = collectives.compiled(
        collectives.PEER, collectives.Case(mesh, leaves), AxisType.Auto
    )
    for key in ("received_bytes", "dot_flops"):
        assert three[key] == whole[key]
    # XLA combines small collectives.
    for kind, count in whole["collectives"].items():
        assert one["collectives"][kind] <= count <= three["collectives"][kind]
    assert three["dot_flops"] == 3 * one["dot_flops"]
    assert three["flops_over_even"] == one["flops_over_even"] >= 1
    share = three["dot_flops"] * 8 / (6 * 3 * sum(map(math.prod, SMALL.values())) * 4e6)
    assert three["share_of_step"] == pytest.approx(share)


def test_maxtext_of_a_model_is_compiled_in_stacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, collectives.MAXTEXT_MODULE, stand_in())
    model = collectives.MODELS["7B"]._replace(layers=3, matrices=SMALL, devices=(8,))
    seen: list[collectives.Case] = []
    real = collectives.compiled

    def compiled(name: str, case: collectives.Case, kind: AxisType | None) -> Any:
        seen.append(case)
        return real(name, case, kind)

    monkeypatch.setattr(collectives, "compiled", compiled)
    (row,) = collectives.compile_peer(collectives.MAXTEXT, model)
    assert row["compiled_times"] == 1 and row["sharding"] == "FSDP 8"
    assert row["optimizer"] == collectives.MAXTEXT
    _, _, spec = model.shard(8)
    assert seen[-1].leaves == {
        name: ((3, *shape), P(None, *spec(name))) for name, shape in SMALL.items()
    }
    # Optax's muon, which is compiled here, repeats work on several devices.
    assert row["flops_over_even"] >= 1
    parameters = 3 * sum(map(math.prod, SMALL.values()))
    share = row["dot_flops"] * 8 / (6 * parameters * 4e6)
    assert row["share_of_step"] == pytest.approx(share)


def test_the_tables_have_a_row_for_everything(
    written: tuple[dict[str, Any], Path],
) -> None:
    first, second = collectives.table(written[1]).split("\n\n")
    for text, rows in ((first, 2 * 2 + 1), (second, 2 + 2)):
        lines = text.splitlines()
        assert len(lines) == 2 + rows
        assert {line.count("|") for line in lines} == {10 + 1}
    assert first.count("raises ShardingTypeError") == 2
    assert first.count("| both | ours |") == 1
    for name, count in ((collectives.PEER, "≤ "), (collectives.MAXTEXT, "")):
        (line,) = [row for row in second.splitlines() if f"| {name} |" in row]
        (row,) = [
            row
            for row in written[0]["peers_of_models"]["small"]
            if row["optimizer"] == name
        ]
        assert f"| {count}{sum(row['collectives'].values()):,} |" in line
        assert f"| {row['share_of_step']:.1%} |" in line
