"""Saves and restores runs with Orbax; lets a signal stop a run after a step."""

import hashlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import optax_matrix as om
from examples.nanogpt import processes, sharding

# In every checkpoint: the digests of its other files, in the format of `sha256sum`.
DIGESTS = "sha256sum.txt"


def _digests(folder: Path) -> set[str]:
    """Returns one line per file of a checkpoint: its SHA-256 and its path."""
    lines = set()
    for path in folder.rglob("*"):
        if path.is_file() and path.name != DIGESTS:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.add(f"{digest}  {path.relative_to(folder).as_posix()}")
    return lines


def _damage(folder: Path) -> str:
    """Says which files of a checkpoint have changed since the save, "" if none."""
    if not (folder / DIGESTS).is_file():
        return f"{DIGESTS} is missing; was the save interrupted?"
    expected = set((folder / DIGESTS).read_text(errors="replace").splitlines())
    changed = sorted({line[66:] for line in expected ^ _digests(folder)})
    return f"SHA-256 mismatch in {', '.join(changed)}" if changed else ""


def _non_finite(params: Any) -> str:
    """Names a parameter that contains NaN or Inf, "" if there is none."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.isfinite(leaf).all():
            return f"parameter {sharding.name_of(path)} contains NaN or Inf"
    return ""


class Checkpoints:
    """Keeps the last two checkpoints of a run.

    Orbax restores some damaged files without an error, so each checkpoint also contains
    digests of its files.
    """

    def __init__(self, folder: str | Path | None):
        """Opens `folder`; None disables checkpoints."""
        self._manager = None
        if folder:
            self._folder = Path(folder).resolve()
            options = ocp.CheckpointManagerOptions(
                max_to_keep=2, enable_async_checkpointing=False
            )
            self._manager = ocp.CheckpointManager(
                self._folder,
                item_handlers=ocp.StandardCheckpointHandler(),
                options=options,
            )

    def __bool__(self) -> bool:
        return self._manager is not None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        if self._manager:
            self._manager.close()

    def due(self, step: int, every: int) -> bool:
        return bool(self and every) and step % every == 0

    def save(self, step: int, state: Any) -> None:
        """Writes `state` and then its digests; a checkpoint without them is incomplete.

        Blocks until the state is on disk, because the next step donates its buffers.
        """
        if not self._manager:
            return
        self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
        self._manager.wait_until_finished()
        if processes.is_first():
            folder = self._folder / str(step)
            # Renamed when complete, so that digests that exist are complete.
            partial = folder / f"{DIGESTS}.partial"
            partial.write_text("\n".join(sorted(_digests(folder))) + "\n")
            partial.replace(folder / DIGESTS)

    def restore(self, like: Any, say: Callable[[str], Any]) -> tuple[int, Any]:
        """Returns the step and the state of the newest valid checkpoint.

        A checkpoint is skipped, with a message, if its files have changed or its
        parameters are not finite. Skipped checkpoints are deleted once an older one is
        restored, because the run will save these steps again. Raises if there are
        checkpoints but none is valid, or if a valid one is of another model or
        optimizer.

        Args:
          like: A state with the wanted types and shardings, returned with step 0 if
            there is no checkpoint.
          say: Receives the messages.
        """
        if not self._manager:
            return 0, like
        problems: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            problem = _damage(self._folder / str(step))
            # Restoring is collective, so all processes must skip the same checkpoints.
            if not processes.largest(bool(problem)):
                try:
                    state = self._read(step, like)
                except ValueError as error:
                    raise ValueError(
                        f"checkpoint {step} in {self._folder} is of another model or "
                        f"optimizer: {error}"
                    ) from error
                problem = _non_finite(state.params)
                if not problem:
                    for skipped in problems:
                        self._manager.delete(skipped)
                    return step, state
            problems[step] = problem or "another process found it damaged"
            say(f"checkpoint {step} skipped: {problems[step]}")
        if problems:
            found = "".join(f"\n    {step}: {why}" for step, why in problems.items())
            raise ValueError(
                f"no valid checkpoint in {self._folder}:{found}\nrestart the run with "
                "`--overwrite` instead of `--resume`"
            )
        return 0, like

    def _read(self, step: int, like: Any) -> Any:
        """Returns the state saved after `step`, with the shardings of `like`.

        A preconditioner's state has one row per matrix, and `numbers` for the order of
        the rows, which depends on the mesh. Such a state is read in the shapes that
        were saved, and then rearranged.
        """
        assert self._manager
        preconditioned = optax.tree.get_all_with_path(like, "numbers")
        if not preconditioned:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            args = ocp.args.StandardRestore(abstract)
            return self._manager.restore(step, args=args)
        shapes = self._manager.metadata(step).item_metadata.tree  # type: ignore
        host = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
        args = ocp.args.StandardRestore(host)
        return om.relay_state(self._manager.restore(step, args=args), like)

    def hint(self) -> str:
        """Returns the command that continues this run."""
        words = [word for word in sys.argv if word not in ("--overwrite", "--resume")]
        return "continue with\n    " + shlex.join([sys.executable, *words, "--resume"])


class Interruption:
    """Records Ctrl-C or SIGTERM, so that the current step can finish.

    A second signal has its usual effect. Outside the main thread, where Python does not
    allow signal handlers, no signal is recorded.
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
