"""What `benchmarks.step_time` compares and writes down; its timings are not tested."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import optax_matrix as om
from benchmarks import step_time

pytestmark = pytest.mark.slow

TINY = step_time.ShapeSet(
    (
        step_time.Kernel("qk", 24, (24, 8)),
        step_time.Kernel("down", 8, (24,)),
    ),
    layers=1,
)


@pytest.mark.parametrize(
    ("name", "matrices", "elements"),
    [
        ("gpt-384", 36, 6 * 12 * 384**2),
        ("gpt-768", 72, 12 * 12 * 768**2),
        ("fused-gqa", 84, 12 * 768 * (1280 + 768 + 3 * 2048)),
        ("many-224", 224, 32 * 16 * 64**2),
        ("many-700", 700, 100 * 16 * 64**2),
    ],
)
def test_the_sets_are_the_hidden_matrices(
    name: str, matrices: int, elements: int
) -> None:
    shapes = step_time.SETS[name].separate().values()
    assert len(shapes) == matrices
    assert sum(math.prod(shape) for shape in shapes) == elements


def test_fused_kernels_are_split_into_the_separate_matrices() -> None:
    shapes = step_time.SETS["fused-gqa"]
    layouts = {k.name: shapes.layout(f"03.{k.name}", None) for k in shapes.kernels}
    assert layouts == {
        "qkv": om.MatrixLayout(split_outputs=(768, 256, 256)),
        "o": True,
        "gate_up": om.MatrixLayout(split_outputs=(2048, 2048)),
        "down": True,
    }


def test_every_leaf_brings_the_products_of_a_step() -> None:
    assert step_time.step_products(step_time.gpt(8, 3)) == {
        (8, 8, 8): (18, 3 * 12 + 6),
        (8, 32, 8): (6, 6),
        (8, 8, 32): (6, 6),
    }


def test_a_repeat_runs_everything_once_in_a_rotated_order() -> None:
    calls: list[str] = []
    programs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = step_time.interleave(programs, 2)
    assert "".join(calls) == "bcacababcbca"
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys(
        "abc", 2
    )


def test_the_muons_make_the_same_updates() -> None:
    grads = step_time.random_leaves(TINY.separate(), 0, 1.0, "float32")
    found, _ = step_time.contenders(TINY, "float32")

    def updates(name: str) -> Any:
        leaves = TINY.fuse(grads) if found[name].fused else grads
        tx = found[name].tx
        return jax.jit(lambda x: tx.update(x, tx.init(x), x)[0])(leaves)

    expected = updates(step_time.PEER)
    for name in ("ours", step_time.ROLLFAST):
        if name in found:
            for leaf, other in zip(
                jax.tree.leaves(updates(name)), jax.tree.leaves(expected), strict=True
            ):
                np.testing.assert_allclose(leaf, other, atol=2e-6)
    fused = TINY.fuse(expected)
    for name, leaf in updates("ours, fused").items():
        np.testing.assert_allclose(leaf, fused[name], atol=2e-6)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    path = tmp_path_factory.mktemp("step_time") / "tiny.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(step_time.SETS, "tiny", TINY)
        patch.setattr(step_time, "COMPILATIONS", 2)
        patch.setattr(sys, "argv", ["step_time", "--sets", "tiny"])
        patch.setitem(sys.modules, "rollfast", None)
        return step_time.run(["tiny"], 3, 0, "float32", path), path


def test_the_file_says_what_was_measured(written: tuple[dict[str, Any], Path]) -> None:
    result, _ = written
    assert result["command"] == "python -m benchmarks.step_time --sets tiny"
    environment = result["environment"]
    assert {"machine", "backend", "commit", "device_kind"} <= environment.keys()
    assert environment["versions"]["optax"] == optax.__version__
    assert result["seeds"] == {"gradients": 0, "parameters": 1}
    measured = result["sets"]["tiny"]
    assert list(measured["left_out"]) == [step_time.ROLLFAST]
    rows = measured["contenders"]
    assert list(rows) == [
        step_time.PEER,
        "ours",
        "ours, plain",
        "ours, Halley",
        "ours, stacks of 1",
        "ours, stacks of 4",
        "ours, one stack",
        "ours, fused",
        "optax.adamw",
    ]
    for name, row in rows.items():
        assert row["leaves"] == (2 if name == "ours, fused" else 3)
        assert len(row["raw"]["seconds"]) == 3
        assert len(row["raw"]["lowering_seconds"]) == 2
        assert len(row["raw"]["compile_seconds"]) == 2
        shares = (
            row["share_at_matmul_peak"],
            row["factor_seconds"] / row["median_seconds"],
        )
        assert sum(shares) + row["rest"] == pytest.approx(1)
        assert (row["factor_seconds"] > 0) == (name == "ours, Halley")
        assert row["flops"] > 0 and row["temp_bytes"] >= 0
    assert rows[step_time.PEER]["speedup"] == {"q1": 1, "median": 1, "q3": 1}
    assert all(len(m["raw_seconds"]) == 3 for m in measured["matmul"].values())


def test_dot_flops_are_those_of_the_algorithms(
    written: tuple[dict[str, Any], Path],
) -> None:
    rows = written[0]["sets"]["tiny"]["contenders"]
    sides = [sorted(shape) for shape in TINY.separate().values()]
    plain = sum(5 * (4 * m * m * n + 2 * m**3) for m, n in sides)
    assert rows[step_time.PEER]["dot_flops"] == plain
    assert rows["ours, plain"]["dot_flops"] == plain
    assert rows["ours"]["dot_flops"] == rows["ours, fused"]["dot_flops"]
    assert rows["ours"]["dot_flops"] < plain  # two of three by the Gram matrix
    assert rows["optax.adamw"]["dot_flops"] == 0
    assert rows["optax.adamw"]["rest"] == 1


def test_a_probe_has_one_product_a_leaf() -> None:
    products = step_time.probe((4, 8, 16), 3, 0, "bfloat16")()
    assert {x.shape for x in products.values()} == {(4, 16)} and len(products) == 3


def test_the_tables_have_a_row_for_each_contender(
    written: tuple[dict[str, Any], Path],
) -> None:
    _, steps, compilation, left_out, *_ = step_time.table(written[1]).split("\n\n")
    for text, columns in ((steps, 7), (compilation, 5)):
        rows = text.splitlines()
        assert len(rows) == 2 + len(written[0]["sets"]["tiny"]["contenders"])
        assert {row.count("|") for row in rows} == {columns + 1}
        assert "1.00 (1.00 to 1.00)" in rows[2]
    assert "rollfast.muon is left out" in left_out


def test_compilation_is_compared_within_each_repeat(tmp_path: Path) -> None:
    peer = {"lowering_seconds": [1.0, 2.0, 1.0], "compile_seconds": [8.0, 2.0, 4.0]}
    ours = {"lowering_seconds": [2.0, 1.0, 1.0], "compile_seconds": [4.0, 3.0, 4.0]}
    contenders = {
        name: {
            **{"speedup": dict.fromkeys(("q1", "median", "q3"), 1.0), "raw": raw},
            **{"median_seconds": 1.0, "dot_flops": None, "temp_bytes": None},
        }
        for name, raw in ((step_time.PEER, peer), ("muon", ours))
    }
    measured = {"mix_flops_per_second": 1e9, "matrices": 3, "left_out": {}}
    path = tmp_path / "made_up.json"
    path.write_text(json.dumps({"sets": {"x": {**measured, "contenders": contenders}}}))
    row = "| muon | 1.00 | 1.00 (0.50 to 2.00) | 4.00 | 1.00 (0.50 to 1.50) |"
    assert row in step_time.table(path)


def test_sets_of_many_matrices_compare_the_family() -> None:
    assert all(s.family == n.startswith("many") for n, s in step_time.SETS.items())
    rows = step_time.measure(step_time.many(4, 8, 1), 1, 0, "float32")["contenders"]
    assert list(rows) == [step_time.PEER, *step_time.FAMILY]
    for name, row in rows.items():
        assert row["leaves"] == 7
        assert (row["dot_flops"] > 0) == (name != "adamh")
        for stage in ("lowering_seconds", "compile_seconds"):
            assert len(row["raw"][stage]) == 1 and row["raw"][stage][0] > 0
