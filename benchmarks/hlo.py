"""Reads from the text of compiled HLO what one device executes and receives.

`compiled.cost_analysis()["flops"]` counts the body of a while loop once, however often
it runs, includes elementwise work and says nothing about collectives. So the counts
here come from `compiled.as_text()`, multiplied by the trip counts of the enclosing
loops:

    text = jax.jit(f).lower(*args).compile().as_text()
    hlo.collectives(text), hlo.dot_flops(text), hlo.solver_flops(text)

Of a conditional, the branch with the highest count is taken. Whatever cannot be counted
raises a ValueError, so no count is silently too low, with one exception: XLA writes
some small products (vector by vector) as multiply and reduce, which are not dots.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable
from typing import NamedTuple, TypeVar

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

# Kernels that multiply matrices, or may, without a `dot` in the text.
_PERHAPS_MATMUL = re.compile(
    "matmul|gemm|dot|convolution|cudnn|triton|mosaic|pallas|tpu_custom_call",
    re.IGNORECASE,
)
# Factorizations and solves. Two kinds are counted, if they are LAPACK's or XLA's own.
_PERHAPS_SOLVER = re.compile(
    "lapack|solver|sparse|magma|cholesky|triangular|trsm|potr|gtsv|householder|eig|svd"
    "|lu_?decomposition|^qr",
    re.IGNORECASE,
)
_CHOLESKY = re.compile(r"cholesky|lapack_[sd]potrf_ffi")
_TRIANGULAR_SOLVE = re.compile(r"triangular-solve|lapack_[sd]trsm_ffi")
_CUBLAS = re.compile(r"__cublas\$(gemm|lt\$matmul(\$f8)?)")
_NAME = re.compile(r"%([\w.\-]+)")
_T = TypeVar("_T")


class Instruction(NamedTuple):
    """A line of a computation; `called` pairs attributes with names they mention."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str
    called: list[tuple[str, str]]


Computation = dict[str, Instruction]


