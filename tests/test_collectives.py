"""What `benchmarks.collectives` compiles, predicts and writes down."""

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from jax import P
from jax.sharding import AxisType

from benchmarks import collectives

pytestmark = pytest.mark.slow
STACKED = "stacked, by inputs"  # few leaves: what takes time is compiling


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
        return collectives.run(path), path


def test_ours_takes_two_exchanges_a_shape(written: tuple[dict[str, Any], Path]) -> None:
    case = written[0]["compiled"][STACKED]
    ours = [row for row in case["rows"] if row["optimizer"] == collectives.OURS]
    assert [row["axes"] for row in ours] == ["Explicit", "Auto"]
    for row in ours:
        assert row["collectives"] == {"all-to-all": 4}  # 16 × 16 and 16 × 64
        assert row["flops_over_even"] == 1
        assert row["updates_lie_as_parameters"] and row["state_lies_as_before"]
        # The formulas of the second part are right about the first.
        assert row["received_bytes"] == case["predicted"]["exchanged_bytes"]
        assert row["dot_flops"] == case["predicted"]["flops"]


def test_leaves_of_one_matrix_go_together() -> None:
    case = collectives.cases(16)["FSDP on inputs"]
    row = collectives.compiled(collectives.OURS, case, AxisType.Auto)
    costs = collectives.predict(case)
    assert row["collectives"] == {"all-to-all": 4}
    assert row["received_bytes"] == costs["exchanged_bytes"]
    assert row["dot_flops"] == costs["flops"] == costs["even_flops"]


def test_the_peer_needs_axes_that_the_compiler_may_choose(
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
        for shape, _ in case.leaves.values():
            matrices += math.prod(shape[:-2])
            elements += math.prod(shape)
        layers = 8 if name.startswith("stacked") else 4
        if name == "MoE":
            assert (matrices, elements) == (64, 64 * 4 * 16**2)
        else:
            assert (matrices, elements) == (6 * layers, layers * 12 * 16**2)
        assert collectives.predict(case)["even_flops"] > 0


def test_replicated_leaves_keep_the_peer_whole_on_every_device() -> None:
    leaves: collectives.Shapes = {"w": ((16, 64), P())}
    case = collectives.Case(((8,), ("x",)), leaves)
    one = collectives.compiled(collectives.PEER, case, None)
    row = collectives.compiled(collectives.PEER, case, AxisType.Explicit)
    assert row["dot_flops"] == one["dot_flops"] and not row["collectives"]


@pytest.mark.parametrize(
    ("name", "elements"),
    [("7B", 6.5e9), ("70B", 69e9), ("1T MoE", 1.04e12)],
)
def test_the_models_are_of_their_sizes(name: str, elements: float) -> None:
    model = collectives.MODELS[name]
    found = model.layers * sum(map(math.prod, model.matrices.values()))
    assert found == pytest.approx(elements, rel=0.02)


def test_a_model_is_predicted(written: tuple[dict[str, Any], Path]) -> None:
    rows = written[0]["predicted"]["small"]
    found = {(r["method"], r["dtype"], r["flops_per_byte"]): r for r in rows}
    methods, dtypes, worths = (
        ("newton_schulz", "halley"),
        ("float32", "bfloat16"),
        (0, 8000),
    )
    assert list(found) == list(itertools.product(methods, dtypes, worths))
    wide, narrow = (found["newton_schulz", dtype, 0] for dtype in dtypes)
    assert wide["exchanged_bytes"] == 2 * narrow["exchanged_bytes"]
    for row in rows:
        assert row["devices"] == 8 and row["sharding"] == "FSDP 8"
        assert row["flops_over_even"] >= 1
        assert row["flops_over_even"] <= 1.1 or row["flops_per_byte"]
        assert row["exchanged_bytes"] >= row["least_bytes"] > 0


def test_the_peer_of_a_model_is_a_layer_times_the_layers() -> None:
    matrices = {"up": (16, 64), "down": (64, 16), "q": (16, 16)}
    model = collectives.MODELS["7B"]._replace(matrices=matrices, devices=(8,))
    one, three = (
        collectives.compile_peer(model._replace(layers=layers))[0] for layers in (1, 3)
    )
    _, mesh, spec = model.lie(8)
    leaves = {f"{n}{i}": (s, spec(n)) for i in range(3) for n, s in matrices.items()}
    whole = collectives.compiled(
        collectives.PEER, collectives.Case(mesh, leaves), AxisType.Auto
    )
    for key in ("received_bytes", "dot_flops"):
        assert three[key] == whole[key]
    # XLA combines what is small.
    for kind, count in whole["collectives"].items():
        assert one["collectives"][kind] <= count <= three["collectives"][kind]
    assert three["dot_flops"] == 3 * one["dot_flops"]
    assert three["flops_over_even"] == one["flops_over_even"] >= 1


def test_the_tables_have_a_row_for_everything(
    written: tuple[dict[str, Any], Path],
) -> None:
    first, second = collectives.table(written[1]).split("\n\n")
    for text, rows, cells in ((first, 3, 10), (second, 1 + 4, 13)):
        lines = text.splitlines()
        assert len(lines) == 2 + rows
        assert {line.count("|") for line in lines} == {cells + 1}
    assert "raises ShardingTypeError" in first
    assert "| 4 all-to-all |" in first
