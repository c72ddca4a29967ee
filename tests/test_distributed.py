"""Two processes with four devices each train as one process does with eight."""

import dataclasses
import functools
import os
import pydoc
import shutil
import signal
import socket
import sys
import time

import jax
import numpy as np
import pytest

from examples.nanogpt import checkpoint, configs, plot, sharding, train
from tests.programs import Programs

pytestmark = pytest.mark.slow  # Processes that start and compile, three at a time.

MESH, STEPS, MIDDLE = "data=2,fsdp=4", 6, 3

FLAGS = {
    "config": "tiny", "steps": STEPS, "log-every": 1, "val-every": STEPS,
    "val-windows": 32, "sample": 0, "checkpoint-every": MIDDLE, "optimizer": "muonh",
}  # fmt: skip
# SGD, because it compiles fast.
FAST = {
    "layers": 1, "width": 32, "head-dim": 16, "context": 16, "batch-size": 8,
    "data": pydoc.__file__, "optimizer": "sgd", "steps": 100_000,
}  # fmt: skip


def words(flags):
    return [word for k, v in flags.items() for word in (f"--{k}", str(v))]


def config_of(folder, **changes):
    """What the two processes are told, for this one."""
    config = configs.from_command_line([*words(FLAGS), "--out", str(folder), "--quiet"])
    return dataclasses.replace(config, **changes)


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Pair(Programs):
    """The example as two processes that train together."""

    def __init__(self, folder, *more, **flags):
        common = [
            *(sys.executable, "-m", "examples.nanogpt.train", "--mesh", MESH),
            *words(FLAGS | flags),
            *more,
            *("--out", str(folder), "--distributed", "--processes", "2"),
            *("--coordinator", f"localhost:{free_port()}", "--process"),
        ]
        commands = [[*common, str(i)] for i in (0, 1)]
        super().__init__(commands, folder, JAX_NUM_CPU_DEVICES="4")

    def finish(self, codes=(0, 0), limit=400):
        """Waits for both, or for the first that fails, or for the clock."""
        end = time.monotonic() + limit
        while None in (found := [p.poll() for p in self.processes]):
            wrong = [c for c in found if c is not None and c not in codes]
            assert not wrong, f"ended with {found}\n{self.output()}"
            assert time.monotonic() < end, f"too slow\n{self.output()}"
            time.sleep(0.05)
        assert tuple(found) == codes, f"ended with {found}\n{self.output()}"


def losses(folder):
    kinds = ("train", "val")
    records = [r for r in plot.read(folder) if r["kind"] in kinds]
    return {(r["kind"], r["step"]): r["loss"] for r in records}


def assert_same_run(folder, expected):
    found, wanted = losses(folder), losses(expected)
    assert list(found) == list(wanted)
    np.testing.assert_allclose([*found.values()], [*wanted.values()], rtol=1e-4)
    # Rounding of a step of 0.06 of a matrix's norm, or of 0.003 by AdamW.
    for a, b in zip(final(folder), final(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@functools.cache
def one_device_state():
    return train.initial(config_of("nowhere"), 256, on_first(1))[2]


def final(folder):
    """The parameters of the last checkpoint."""
    with checkpoint.Checkpoints(folder / "checkpoints") as saved:
        step, state = saved.restore(one_device_state(), print)
    assert step == STEPS
    return jax.tree.leaves(state.params)


def on_first(devices):
    mesh = MESH if devices == 8 else f"fsdp={devices}"
    return sharding.make_mesh(mesh, "auto", jax.devices()[:devices])


def test_two_processes_train_as_one_does_and_one_continues_their_run(tmp_path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    with Pair(together) as pair:
        pair.finish()
    loud, quiet = (log.read_text() for log in pair.logs)
    assert "validation loss" in loud and "validation loss" not in quiet
    assert "8 x cpu" in plot.read(together)[0]["device"]
    assert (together / "loss.png").exists()

    train.train(config_of(alone, mesh=MESH))
    assert_same_run(together, alone)

    for devices in (8, 4, 1):
        folder = tmp_path / f"continued-on-{devices}"
        shutil.copytree(together, folder)
        shutil.rmtree(folder / "checkpoints" / str(STEPS))
        config = configs.resolve(config_of(folder, resume=True))
        train.train_on(on_first(devices), config)
        resumed = [r for r in plot.read(folder) if r["kind"] == "resume"]
        assert [r["step"] for r in resumed] == [MIDDLE]
        assert_same_run(folder, together)


def test_two_processes_continue_a_preconditioned_run(tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    flags = FAST | {"optimizer": "soap", "steps": STEPS}
    with Pair(whole, **flags) as pair:
        pair.finish()
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    with Pair(again, "--resume", **flags) as pair:
        pair.finish()
    assert [r["step"] for r in plot.read(again) if r["kind"] == "resume"] == [MIDDLE]
    assert losses(again) == losses(whole)


def run_until(step, folder, *more):
    """Two processes, of which one gets a signal after a step; the last step."""
    with Pair(folder, *more, **FAST) as pair:
        limit = time.monotonic() + 400
        while not (folder / "checkpoints" / str(step) / checkpoint.DIGESTS).exists():
            alive = all(process.poll() is None for process in pair.processes)
            assert alive and time.monotonic() < limit, pair.output()
            time.sleep(0.01)
        pair.processes[1].send_signal(signal.SIGTERM)
        pair.finish(codes=(128 + signal.SIGTERM,) * 2)
    assert "stopped by SIGTERM after step" in pair.logs[0].read_text()
    last = [r for r in plot.read(folder) if r["kind"] == "train"][-1]["step"]
    assert (folder / "checkpoints" / str(last) / checkpoint.DIGESTS).is_file()
    return last


def test_a_signal_to_one_process_ends_both_and_both_skip_a_damaged_checkpoint(tmp_path):
    folder = tmp_path / "run"
    last = run_until(12, folder)
    before = (last - 1) // MIDDLE * MIDDLE
    newest = folder / "checkpoints" / str(last)
    data = max(newest.rglob("?" * 32), key=os.path.getsize)
    data.write_bytes(data.read_bytes()[::-1])
    run_until(before + 10 * MIDDLE, folder, "--resume")
    loud, quiet = (folder.with_suffix(f".{i}.log").read_text() for i in (0, 1))
    assert f"checkpoint {last} skipped: SHA-256 mismatch in " in loud
    assert "skipped: SHA-256" not in quiet
    resumed = [r["step"] for r in plot.read(folder) if r["kind"] == "resume"]
    assert resumed == [before]
