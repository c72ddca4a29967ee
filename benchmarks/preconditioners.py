"""Measures preconditioners: time by refresh interval and staggering, and memory.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.preconditioners --out NAME.json
    python -m benchmarks.preconditioners --table NAME.json

The times are those of `tx.update` alone, jitted, with the state donated, for the hidden
matrices of a GPT. Every contender first runs a refresh cycle that is not counted,
because its first update computes all bases or roots from scratch. Then the contenders
take turns, `--cycles` times, with `--cycle` updates each, and each update is timed. For
each place in a contender's refresh cycle, the median over all updates in that place is
reported, so that the slowest place is not an outlier.

The memory is that of `om.describe_state` for the GPT-2 small of the example. Nothing is
allocated.
"""

import argparse
import collections
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import optax_matrix as om
from benchmarks import step_time
from examples.nanogpt import configs, model

CYCLE = 100
SETS = {"gpt-128": step_time.gpt(128, 3), "gpt-384": step_time.SETS["gpt-384"]}


def every(path: str, leaf: Any) -> bool:
    return True


def contenders(refreshes: list[int]) -> dict[str, tuple[Any, int]]:
    """Returns optimizers and the lengths of their refresh cycles, by name."""
    found: dict[str, tuple[Any, int]] = {
        "optax.adamw": (optax.adamw(1e-3), 1),
        "muon": (om.muon(0.02, routing=every), 1),
    }
    factories = {
        "soap": (om.soap, om.SOAP(stagger=True)),
        "kl_soap": (om.kl_soap, om.KL(stagger=True)),
        "soap_muon": (om.soap_muon, om.SOAP(stagger=True)),
        "shampoo": (om.shampoo, om.Shampoo(stagger=True)),
    }
    for name, (factory, staggered) in factories.items():
        for k in refreshes:
            tx = factory(1e-3, refresh=k, routing=every)
            found[f"{name}, refresh {k}"] = (tx, k)
            if k == 10:
                tx = factory(1e-3, refresh=k, routing=every, preconditioner=staggered)
                found[f"{name}, refresh {k}, staggered"] = (tx, k)
    newton = om.Shampoo(root="newton")
    tx = om.shampoo(1e-3, refresh=10, routing=every, preconditioner=newton)
    found["shampoo, refresh 10, Newton"] = (tx, 10)
    return found


class Run:
    """Runs an optimizer; consecutive updates have different gradients."""

    def __init__(self, tx: Any, grads: list[Any], params: Any):
        self.update = jax.jit(tx.update, donate_argnums=1)
        self.state = jax.jit(tx.init)(params)
        self.grads, self.params, self.count = grads, params, 0

    def __call__(self) -> float:
        grads = self.grads[self.count % len(self.grads)]
        begin = time.perf_counter()
        updates, self.state = self.update(grads, self.state, self.params)
        jax.block_until_ready((updates, self.state))
        self.count += 1
        return time.perf_counter() - begin


def measure(
    shapes: step_time.ShapeSet, cycles: int, cycle: int, refreshes: list[int]
) -> dict[str, Any]:
    matrices = shapes.separate()
    params = step_time.random_leaves(matrices, 0, 0.02, "float32")
    grads = [step_time.random_leaves(matrices, s, 1.0, "float32") for s in range(1, 9)]
    found = contenders(refreshes)
    runs = {name: Run(tx, grads, params) for name, (tx, _) in found.items()}
    firsts = {name: run() for name, run in runs.items()}
    for name, run in runs.items():
        for _ in range(found[name][1]):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    places: dict[str, dict[int, list[float]]] = {
        name: collections.defaultdict(list) for name in runs
    }
    for _ in range(cycles):
        for name, run in runs.items():
            gc.collect()
            for _ in range(cycle):
                place = run.count % found[name][1]
                taken = run()
                seconds[name].append(taken)
                places[name][place].append(taken)
    rows = {}
    for name, run in runs.items():
        medians = [
            statistics.median(times) for _, times in sorted(places[name].items())
        ]
        rows[name] = {
            "mean_seconds": statistics.mean(seconds[name]),
            "over_adamw": statistics.mean(seconds[name])
            / statistics.mean(seconds["optax.adamw"]),
            "over_muon": statistics.mean(seconds[name])
            / statistics.mean(seconds["muon"]),
            "median_seconds": statistics.median(medians),
            "slowest_over_median": max(medians) / statistics.median(medians),
            "seconds_by_place": medians,
            "first_seconds_with_compilation": firsts[name],
            "state_bytes": sum(x.nbytes for x in jax.tree.leaves(run.state)),
        }
    return {"matrices": len(matrices), "cycle": cycle, "cycles": cycles, "rows": rows}


