"""Records the environment and the metrics of a run as lines of JSON."""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

HERE = Path(__file__).resolve().parent


def environment() -> dict[str, Any]:
    """Returns versions, commit and device, for reproducing a run."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(HERE), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    devices = jax.devices()
    packages = ("jax", "optax", "flax", "orbax-checkpoint", "numpy", "optax_matrix")
    return {
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "cpu_count": os.cpu_count(),
    }


def digest(tree: Any) -> str:
    """Returns the SHA-256 of all leaves, which depends on every bit of them."""
    result = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        result.update(np.asarray(leaf).tobytes())
    return result.hexdigest()


def parse(line: str) -> dict[str, Any]:
    """Parses a line of metrics.jsonl, where null stands for a non-finite loss."""
    record = json.loads(line)
    if not isinstance(record, dict) or "kind" not in record:
        raise ValueError(f"a record is a JSON object with a `kind`, got {line[:80]!r}")
    return {k: math.nan if v is None and "loss" in k else v for k, v in record.items()}


def read(path: Path) -> list[dict[str, Any]]:
    """Reads a metrics.jsonl, without a last line that is incomplete.

    Raises:
      ValueError: If any other line is not a record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(parse(line))
        except ValueError as error:
            torn = isinstance(error, json.JSONDecodeError) and number == len(lines)
            if not torn:  # A run that is killed while it writes leaves such a line.
                raise ValueError(f"{path}, line {number}: {error}") from error
    return records


def _line(record: dict[str, Any]) -> str:
    def finite(value: Any) -> Any:
        wrong = isinstance(value, float) and not math.isfinite(value)
        return None if wrong else value

    return json.dumps({k: finite(v) for k, v in record.items()}) + "\n"


class Record:
    """The records of one run, in memory and, given a folder, in metrics.jsonl.

    The first record has kind `run` and the last `final`; the others have kind `train`,
    `val` or `resume`. The source of this example is copied to the folder.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        resume: bool,
        overwrite: bool,
        writes: bool = True,
        source: Path = HERE,
    ):
        """Opens a new record, or with `resume` the existing one.

        Only one process `writes`; the others read the record of a resumed run. The
        Python files of `source` are copied to the folder of a new one.
        """
        self.records: list[dict[str, Any]] = []
        self.tokenizer: str | None = None  # the tokenizer of a resumed run
        self.path = folder / "metrics.jsonl" if folder else None
        self.writes = writes
        if folder is None or self.path is None or not (writes or resume):
            return
        if resume:
            if overwrite:
                raise ValueError("`resume` and `overwrite` are mutually exclusive")
            if not self.path.is_file():
                raise FileNotFoundError(f"nothing to resume: {self.path} is missing")
            self.records = read(self.path)
            if not self.records:
                raise ValueError(f"nothing to resume: {self.path} has no records")
            if (folder / "tokenizer.json").is_file():
                self.tokenizer = str(folder / "tokenizer.json")
        elif self.path.exists():
            if not overwrite:
                raise FileExistsError(
                    f"{folder} contains a run; continue it with `--resume`, replace it "
                    f"with `--overwrite`, or choose another folder with `--out`"
                )
            shutil.rmtree(folder)
        if not self.records:
            (folder / "source").mkdir(parents=True, exist_ok=True)
            for file in source.glob("*.py"):
                shutil.copy(file, folder / "source")

    def check_same(
        self,
        config: dict[str, Any],
        data_sha256: str,
        files: Mapping[str, str] = types.MappingProxyType({}),
    ) -> None:
        """Raises if configuration or data differ from those the run started with.

        Args:
          config: The configuration.
          data_sha256: The digest of all data.
          files: The digests of the files of the data, by name.
        """
        begun = self.records[0]
        if not isinstance(begun.get("config"), dict):
            raise ValueError(f"{self.path} does not begin with the settings of a run")
        then = {**begun["config"], "data_sha256": begun.get("data_sha256")}
        now = {**config, "data_sha256": data_sha256}
        if "data_files" in begun:
            then |= {f"file {k}": v for k, v in begun["data_files"].items()}
            now |= {f"file {k}": v for k, v in files.items()}
        changed = [
            f"{k}: {then.get(k)} -> {now[k]}" for k in now if then.get(k) != now[k]
        ]
        if changed:
            raise ValueError(
                "a run must be resumed with its original settings; different from "
                f"{self.path}: {', '.join(changed)}"
            )

    def rewind(self, step: int) -> None:
        """Removes the records after `step`, because these steps will be repeated."""
        kept = [r for r in self.records if r.get("step", 0) <= step]
        self.records = [r for r in kept if r["kind"] != "final"]
        if self.path and self.writes:
            lines = [_line(record) for record in self.records]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(lines))
            partial.replace(self.path)

    def add(self, kind: str, **fields: Any) -> None:
        record = {"kind": kind, **fields}
        self.records.append(record)
        if self.path and self.writes:
            with self.path.open("a") as file:
                file.write(_line(record))

    def last(self, kind: str) -> dict[str, Any]:
        """Returns the newest record of a kind, or {} if there is none."""
        return next((r for r in reversed(self.records) if r["kind"] == kind), {})
