"""Programs that run beside a test, and that it can stop or kill."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Programs:
    """Processes with a log file each, which end with the `with` block."""

    def __init__(self, commands, folder, **environment):
        # Into files: nobody reads a pipe before the process ends.
        self.logs = [folder.with_suffix(f".{i}.log") for i in range(len(commands))]
        self.processes = []
        for command, log in zip(commands, self.logs, strict=True):
            with log.open("w") as file:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def output(self):
        return "\n".join(f"{log.name}:\n{log.read_text()}" for log in self.logs)
