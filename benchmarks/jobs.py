"""Does jobs in processes of one thread, and continues a file of their results."""

import concurrent.futures
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# One thread per process, so that two runs use two cores. Huge pages, because glibc
# gives memory back after every step, and getting it again in small pages is slow.
ENVIRONMENT = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "OPENBLAS_NUM_THREADS": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
Job = dict[str, Any]


def read(path: Path) -> list[Job]:
    """Returns the results in a file; a line that was cut off is not one."""
    results = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return results


def run_all(
    jobs: Sequence[Job],
    do: Callable[[Job], dict[str, Any]],
    path: Path,
    pool: concurrent.futures.Executor,
) -> Iterator[str]:
    """Does the jobs that a file lacks, and says how long the rest takes.

    Args:
      jobs: What is to be done, with different fields.
      do: Does one of them; the result is added to its fields.
      path: The file of results, one line each.
      pool: Where they are done.
    """
    have = read(path)
    missing = [
        job for job in jobs if not any(job.items() <= done.items() for done in have)
    ]
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        # The last line was cut off.
        path.write_text("".join(json.dumps(done) + "\n" for done in have))
    begin = time.perf_counter()
    futures = {pool.submit(do, job): job for job in missing}
    for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
        job = futures[future]
        if future.exception():
            # The results of the jobs that wait would be lost.
            pool.shutdown(wait=False, cancel_futures=True)
        result = {**job, **future.result()}
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        left = (time.perf_counter() - begin) / done * (len(futures) - done) / 60
        what = ", ".join(f"{name} {value}" for name, value in job.items())
        yield (
            f"[{done}/{len(futures)}] {what}: {result.get('loss', 'done')}; about "
            f"{left:.0f} minutes left"
        )


def processes(workers: int) -> concurrent.futures.Executor:
    """Returns a pool of processes of one thread each."""
    os.environ.update(ENVIRONMENT)
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(workers, context)
