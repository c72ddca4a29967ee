"""The cost rules: how many matrices at once, and in how many parts."""

import dataclasses
from collections.abc import Callable

import jax

# Entries of a stack that is multiplied in one batched product on an accelerator. Past
# this a matmul fills the device anyway, and the temporaries of a stack cost memory.
STACK_ENTRIES = 2**26
# Bytes of matrices that one device brings together in one exchange.
EXCHANGE_BYTES = 2**30
# How much more than an even split the busiest device may have, if that can be.
UNEVEN = 1.1


@dataclasses.dataclass(frozen=True)
class Strategy:
    """What of the rules is set by hand; the arguments of `Placement`."""

    stack_size: int | None = None
    flops_per_byte: float = 0.0


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
    cost: Callable[[int], tuple[int, int]],
    flops_per_byte: float,
) -> int:
    """In how many parts to cut the matrices that are left when all devices have some.

    If the busiest device then has at most a tenth more than an even split, those that
    take the fewest bytes, and if that cannot be, those with the least cost: FLOPs and
    `flops_per_byte` times bytes.

    Args:
      count: Number of matrices.
      devices: Number of devices.
      cost: FLOPs of one of so many parts of a matrix, and bytes that it receives from
        the others.
      flops_per_byte: See `Strategy`.

    Returns:
      A divisor of `devices`; 1 leaves matrices whole.
    """
    rounds, rest = divmod(count, devices)
    if not rest:
        return 1
    whole, _ = cost(1)

    def total(parts: int) -> tuple[float, int]:
        flops, moved = cost(parts)
        slots = -(-rest * parts // devices)
        moved *= slots
        return rounds * whole + slots * flops + flops_per_byte * moved, moved

    found = {p: total(p) for p in range(1, devices + 1) if devices % p == 0}
    limit = max(UNEVEN * count * whole / devices, min(c for c, _ in found.values()))
    return min((moved, p) for p, (cost_, moved) in found.items() if cost_ <= limit)[1]
