"""Times the optimizer update alone, `tx.update` under jit, against optax.contrib.muon.

    python -m benchmarks.step_time --sets gpt-384 gpt-768 fused-gqa --repeats 15 \
        --out benchmarks/results/NAME.json
    python -m benchmarks.step_time --table benchmarks/results/NAME.json

Everything runs in one process. Each repeat runs every contender and every matmul probe
once, in an order rotated by one per repeat, so that a speed-up is a quotient of
neighbors in time. The state is donated; gradients, parameters and all states stay on
the device. Programs are compiled once per repeat, at most five times, in turns and
without JAX's caches on disk or in memory. Lowering (tracing included) and compiling are
measured in CPU seconds of all threads, which other work on the machine hardly changes.
On a GPU, XLA remembers its autotuning: there only the first compilation is cold.

The first sets compare settings of `muon`. The sets `many-224` and `many-700` compare
the optimizers of the Muon family, by their defaults, on so many small matrices that
compile time counts.

The probes are independent products of the shapes that a Newton-Schulz step has, one for
each leaf that has the shape. `mix_flops_per_second` is their rate in the proportions of
one plain step of every leaf. `matmul_seconds` charges all dots of a contender at that
one rate, whatever shapes they have; the rates per shape show how much that can matter.
Halley's factorizations and triangular solves have a probe of their own, and
`factor_seconds` is its time for contenders that factorize. `rest` is what remains.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_matrix as om
from benchmarks import hlo
from examples.nanogpt import record

PEER = "optax.contrib.muon"
ROLLFAST = "rollfast.muon"
FAMILY = ("muon", "muonw", "hopper", "adamuon", "normuon", "muonh", "adamh")
COMPILATIONS = 5
WARM_UP = 2
FACTOR = "factorizations"

Leaves = dict[str, jax.Array]
Product = tuple[int, int, int]  # (m, k) @ (k, n)


class Kernel(NamedTuple):
    """A leaf of shape (inputs, sum of widths) that holds one matrix per width."""

    name: str
    inputs: int
    widths: tuple[int, ...]


class ShapeSet(NamedTuple):
    """The hidden matrices of a model: the kernels of one layer and how many layers."""

    kernels: tuple[Kernel, ...]
    layers: int
    family: bool = False  # compares the Muon family instead of settings of `muon`

    def separate(self) -> dict[str, tuple[int, int]]:
        """Returns the shape of every matrix as a leaf of its own."""
        return {
            f"{layer:02}.{kernel.name}.{part}": (kernel.inputs, width)
            for layer in range(self.layers)
            for kernel in self.kernels
            for part, width in enumerate(kernel.widths)
        }

    def fuse(self, leaves: Leaves) -> Leaves:
        """Concatenates the matrices of each kernel in one leaf."""
        fused: dict[str, list[jax.Array]] = {}
        for name, leaf in leaves.items():
            fused.setdefault(name.rpartition(".")[0], []).append(leaf)
        return {name: jnp.concatenate(parts, 1) for name, parts in fused.items()}

    def layout(self, path: str, leaf: Any) -> om.MatrixLayout | bool:
        """Routes the fused leaves."""
        widths = {kernel.name: kernel.widths for kernel in self.kernels}
        parts = widths[path.partition(".")[2]]
        return om.MatrixLayout(split_outputs=parts) if len(parts) > 1 else True


def gpt(width: int, layers: int) -> ShapeSet:
    square = [Kernel(name, width, (width,)) for name in "qkvo"]
    up, down = Kernel("up", width, (4 * width,)), Kernel("down", 4 * width, (width,))
    return ShapeSet((*square, up, down), layers)


def fused_gqa(width: int, hidden: int, layers: int) -> ShapeSet:
    kernels = (
        Kernel("qkv", width, (width, width // 3, width // 3)),
        Kernel("o", width, (width,)),
        Kernel("gate_up", width, (hidden, hidden)),
        Kernel("down", hidden, (width,)),
    )
    return ShapeSet(kernels, layers)


def many(width: int, hidden: int, layers: int) -> ShapeSet:
    square = [Kernel(name, width, (width,)) for name in "qkvo"]
    wide = [Kernel(name, width, (hidden,)) for name in ("gate", "up")]
    return ShapeSet((*square, *wide, Kernel("down", hidden, (width,))), layers, True)


SETS = {
    "gpt-384": gpt(384, 6),
    "gpt-768": gpt(768, 12),
    "fused-gqa": fused_gqa(768, 2048, 12),
    "many-224": many(64, 256, 32),
    "many-700": many(64, 256, 100),
}


class Contender(NamedTuple):
    tx: optax.GradientTransformation
    fused: bool = False


def contenders(
    shapes: ShapeSet, dtype: str
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Returns the contenders by name, the peer first, and why others are left out."""

    def every(path: str, leaf: Any) -> bool:
        return True

    peer = {PEER: Contender(optax.contrib.muon(0.02))}
    if shapes.family:
        family = {name: getattr(om, name)(0.02, routing=every) for name in FAMILY}
        return peer | {name: Contender(tx) for name, tx in family.items()}, {}
    # The peer multiplies in the dtype of the leaves; ours would take float32.
    products = None if dtype == "float32" else dtype

    def ours(
        method: om.NewtonSchulz | om.Halley, routing: Any, stack_size: int | None = None
    ) -> Any:
        return om.muon(
            0.02,
            debias=True,
            orthogonalize=method,
            routing=routing,
            placement=om.Placement(stack_size=stack_size),
        )

    newton_schulz = om.NewtonSchulz(dtype=products)
    plain = om.NewtonSchulz(method="plain", dtype=products)
    found = {
        **peer,
        "ours": Contender(ours(newton_schulz, every)),
        "ours, plain": Contender(ours(plain, every)),
        "ours, Halley": Contender(ours(om.Halley(), every)),
        # These show what the cap on stacks does to time and to temporaries.
        "ours, stacks of 1": Contender(ours(newton_schulz, every, 1)),
        "ours, stacks of 4": Contender(ours(newton_schulz, every, 4)),
        "ours, one stack": Contender(ours(newton_schulz, every, 10**6)),
    }
    left_out = {}
    if any(len(kernel.widths) > 1 for kernel in shapes.kernels):
        found["ours, fused"] = Contender(ours(newton_schulz, shapes.layout), True)
    try:
        # Its defaults are the peer's settings. Early releases have no Muon.
        found[ROLLFAST] = Contender(importlib.import_module("rollfast").muon(0.02))
    except (ImportError, AttributeError) as error:
        left_out[ROLLFAST] = f"{type(error).__name__}: {error}"
    found["optax.adamw"] = Contender(optax.adamw(0.02))
    return found, left_out


