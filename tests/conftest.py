"""Configures JAX for the tests: eight devices, and no silent rank promotion."""

import atexit
import itertools
import os
import shutil
import tempfile

# The tests compile thousands of small programs, many of them several times, so all
# workers share one compilation cache.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.mkdtemp(prefix="optax_matrix_tests_")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most tests run without LLVM's optimizations, because compiling takes longer than they
# save. XLA's own passes (fusion, collectives) always run. Tests marked `core`, and
# processes that tests start, have all optimizations, as users do. In CI's slow tests
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 enables them everywhere.
FLAG = "jax_disable_most_optimizations"
if FLAG.upper() not in os.environ:
    jax.config.update(FLAG, True)
DISABLED = jax.config.read(FLAG)
TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def optimizations(request):
    """Enables all optimizations for tests marked `core`."""
    disable = DISABLED and request.node.get_closest_marker("core") is None
    if jax.config.read(FLAG) != disable:
        jax.config.update(FLAG, disable)
        jax.clear_caches()  # The flag is not part of their keys.


@pytest.fixture(autouse=True)
def few_programs():
    """Drops compiled programs after every hundredth test.

    Each has several memory mappings, of which Linux grants a process 65,530 by default;
    compiling one more then ends the process. What is needed again is on disk.
    """
    yield
    if next(TESTS) % 100 == 0:
        jax.clear_caches()
