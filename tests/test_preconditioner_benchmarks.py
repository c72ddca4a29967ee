"""What the benchmarks of preconditioners measure and print; no timing is tested."""

import json

import pytest

from benchmarks import preconditioners, step_time

TINY = step_time.ShapeSet((step_time.Kernel("up", 6, (8,)),), layers=2)


@pytest.mark.slow
def test_memory_is_that_of_the_formulas_by_optimizer_and_dtype():
    found = preconditioners.memory("tiny")
    # Numbers of a 128×128 matrix: Muon's momentum; SOAP's two moments and two bases,
    # and its two statistics, each a packed triangle.
    square, triangle = 128 * 128, 128 * 129 // 2
    expected = {
        "muon": 4 * square,
        "soap": 4 * (4 * square + 2 * triangle),
        "soap, both in bfloat16": 2 * (4 * square + 2 * triangle),
    }
    for name, size in expected.items():
        entry = found[name]["kinds"]["attn/q/kernel"]
        counters = entry["state"] / entry["leaves"] - size
        assert 0 <= counters < 32


@pytest.mark.slow
def test_every_place_of_a_cycle_is_measured(tmp_path):
    measured = preconditioners.measure(TINY, cycles=2, cycle=10, refreshes=[1, 10])
    rows = measured["rows"]
    assert rows["soap, refresh 1"]["slowest_over_median"] == 1
    assert len(rows["soap, refresh 10"]["seconds_by_place"]) == 10
    assert rows["optax.adamw"]["over_adamw"] == rows["muon"]["over_muon"] == 1
    # Adam's two moments and Muon's one, in float32, and the counts.
    size = 2 * 6 * 8 * 4
    assert rows["optax.adamw"]["state_bytes"] - 2 * size in range(16)
    assert rows["muon"]["state_bytes"] - size in range(16)
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"sets": {"tiny": measured}}))
    lines = preconditioners.table(path).splitlines()
    assert len(lines) == 4 + len(rows)