def random_leaves(
    shapes: dict[str, tuple[int, int]], seed: int, scale: float, dtype: str
) -> Leaves:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: scale * jax.random.normal(key, shape, dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


class Step:
    """An optimizer's state and its compiled update; a call makes one update."""

    def __init__(self, contender: Contender, grads: Leaves, params: Leaves):
        # Under jit every leaf gets a buffer of its own, which donation requires.
        self.state = jax.jit(contender.tx.init)(params)
        self.update = contender.tx.update
        self.grads, self.params = grads, params
        self.raw = {"lowering_seconds": [], "compile_seconds": []}

    def compile(self) -> None:
        """Compiles the update once more, without what earlier compilations left."""
        jax.clear_caches()
        update = jax.jit(self.update, donate_argnums=1)
        begin = time.process_time()
        lowered = update.lower(self.grads, self.state, self.params)
        middle = time.process_time()
        self.compiled = lowered.compile()
        self.raw["lowering_seconds"].append(middle - begin)
        self.raw["compile_seconds"].append(time.process_time() - middle)

    def __call__(self) -> Leaves:
        """Updates the state and returns the updates."""
        updates, self.state = self.compiled(self.grads, self.state, self.params)
        jax.block_until_ready((updates, self.state))
        return updates

    def report(self) -> dict[str, Any]:
        """Describes the compiled program."""
        text, memory = self.compiled.as_text(), self.compiled.memory_analysis()
        assert text is not None
        try:
            dots = {"dot_flops": hlo.dot_flops(text)}
        except ValueError as error:
            dots = {"dot_flops": None, "dot_flops_error": str(error)[:300]}
        return {
            "leaves": len(self.grads),
            **{name: statistics.median(times) for name, times in self.raw.items()},
            # Unlike `dot_flops`, XLA counts loop bodies once, and elementwise work.
            "flops": (self.compiled.cost_analysis() or {}).get("flops"),
            **dots,
            "custom_calls": hlo.custom_calls(text),
            "temp_bytes": memory.temp_size_in_bytes if memory else None,
        }


def step_products(shapes: ShapeSet) -> dict[Product, tuple[int, int]]:
    """Returns the products of a plain Newton-Schulz step, and two counts of each.

    The first count is the number of leaves that have the product, which is the number
    of products in its probe. The second is the number of times that a step computes it:
    a square leaf has the same product three times.
    """
    leaves: dict[Product, int] = {}
    uses: dict[Product, int] = {}
    for shape in shapes.separate().values():
        m, n = sorted(shape)
        step: list[Product] = [(m, n, m), (m, m, m), (m, m, n)]
        for product in step:
            uses[product] = uses.get(product, 0) + 1
        for product in set(step):
            leaves[product] = leaves.get(product, 0) + 1
    return {product: (leaves[product], uses[product]) for product in uses}


def probe(product: Product, count: int, seed: int, dtype: str) -> Callable[[], Any]:
    """Returns a program that computes and returns `count` independent products."""
    m, k, n = product
    names = [str(i) for i in range(count)]
    left = random_leaves(dict.fromkeys(names, (m, k)), seed, 1.0, dtype)
    right = random_leaves(dict.fromkeys(names, (k, n)), seed + 1, 1.0, dtype)
    multiply = jax.jit(lambda a, b: {name: a[name] @ b[name] for name in a})
    program = multiply.lower(left, right).compile()
    return lambda: jax.block_until_ready(program(left, right))


def factor_probe(shapes: ShapeSet, seed: int, dtype: str) -> Callable[[], Any]:
    """Returns a program with the factorizations and solves of a Halley step."""
    sides = {name: min(shape) for name, shape in shapes.separate().items()}
    leaves = random_leaves({k: (m, m) for k, m in sides.items()}, seed, 1.0, dtype)
    grams = {
        name: jnp.eye(len(x), dtype="float32") + (x @ x.T).astype("float32") / len(x)
        for name, x in leaves.items()
    }

    def factor(gram: jax.Array) -> jax.Array:
        lower = jax.lax.linalg.cholesky(gram, symmetrize_input=False)
        eye = jnp.eye(len(gram), dtype=gram.dtype)
        return jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)

    program = jax.jit(lambda xs: jax.tree.map(factor, xs)).lower(grams).compile()
    return lambda: jax.block_until_ready(program(grams))