def memory(preset: str = "gpt2-small") -> dict[str, Any]:
    """Returns the bytes of state for a GPT, by optimizer and kind of leaf."""
    config = configs.PRESETS[preset]
    sizes = (50_257, config.layers, config.width, config.head_dim)
    params = nnx.state(
        nnx.eval_shape(
            lambda: model.GPT(*sizes, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
        )
    )
    half = om.SOAP(factor_dtype="bfloat16")
    optimizers = {
        "optax.adamw": optax.adamw(1e-3),
        "muon": om.muon(),
        "muon, momentum in int8": om.muon(mu_dtype="int8"),
        "shampoo": om.shampoo(),
        "shampoo, no momentum, grafted to SGD": om.shampoo(momentum=None, graft="sgd"),
        "distributed_shampoo": om.distributed_shampoo(),
        "soap": om.soap(),
        "soap, moments in bfloat16": om.soap(mu_dtype="bfloat16"),
        "soap, moments in float8": om.soap(mu_dtype="float8_e4m3fn"),
        "soap, factors in bfloat16": om.soap(preconditioner=half),
        "soap, both in bfloat16": om.soap(mu_dtype="bfloat16", preconditioner=half),
        "soap, max_dim 2048": om.soap(preconditioner=om.SOAP(max_dim=2048)),
        "soap, block_size 768": om.soap(preconditioner=om.SOAP(block_size=768)),
        "kl_soap": om.kl_soap(),
        "soap_muon": om.soap_muon(),
    }
    found = {}
    for name, optimizer in optimizers.items():
        described = om.describe_state(optimizer, params)
        kinds: dict[str, dict[str, Any]] = {}
        for row in described.rows:
            kind = f"{row.path.rpartition('blocks/')[2].partition('/')[2] or row.path}"
            entry = kinds.setdefault(
                kind,
                {"shape": row.shape, "leaves": 0, "parameters": 0, "state": 0},
            )
            entry["leaves"] += 1
            entry["parameters"] += row.parameter_bytes
            entry["state"] += row.state_bytes
        found[name] = {
            "parameter_bytes": described.parameter_bytes,
            "state_bytes": described.state_bytes,
            "ratio": described.ratio,
            "kinds": kinds,
        }
    return found


def table(path: str | Path) -> str:
    """Returns the results as Markdown."""
    result = json.loads(Path(path).read_text())
    lines = []
    for name, measured in result["sets"].items():
        lines += [
            f"{name}, {measured['matrices']} matrices, {measured['cycles']} times "
            f"{measured['cycle']} updates:\n",
            "| optimizer | ms, mean | over AdamW | over Muon | ms, median "
            "| slowest over median | state MiB |",
            "| --- " * 7 + "|",
        ]
        lines += [
            f"| {who} | {row['mean_seconds'] * 1e3:.4g} | {row['over_adamw']:.3g} "
            f"| {row['over_muon']:.3g} | {row['median_seconds'] * 1e3:.4g} "
            f"| {row['slowest_over_median']:.2f} | {row['state_bytes'] / 2**20:.1f} |"
            for who, row in measured["rows"].items()
        ]
        lines.append("")
    if "memory" in result:
        first = next(iter(result["memory"].values()))
        lines += [
            "GPT-2 small, "
            f"{first['parameter_bytes'] / 2**20:,.0f} MiB of parameters:\n",
            "| optimizer | state MiB | over parameters | a layer's attention, MiB "
            "| its MLP, MiB |",
            "| --- " * 5 + "|",
        ]
        for who, row in result["memory"].items():
            by = collections.Counter()
            for kind, entry in row["kinds"].items():
                by[kind.partition("/")[0]] += entry["state"] / entry["leaves"]
            lines.append(
                f"| {who} | {row['state_bytes'] / 2**20:,.0f} | {row['ratio']:.2f} "
                f"| {by['attn'] / 2**20:.1f} | {by['mlp'] / 2**20:.1f} |"
            )
    return "\n".join(lines).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="file to write the results to")
    parser.add_argument("--table", help="print the tables of a file and exit")
    parser.add_argument("--sets", nargs="*", choices=list(SETS), default=["gpt-128"])
    parser.add_argument("--refresh", nargs="+", type=int, default=[1, 10, 100])
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--cycle", type=int, default=CYCLE, help="updates per cycle")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return
    if not args.out:
        parser.error("one of --out and --table is needed")
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.preconditioners", *sys.argv[1:]]),
        "environment": step_time.environment(),
        "seeds": {"parameters": 0, "gradients": list(range(1, 9))},
        "memory": memory(),
        "sets": {},
    }
    for name in args.sets:
        load = os.getloadavg()
        measured = measure(SETS[name], args.cycles, args.cycle, args.refresh)
        measured["load_average"] = {"begin": load, "end": os.getloadavg()}
        result["sets"][name] = measured
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
