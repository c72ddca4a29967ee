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
    most: int | None = None,
) -> int:
    """In how many parts to cut the matrices that are left when all devices have some.

    With bytes for nothing, none where the busiest device has at most a tenth more FLOPs
    than an even split; else as many as move the fewest bytes of all that leave it no
    more than that, or than the least there is. If bytes count, as many as take the
    least FLOPs and bytes together.

    Args:
      count: Number of matrices.
      devices: Number of devices.
      cost: FLOPs of one of so many parts of a matrix, and bytes that its device
        receives, in exchanges and from the other parts.
      flops_per_byte: See `Strategy`.
      most: How many parts a device may have; None for any number.

    Returns:
      A divisor of `devices`; 1 leaves matrices whole.
    """
    rounds, rest = divmod(count, devices)
    whole, _ = cost(1)
    if not rest or not whole:
        return 1

    def total(parts: int, slots: int) -> tuple[int, int]:
        flops, moved = cost(parts)
        # The bytes of whole rounds are the same however the rest is cut.
        return rounds * whole + slots * flops, slots * moved

    slots = {p: -(-rest * p // devices) for p in range(1, devices + 1)}
    found = {
        p: total(p, n)
        for p, n in slots.items()
        if devices % p == 0 and (most is None or n <= max(most, 1))
    }
    if flops_per_byte:
        return min(found, key=lambda p: found[p][0] + flops_per_byte * found[p][1])
    least = min(flops for flops, _ in found.values())
    limit = max(UNEVEN * count * whole / devices, least)
    if found[1][0] <= limit:
        return 1
    return min((moved, p) for p, (flops, moved) in found.items() if flops <= limit)[1]
