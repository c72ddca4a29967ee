"""One run in several processes, each with its own devices, as on a cluster.

All compute and write checkpoints; the first alone prints, records and plots.
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
    """Makes the devices of all processes one set; nothing without `--distributed`."""
    if not config.distributed:
        yield
        return
    # XLA for CPU waits for other processes in threads of a pool, as many as there are
    # cores or local devices. If all of them wait, nothing goes on: `tiny` with muonh
    # hung on two cores. XLA takes the number of cores from this variable.
    os.environ.setdefault("NPROC", "64")
    jax.distributed.initialize(config.coordinator, config.processes, config.process)
    yield
    # Waits for the others, so not after an error: they may wait for this one.
    jax.distributed.shutdown()


def is_first() -> bool:
    return jax.process_index() == 0


def agreed(seen: signal.Signals | None) -> signal.Signals | None:
    """A signal that any process has seen; all must ask after the same step."""
    if jax.process_count() == 1:
        return seen
    largest = int(np.max(multihost_utils.process_allgather(np.int32(seen or 0))))
    return signal.Signals(largest) if largest else None
