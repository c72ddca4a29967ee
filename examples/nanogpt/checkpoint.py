"""Saves and restores a run with Orbax; lets a signal end it after a step."""

import pathlib
import shlex
import signal
import sys
import threading
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The last two checkpoints of one run, by step.

    A save blocks until it is on disk under its final name, so a run that is killed
    while saving finds the checkpoint before. It is not overlapped with the next step:
    that step donates the buffers that are being written.
    """

    def __init__(self, folder: str | pathlib.Path | None):
        """Without a folder nothing is saved."""
        self._manager = None
        if folder:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=2, enable_async_checkpointing=False
            )
            folder = pathlib.Path(folder).resolve()
            self._manager = ocp.CheckpointManager(folder, options=options)

    def __bool__(self) -> bool:
        return self._manager is not None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        if self._manager:
            self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step() if self._manager else None

    def due(self, step: int, every: int) -> bool:
        return bool(self and every) and step % every == 0

    def save(self, step: int, state: Any) -> None:
        if self._manager:
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
            self._manager.wait_until_finished()

    def restore(self, step: int, like: Any) -> Any:
        """The state at `step`, with the types and shardings of `like`."""
        if not self._manager:
            raise ValueError("there is no folder to restore from")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def hint(self) -> str:
        """How to continue the run this process was."""
        words = [word for word in sys.argv if word not in ("--overwrite", "--resume")]
        return "continue with\n    " + shlex.join([sys.executable, *words, "--resume"])


class Interruption:
    """Remembers Ctrl-C or SIGTERM, so that the step in progress can finish.

    A second signal acts at once, as it would have before. Outside the main thread,
    where Python allows no handlers, it never sees one.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number, _frame) -> None:
        self.signal = signal.Signals(number)
        self.__exit__()