class Module(NamedTuple):
    """A program: its computations by name, the entry's name, the number of devices."""

    computations: dict[str, Computation]
    entry: str
    devices: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective. `result_bytes` and `moved_bytes` are those of one of its runs.

    Attributes:
        kind: One of `KINDS`, without `-start`.
        shape: The type of the result on one device, as in the text.
        result_bytes: Bytes of the result on one device, all tuple elements together.
        moved_bytes: Bytes that one device receives from others. An all-reduce counts as
            a ring, a ragged all-to-all as if the whole result were received.
        count: How often it runs in one call of the program.
        group_size: The number of devices in the largest group; for a
            collective-permute, the number of devices that send or receive.
        op_name: JAX's name of the operation, with the names of the functions around it.
        name: The instruction's name in the text.
    """

    kind: str
    shape: str
    result_bytes: int
    moved_bytes: int
    count: int
    group_size: int
    op_name: str
    name: str

    @property
    def bytes(self) -> int:
        """Bytes that one device receives from others in one call of the program."""
        return self.count * self.moved_bytes


def collectives(text: str) -> list[Collective]:
    """Returns every collective that the program executes, in the order of the text."""
    module = parse(text)

    def measure(instruction: Instruction, inside: Computation) -> Collective | None:
        kind = instruction.opcode.removesuffix("-start")
        return _collective(kind, instruction, inside, module) if kind in KINDS else None

    found = _executed(module, module.entry, measure, lambda c: c.moved_bytes)
    return [dataclasses.replace(c, count=count) for c, count in found]


def dot_flops(text: str) -> int:
    """Returns the FLOPs of the matrix products on one device, 2·m·n·k each."""
    module = parse(text)
    found = _executed(module, module.entry, _flops, lambda flops: flops)
    return sum(flops * count for flops, count in found)


def solver_flops(text: str) -> int:
    """Returns the FLOPs of factorizations and triangular solves on one device.

    A Cholesky factorization counts n³/3, a triangular solve n² per column. Any other
    solver raises a ValueError: its work depends on its input.
    """
    module = parse(text)
    found = _executed(module, module.entry, _solver_flops, lambda flops: flops)
    return sum(flops * count for flops, count in found)


def custom_calls(text: str) -> dict[str, int]:
    """Returns how often each custom call runs, by target (`lapack_spotrf_ffi`, say)."""
    module = parse(text)
    calls: collections.Counter[str] = collections.Counter()
    found = _executed(module, module.entry, lambda i, _: _target(i), lambda _: 1)
    for target, count in found:
        calls[target] += count
    return dict(calls)


def parse(text: str) -> Module:
    """Parses the text into the instructions of every computation."""
    computations: dict[str, Computation] = {}
    entry, inside = "", None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line):
            inside = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            inside = None
        elif inside is not None and line.strip():
            match = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.+)", line)
            if match is None:
                raise ValueError(f"not an instruction: {line}")
            inside[match[1]] = _instruction(match[1], match[2])
    if not entry:
        raise ValueError("the text has no ENTRY computation")
    header = text.partition("\n")[0]
    sizes = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
    return Module(computations, entry, math.prod(map(int, sizes)))


def _instruction(name: str, text: str) -> Instruction:
    # A tuple's type holds spaces, an array's layout `{1,0:T(8,128)}` parentheses.
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    begin = rest.index("(")
    end = _closing(rest, begin)
    attributes = rest[end:]
    unquoted = re.sub(r'"(?:[^"\\]|\\.)*"', '""', attributes)
    # Any attribute can name computations: `to_apply=%f`, `branches={%f, %g}`.
    lists = re.findall(r"([\w-]+)=\{?(%[^\s,}]+(?:, ?%[^\s,}]+)*)", unquoted)
    called = [(key, n) for key, names in lists for n in _NAME.findall(names)]
    operands = _NAME.findall(rest[begin:end])
    return Instruction(name, shape, rest[:begin], operands, attributes, called)


def _closing(text: str, begin: int) -> int:
    depth = 0
    for place in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place + 1
    raise ValueError(f"unbalanced parentheses: {text}")


def _executed(
    module: Module,
    name: str,
    measure: Callable[[Instruction, Computation], _T | None],
    weigh: Callable[[_T], int],
) -> list[tuple[_T, int]]:
    """Returns what `measure` finds in a computation and its callees, and how often."""
    found: list[tuple[_T, int]] = []
    inside = module.computations[name]
    for instruction in inside.values():
        measured = measure(instruction, inside)
        if measured is not None:
            found.append((measured, 1))
            continue
        # Later lines of an asynchronous call may name its computation again.
        if instruction.opcode.endswith(("-update", "-done")):
            continue
        called = [
            (attribute, _executed(module, n, measure, weigh))
            for attribute, n in instruction.called
            if n in module.computations and attribute != "control-predecessors"
        ]
        if instruction.opcode == "conditional":
            branches = [branch for _, branch in called]
            found += max(branches, key=lambda b: sum(weigh(m) * n for m, n in b))
            continue
        for attribute, inner in called:
            trips = 1
            if instruction.opcode == "while" and inner:
                # The condition is evaluated once more than the body.
                trips = _trips(instruction) + (attribute == "condition")
            found += [(m, n * trips) for m, n in inner]
    return found


def _trips(loop: Instruction) -> int:
    known = re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes)
    if known is None:
        where = f"%{loop.name} ({_op_name(loop)})"
        raise ValueError(f"the number of trips of the loop {where} is not known")
    return int(known[1])


def _op_name(instruction: Instruction) -> str:
    match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', instruction.attributes)
    return match[1] if match else ""


def _arrays(shape: str) -> list[tuple[int, list[int]]]:
    """Returns the bits per element and the dimensions of every array of a type."""
    arrays = re.findall(r"\b(pred|token|opaque|[a-z]+(\d+)\w*)\[([^\]]*)\]", shape)
    bits = {"pred": 8, "token": 0, "opaque": 0}
    return [
        (bits.get(dtype) or int(width or 0), [int(d) for d in re.findall(r"\d+", dims)])
        for dtype, width, dims in arrays
    ]


def _collective(
    kind: str, start: Instruction, inside: Computation, module: Module
) -> Collective:
    end = start
    while end.opcode not in (kind, f"{kind}-done"):
        following = (f"{kind}-update", f"{kind}-done")
        users = [i for i in inside.values() if end.name in i.operands]
        end = next((i for i in users if i.opcode in following), start)
        if end is start:
            raise ValueError(f"%{start.name} ends in another computation")
    size = sum(-(-bits * math.prod(dims) // 8) for bits, dims in _arrays(end.shape))
    group = _group_size(start, module.devices)
    moved = {
        "all-gather": size * (group - 1) // group,
        "all-reduce": -(-2 * size * (group - 1) // group),
        "all-to-all": size * (group - 1) // group,
        "reduce-scatter": size * (group - 1),
    }.get(kind, size if group > 1 else 0)
    return Collective(
        kind, end.shape, size, moved, 1, group, _op_name(start), start.name
    )


def _group_size(instruction: Instruction, devices: int) -> int:
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{([\d,{}]*)\}", text):
        between = re.findall(r"\{(\d+),(\d+)\}", pairs[1])
        return len({d for pair in between if pair[0] != pair[1] for d in pair}) or 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(iota[1])
    # `mesh['a'=4,'b'=2] {'a','b':(1)2}`: all of axis a and a part of size 2 of axis b.
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{}]*\{([^}]*)\}", text):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        group = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or axes[axis]) for axis, part in group)
    if listed := re.search(r"replica_groups=\{([\d,{}]*)\}", text):
        groups = re.findall(r"\{([\d,]+)\}", listed[1])
        return max((len(g.split(",")) for g in groups), default=devices)
    raise ValueError(f"%{instruction.name} has no groups that are understood: {text}")


def _target(instruction: Instruction) -> str | None:
    if instruction.opcode not in ("custom-call", "custom-call-start"):
        return None
    match = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return match[1] if match else ""


def _flops(instruction: Instruction, inside: Computation) -> int | None:
    opcode, target = instruction.opcode, _target(instruction)
    contracting = None
    if opcode == "dot":
        key = r"lhs_contracting_dims=\{([\d,]*)\}"
        contracting = re.search(key, instruction.attributes)
    elif opcode == "custom-call" and _CUBLAS.fullmatch(target or ""):
        key = r'"lhs_contracting_dimensions":\[([\d,"]*)\]'
        contracting = re.search(key, instruction.attributes)
    elif not _PERHAPS_MATMUL.search(opcode if target is None else target):
        return None
    if contracting is None:
        # This includes convolutions: on TPU, dots become convolutions, some padded.
        what = f"%{instruction.name} ({target or opcode}, {_op_name(instruction)})"
        raise ValueError(f"the operations of {what} cannot be counted")
    ((_, lhs),) = _arrays(inside[instruction.operands[0]].shape)
    # A library call returns its workspace as a second result.
    result = _arrays(instruction.shape)[0][1]
    axes = [int(axis) for axis in re.findall(r"\d+", contracting[1])]
    return 2 * math.prod(result) * math.prod(lhs[axis] for axis in axes)


def _solver_flops(instruction: Instruction, inside: Computation) -> int | None:
    name = _target(instruction) or instruction.opcode
    if not _PERHAPS_SOLVER.search(name):
        return None
    sizes = [_arrays(inside[i].shape)[0][1] for i in instruction.operands]
    if _CHOLESKY.fullmatch(name):
        *batch, n, _ = sizes[0]
        return math.prod(batch) * (n**3 // 3)
    if _TRIANGULAR_SOLVE.fullmatch(name):
        return sizes[0][-1] * math.prod(sizes[1])
    what = f"%{instruction.name} ({name}, {_op_name(instruction)})"
    raise ValueError(f"the operations of {what} cannot be counted")
