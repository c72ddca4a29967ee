"""Runs and tables of the benchmarks that train the example; no timing is tested."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import qk_clip, state_memory
from examples.nanogpt import configs


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Makes `tiny` a model of one layer and a text of one sentence."""
    text = tmp_path / "text.txt"
    text.write_bytes(b"to be, or not to be, that is the question\n" * 400)
    sizes = {"layers": 1, "width": 16, "head_dim": 8, "context": 16, "batch_size": 8}
    tiny = dataclasses.replace(configs.TINY, **sizes, steps=3, data=str(text))
    monkeypatch.setattr(configs, "TINY", tiny)
    monkeypatch.setitem(configs.PRESETS, "tiny", tiny)


def test_logits_are_the_largest_and_losses_are_paired():
    runs = []
    for job in qk_clip.all_jobs():
        free = job["qk_clip"] == 0
        loss = 1.5 + 0.1 * job["seed"] + (0.25 if free else 0.0)
        logits = [40.0, 100.0 * job["seed"], 50.0] if free else [30.2, 29.0]
        runs.append({**job, "loss": loss, "max_logits": logits})
    assert len(runs) == 24
    lines = qk_clip.table(runs).splitlines()
    assert len(lines) == 2 + 4 and lines[0].startswith("| learning rate | largest")
    assert lines[2] == "| 0.04 | 300 | 30 | 1.950 | 1.700 | -0.250 ± 0.000 |"


def test_dtypes_are_compared_with_float32_of_the_same_seed():
    gaps = {"float32": 0.0, "bfloat16": 0.01, "int8": -0.02, "float8_e4m3fn": 0.03}
    runs = [
        {**job, "loss": 1.0 + 0.1 * job["seed"] + gaps[job["mu_dtype"]]}
        for job in state_memory.all_jobs()
    ]
    assert len(runs) == 33
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in state_memory.table(runs).splitlines()[2:]
    ]
    # One moment, and two; SOAP has two, two bases and two triangles, on 128 by 512.
    soap = 8 + 4 * (128**2 + 512**2 + (128 * 129 + 512 * 513) // 2) / (128 * 512)
    numbers = {(row[0], row[1]): row[2:] for row in rows}
    assert numbers["muon", "int8"] == ["1.06", "1.1800 ± 0.1000", "-0.0200 ± 0.0000"]
    assert numbers["hopper", "float32"] == ["8.00", "1.2000 ± 0.1000", ""]
    assert float(numbers["soap", "float32"][0]) == pytest.approx(soap, abs=0.01)
    assert len(rows) == 11


@pytest.mark.slow
def test_runs_record_what_the_tables_need(small, monkeypatch):
    monkeypatch.setattr(state_memory, "STEPS", 3)
    found = qk_clip.do({"lr": 0.04, "seed": 1, "qk_clip": 30.0})
    assert len(found["max_logits"]) == 3 and np.isfinite(found["loss"])
    json.dumps(found, allow_nan=False)
    for dtype in ("float32", "float8_e4m3fn"):
        found = state_memory.do({"optimizer": "soap", "seed": 1, "mu_dtype": dtype})
        assert np.isfinite(found["loss"])
        assert found["lr"] == configs.LEARNING_RATES["soap"]


@pytest.mark.slow
def test_every_way_to_keep_state_is_measured(small):
    found = state_memory.seconds(["hopper"], "tiny", turns=1)["hopper"]
    assert list(found) == [*state_memory.DTYPES["hopper"], state_memory.OFFLOADED]
    assert found["float32"]["over_float32"] == 1
    sizes = {way: sum(x["state_bytes"].values()) for way, x in found.items()}
    assert sizes["int8"] < sizes["bfloat16"] < sizes["float32"]
    assert sizes["float32, offloaded"] == sizes["float32"]