def interleave(
    programs: dict[str, Callable[[], Any]], repeats: int, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Returns the seconds of each program in each repeat."""
    names = list(programs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-warm_up, repeats):
        gc.collect()
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            begin = time.perf_counter()
            result = programs[name]()
            end = time.perf_counter()
            del result
            if repeat >= 0:
                seconds[name].append(end - begin)
    return seconds


def quartiles(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Returns the quartiles of the quotients of the same repeats."""
    found = np.quantile(np.divide(above, below), (0.25, 0.5, 0.75)).tolist()
    return dict(zip(("q1", "median", "q3"), found, strict=True))


def measure(shapes: ShapeSet, repeats: int, seed: int, dtype: str) -> dict[str, Any]:
    """Measures one shape set."""
    matrices = shapes.separate()
    grads = random_leaves(matrices, seed, 1.0, dtype)
    params = random_leaves(matrices, seed + 1, 0.02, dtype)
    products = step_products(shapes)
    probes = {
        f"({m}, {k}) @ ({k}, {n})": probe((m, k, n), leaves, seed, dtype)
        for (m, k, n), (leaves, _) in products.items()
    }
    found, left_out = contenders(shapes, dtype)
    steps = {}
    for name, contender in found.items():
        trees = (grads, params)
        if contender.fused:
            trees = (shapes.fuse(grads), shapes.fuse(params))
        steps[name] = Step(contender, *trees)
    compile_each = {name: step.compile for name, step in steps.items()}
    interleave(compile_each, min(repeats, COMPILATIONS), warm_up=0)
    factor = {FACTOR: factor_probe(shapes, seed, dtype)}
    seconds = interleave({**steps, **probes, **factor}, repeats)

    matmul, mix_seconds, mix_flops = {}, 0.0, 0
    for name, ((m, k, n), (leaves, uses)) in zip(probes, products.items(), strict=True):
        median, flops = statistics.median(seconds[name]), 2 * m * k * n
        mix_seconds += uses * median / leaves
        mix_flops += uses * flops
        matmul[name] = {
            "products": leaves,
            "median_seconds": median,
            "flops_per_second": leaves * flops / median,
            "raw_seconds": seconds[name],
        }
    rate = mix_flops / mix_seconds
    rows = {}
    for name, step in steps.items():
        median = statistics.median(seconds[name])
        row = {
            "fused": found[name].fused,
            "median_seconds": median,
            "speedup": quartiles(seconds[PEER], seconds[name]),
            **step.report(),
        }
        if row["dot_flops"] is not None:
            row["matmul_seconds"] = row["dot_flops"] / rate
            row["share_at_matmul_peak"] = row["matmul_seconds"] / median
            row["factor_seconds"] = 0.0
            if any("potrf" in call for call in row["custom_calls"]):
                row["factor_seconds"] = statistics.median(seconds[FACTOR])
            known = row["matmul_seconds"] + row["factor_seconds"]
            row["rest"] = 1 - known / median
        rows[name] = {**row, "raw": {"seconds": seconds[name], **step.raw}}
    return {
        "kernels_of_a_layer": [kernel._asdict() for kernel in shapes.kernels],
        "layers": shapes.layers,
        "matrices": len(matrices),
        "note": "the peer cannot split a leaf: where `fused` is false, every matrix is "
        "a leaf of its own; where it is true, the leaves are `kernels_of_a_layer`",
        "left_out": left_out,
        "mix_flops_per_second": rate,
        "matmul": matmul,
        "factorizations": {"raw_seconds": seconds[FACTOR]},
        "contenders": rows,
    }


def environment() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    models = re.findall(r"model name\s*: (.+)", text)
    result = record.environment()
    for package in ("jaxlib", "rollfast"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            result["versions"][package] = importlib.metadata.version(package)
    return {
        **result,
        "machine": {"platform": platform.platform(), "cpu": models[:1]},
        "backend": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "xla_flags": os.environ.get("XLA_FLAGS"),
        # LAPACK's own threads compete with XLA's: see README.md.
        "openblas_num_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
    }


def run(
    sets: Sequence[str], repeats: int, seed: int, dtype: str, out: Path
) -> dict[str, Any]:
    """Measures the sets and writes the file after each."""
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.step_time", *sys.argv[1:]]),
        "environment": environment(),
        "seeds": {"gradients": seed, "parameters": seed + 1},
        "dtype": dtype,
        "repeats": repeats,
        "warm_up": WARM_UP,
        "peer": PEER,
        "sets": {},
    }
    for name in sets:
        # The load by other programs tells how far to trust the seconds.
        load = os.getloadavg()
        measured = measure(SETS[name], repeats, seed, dtype)
        measured["load_average"] = {"begin": load, "end": os.getloadavg()}
        result["sets"][name] = measured
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name} is written to {out}", flush=True)
    return result


