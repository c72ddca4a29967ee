"""What the benchmarks of preconditioners measure and print; no timing is tested."""

import json

import pytest

from benchmarks import nanogpt_seconds, preconditioners, step_time

TINY = step_time.ShapeSet((step_time.Kernel("up", 6, (8,)),), layers=2)


def run(optimizer, seed, curve, lr=0.1):
    loss = curve[-1][1]
    return {"optimizer": optimizer, "lr": lr, "seed": seed} | {
        "validation": curve,
        "loss": loss,
    }


def test_steps_and_seconds_to_adamw(tmp_path):
    slow = [[10, 3.0], [20, 2.0]]
    fast = [[10, 2.0], [20, 1.0]]
    never = [[10, 4.0], [20, 3.0]]
    runs = [
        run(name, seed, curve)
        for name, curve in (("adamw", slow), ("soap", fast), ("lion", never))
        for seed in range(4)
    ]
    runs.append(run("soap", 0, never, lr=0.2))
    sweep, seconds = tmp_path / "sweep.json", tmp_path / "seconds.json"
    sweep.write_text(json.dumps(runs))
    found = {"adamw": 1.0, "soap": 4.0, "lion": 1.0}
    each = {name: {"seconds_a_step": value} for name, value in found.items()}
    seconds.write_text(json.dumps({"optimizers": each}))
    assert nanogpt_seconds.table(sweep, seconds).splitlines()[-3:] == [
        "| soap | 10 ± 0 | 4000 | 4.00 | 40.0 |",
        "| adamw | 20 ± 0 | 1000 | 1.00 | 20.0 |",
        "| lion | 0 of 3 runs get there | 1000 | 1.00 | - |",
    ]


@pytest.mark.slow
def test_seconds_of_whole_steps_are_measured():
    # The smallest preset there is would take minutes: the registry's cheapest rung.
    found = nanogpt_seconds.measure(["sgd"], 1, "tiny")
    assert len(found["sgd"]["raw"]) == 1 and found["sgd"]["seconds_a_step"] > 0


@pytest.mark.slow
def test_memory_is_that_of_the_formulas_by_optimizer_and_dtype():
    found = preconditioners.memory("tiny")
    bytes_per_number = {
        "muon": (1, 4),
        "soap": (6, 4),
        "soap, both in bfloat16": (6, 2),
    }
    for name, (arrays, size) in bytes_per_number.items():
        entry = found[name]["kinds"]["attn/q/kernel"]
        # Two moments and two matrices per side, all 128×128, and a few counters.
        extra = entry["state"] / entry["leaves"] - arrays * 128 * 128 * size
        assert 0 <= extra < 32


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
