"""Runs training in several processes, each with its own devices, as on a cluster.

All processes compute and write checkpoints; only the first prints, records and plots.
"""

import contextlib
import os
import signal
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.nanogpt.configs import Config


@contextlib.contextmanager
def joined(config: Config) -> Iterator[None]:
    """Connects the processes, with `--distributed`; otherwise does nothing."""
    if not config.distributed:
        yield
        return
    # On CPU, XLA waits for the other processes in threads of a pool whose size is the
    # number of cores or of local devices. If all threads wait, the run deadlocks:
    # `tiny` with muonh did on two cores. XLA reads the number of cores from NPROC.
    os.environ.setdefault("NPROC", "64")
    jax.distributed.initialize(config.coordinator, config.processes, config.process)
    yield
    # Not after an error: shutdown waits for the other processes, which may be waiting
    # for this one.
    jax.distributed.shutdown()


def is_first() -> bool:
    return jax.process_index() == 0


def largest(value: int) -> int:
    """Returns the largest value over all processes, each of which must call this."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def agreed(seen: signal.Signals | None) -> signal.Signals | None:
    """Returns a signal that any process received; all call it after the same step."""
    number = largest(seen or 0)
    return signal.Signals(number) if number else None