def table(path: str | Path) -> str:
    """Returns the results as Markdown: two tables per set, steps and compilation."""
    lines = []
    for name, measured in json.loads(Path(path).read_text())["sets"].items():
        rate = f"matmuls at {measured['mix_flops_per_second'] / 1e9:.0f} GFLOP/s"
        lines += [f"{name}, {measured['matrices']} matrices, {rate}:\n"]
        lines += table_head(
            *("contender", "ms", "speed-up (quartiles)", "GFLOP in dots"),
            *("share at matmul rate", "and factorizations", "temporary MiB"),
        )
        rows = measured["contenders"]
        lines += [_step_line(contender, row) for contender, row in rows.items()]
        over = "/ peer's (range)"
        lines += ["", *table_head("contender", "lowering s", over, "compile s", over)]
        peer = rows[PEER]["raw"]
        lines += [
            _compile_line(contender, row, peer) for contender, row in rows.items()
        ]
        out = measured["left_out"].items()
        lines += [f"\n{who} is left out ({why})" for who, why in out]
        lines.append("")
    return "\n".join(lines)


def _step_line(contender: str, row: dict[str, Any]) -> str:
    speed, share = row["speedup"], row.get("share_at_matmul_peak", math.nan)
    dots = math.nan if row["dot_flops"] is None else row["dot_flops"]
    # Where factorizations were not measured, the cell is empty.
    known = f"{1 - row['rest']:.2f}" if "factor_seconds" in row else ""
    return table_row(
        *(contender, f"{row['median_seconds'] * 1e3:.4g}"),
        f"{speed['median']:.2f} ({speed['q1']:.2f} to {speed['q3']:.2f})",
        *(f"{dots / 1e9:.4g}", f"{share:.2f}", known),
        f"{(row['temp_bytes'] or 0) / 2**20:.1f}",
    )


def _compile_line(
    contender: str, row: dict[str, Any], peer: dict[str, list[float]]
) -> str:
    cells = [contender]
    for stage in ("lowering_seconds", "compile_seconds"):
        seconds = row["raw"][stage]
        over = np.divide(seconds, peer[stage])
        cells.append(f"{statistics.median(seconds):.2f}")
        cells.append(f"{np.median(over):.2f} ({over.min():.2f} to {over.max():.2f})")
    return table_row(*cells)


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table_head(*cells: str) -> list[str]:
    return [table_row(*cells), "| --- " * len(cells) + "|"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the file of results to write")
    parser.add_argument("--table", help="prints the tables of a file and ends")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
    elif args.out:
        # JAX decides once, when it first compiles, whether it uses the cache.
        jax.config.update("jax_enable_compilation_cache", False)
        run(args.sets, args.repeats, args.seed, args.dtype, args.out)
    else:
        parser.error("one of --out and --table is needed")


if __name__ == "__main__":
    main()
