"""Stricter than a user's environment: eight devices, no silent rank promotion."""

import atexit
import os
import shutil
import tempfile

# Thousands of small programs, most of them the same in several tests: compiled once for
# all workers, and without the optimizations of machine code that cost more than they
# save here. The compiler's own passes (fusion, collectives) run as they do elsewhere.
# Flags from outside come last and win: CI runs the slow tests as users compile.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.mkdtemp(prefix="optax_matrix_tests_")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["XLA_FLAGS"] = (
        "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0 "
        f"{os.environ.get('XLA_FLAGS', '')}"
    ).strip()

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
