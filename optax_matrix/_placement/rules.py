"""The cost rules: how many matrices at once, and in how many parts."""

from collections.abc import Callable

import jax

# Entries of a stack that is multiplied in one batched product on an accelerator. Past
# this a matmul fills the device anyway, and the temporaries of a stack cost memory.
STACK_ENTRIES = 2**26
# Bytes of matrices that one device brings together in one exchange.
EXCHANGE_BYTES = 2**30
# Parts must save this share of the work: they cost a sum over devices per Gram matrix.
PART_GAIN = 0.9


def stack_size(m: int, n: int) -> int:
    """How many m×n matrices one device multiplies in one batched product.

    1 on CPU, where a batched product runs one matrix after another and gains nothing
    over a loop, while stacking copies; as many as have `STACK_ENTRIES` elsewhere.
    """
    if jax.default_backend() == "cpu":
        return 1
    return max(1, STACK_ENTRIES // (m * n))


def exchange_size(m: int, n: int, itemsize: int) -> int:
    """How many m×n matrices one device takes in one exchange, at most."""
    return max(1, EXCHANGE_BYTES // (m * n * itemsize))


def parts(
    count: int,
    devices: int,
    shape: tuple[int, int],
    flops: Callable[[int, int, int], int],
) -> int:
    """In how many parts to cut matrices of which there are fewer than devices.

    Parts are as many as divide the devices and still leave each matrix its own: of
    those the fewest with the least FLOPs a device, if that saves more than a tenth.

    Args:
      count: Number of matrices.
      devices: Number of devices, more than `count`.
      shape: Sides of a matrix.
      flops: FLOPs of (m, n, parts).
    """
    fit = [p for p in range(1, devices // count + 1) if devices % p == 0]
    best = min(fit, key=lambda p: flops(*shape, p))
    saves = flops(*shape, best) < PART_GAIN * flops(*shape, 1)
    return best if saves else 1
