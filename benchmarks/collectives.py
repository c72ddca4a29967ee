"""Counts what an optimizer update exchanges over a mesh, ours beside its peers in JAX.

    python -m benchmarks.collectives --out benchmarks/results/NAME.json
    python -m benchmarks.collectives --table benchmarks/results/NAME.json

Nothing is run and nothing is timed. `compiled` is read from the text of the programs
that XLA compiles for eight simulated CPU devices: the whole of `tx.update`, with the
state donated, every gradient and every array of the state sharded as its parameter, and
the shardings of the results left to the compiler. Collectives within a loop are counted
as often as the loop runs.

`predicted` is what `describe_placement` says about orthogonalizing large models, on
meshes that are only described. `peers_of_models` is compiled for as many simulated
devices. optax.contrib.muon works leaf by leaf, so its update of one layer is compiled
and multiplied by the number of layers; XLA may combine collectives of several layers,
so these counts are upper bounds. MaxText's muon shards stacks of layers, so it gets
each kernel of all layers as one leaf.

On TPU and GPU, XLA also combines collectives and overlaps them with products: the
numbers say what a partitioning sends, not how many calls or how long it takes there.
"""

import argparse
import collections
import importlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax import P
from jax.sharding import AxisType, NamedSharding

import optax_matrix as om
from benchmarks import hlo
from benchmarks.step_time import PEER, environment, table_head, table_row

MAXTEXT, MAXTEXT_MODULE = "maxtext.muon", "maxtext.optimizers.muon"
OURS = "ours"
DEVICES = 8
MOST_DEVICES = 1024
WIDTH = 256
# A training step, of which the update is a share: 6 FLOPs per parameter and token.
TOKENS_PER_STEP = 4_000_000

Shapes = dict[str, tuple[tuple[int, ...], P]]
Mesh = tuple[tuple[int, ...], tuple[str, ...]]
Leaves = dict[str, jax.ShapeDtypeStruct]


class Case(NamedTuple):
    """Leaves of a model, their shardings, and the axes of inputs and outputs."""

    mesh: Mesh
    leaves: Shapes
    axes: tuple[int, int] = (-2, -1)


def gpt(
    d: int, layers: int, spec: Callable[[str], P], scan_axis: int | None = None
) -> Shapes:
    """Returns the matrices of a GPT, one per leaf or stacked on the scan axis."""
    kernels = {**dict.fromkeys("qkvo", (d, d)), "up": (d, 4 * d), "down": (4 * d, d)}
    if scan_axis is None:
        return {
            f"{name}{layer}": (shape, spec(name))
            for layer in range(layers)
            for name, shape in kernels.items()
        }
    stacks: Shapes = {}
    for name, shape in kernels.items():
        sizes = (*shape[:scan_axis], layers, *shape[scan_axis:])
        stacks[name] = (sizes, spec(name))
    return stacks


def cases(d: int) -> dict[str, Case]:
    """Returns ways to shard a model of width `d` over eight devices."""
    one, two = ((8,), ("x",)), ((2, 4), ("d", "f"))
    hybrid = ((2, 4), ("replica", "shard"))

    def megatron(name: str) -> P:
        return P("f", "d") if name in ("o", "down") else P("d", "f")

    def inputs(name: str) -> P:
        return P("x", None)

    experts: Shapes = {}
    for layer in range(4):
        experts[f"up{layer}"] = ((8, d, 4 * d), P("d", "f", None))
        experts[f"down{layer}"] = ((8, 4 * d, d), P("d", None, "f"))
    stacked_experts: Shapes = {
        "up": ((8, 4, d, 4 * d), P("d", None, "f", None)),
        "down": ((8, 4, 4 * d, d), P("d", None, None, "f")),
    }

    def scanned(layers: int) -> Case:
        """Puts the layers on axis 1, as MaxText does: leaves are (in, layers, out)."""
        return Case(one, gpt(d, layers, lambda _: P("x"), 1), (0, -1))

    def stacked(layers: int, spec: P) -> Case:
        return Case(one, gpt(d, layers, lambda _: spec, 0))

    return {
        "replicated": Case(one, gpt(d, 4, lambda _: P())),
        "FSDP on inputs": Case(one, gpt(d, 4, inputs)),
        "FSDP on inputs, 3 layers": Case(one, gpt(d, 3, inputs)),
        "FSDP on outputs": Case(one, gpt(d, 4, lambda _: P(None, "x"))),
        "FSDP × TP": Case(two, gpt(d, 4, megatron)),
        "HSDP": Case(hybrid, gpt(d, 4, lambda _: P("shard", None))),
        "stack of 8, by layers": stacked(8, P("x")),
        "stack of 8, by inputs": stacked(8, P(None, "x")),
        "stack of 12, by inputs": stacked(12, P(None, "x")),
        "scan axis 1 of 8, by inputs": scanned(8),
        "scan axis 1 of 12, by inputs": scanned(12),
        "MoE": Case(two, experts),
        "MoE, scan axis 1": Case(two, stacked_experts),
    }


def contenders() -> tuple[list[str], dict[str, str]]:
    """Returns the optimizers to compare, and why others are left out."""
    try:
        importlib.import_module(MAXTEXT_MODULE)
    except ImportError as error:
        return [PEER, OURS], {MAXTEXT: f"{type(error).__name__}: {error}"}
    return [PEER, MAXTEXT, OURS], {}


def optimizer(
    name: str, case: Case, params: Leaves, placement: om.Placement | None = None
) -> optax.GradientTransformation:
    """Returns the implementation of Muon called `name`, for every leaf.

    All take five Newton-Schulz steps with Jordan's coefficients and bias-corrected
    Nesterov momentum of 0.95.
    """
    numbers = optax.contrib.MuonDimensionNumbers(*case.axes)
    if name == PEER:
        return optax.contrib.muon(0.02, muon_weight_dimension_numbers=numbers)
    if name == MAXTEXT:
        maxtext = importlib.import_module(MAXTEXT_MODULE)
        sharded = {
            k: maxtext.ShardedMuonDimensionNumbers(*case.axes, leaf.sharding)
            for k, leaf in params.items()
        }
        return maxtext.muon(0.02, muon_weight_dimension_numbers=sharded)
    return om.muon(
        0.02, debias=True, routing=lambda path, leaf: numbers, placement=placement
    )


def shaped(
    case: Case, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, dtype: str
) -> Leaves:
    """Returns descriptions of the leaves with their shardings on a mesh."""
    return {
        k: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for k, (shape, spec) in case.leaves.items()
    }


def compiled(name: str, case: Case, kind: AxisType | None) -> dict[str, Any]:
    """Describes the compiled update; without a kind of mesh, that for one device."""
    if kind is None:
        leaves = case.leaves.items()
        params = {k: jax.ShapeDtypeStruct(s, "float32") for k, (s, _) in leaves}
        return _read(optimizer(name, case, params), params, None)
    mesh = jax.make_mesh(*case.mesh, (kind,) * len(case.mesh[0]))
    params = shaped(case, mesh, "float32")
    placement = om.Placement(params) if kind is AxisType.Auto else None
    with jax.set_mesh(mesh):
        try:
            return _read(optimizer(name, case, params, placement), params, mesh)
        # Any exception is a result: the update does not compile.
        except Exception as error:
            line = str(error).partition("\n")[0]
            return {"error": f"{type(error).__name__}: {line}"}


def _read(
    tx: optax.GradientTransformation, params: Leaves, mesh: jax.sharding.Mesh | None
) -> dict[str, Any]:
    """Compiles an update and reads its text."""

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """Gives a leaf of the state the sharding of the parameter of its name."""
        if mesh is None:
            return leaf
        like = params.get(getattr(path[-1], "key", ""))
        sharding = like.sharding if like is not None else NamedSharding(mesh, P())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map_with_path(place, jax.eval_shape(tx.init, params))
    lowered = jax.jit(tx.update, donate_argnums=1).lower(params, state, params)
    program = lowered.compile()
    text, memory = program.as_text(), program.memory_analysis()
    assert text is not None and memory is not None
    counts: collections.Counter[str] = collections.Counter()
    found = hlo.collectives(text)
    for collective in found:
        counts[collective.kind] += collective.count
    result = {
        "collectives": dict(sorted(counts.items())),
        "received_bytes": sum(collective.bytes for collective in found),
        "dot_flops": hlo.dot_flops(text),
        "temp_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
    }
    if mesh is not None:
        updates, new = program.output_shardings
        result["updates_sharded_as_parameters"] = _alike(updates, params)
        result["state_sharded_as_before"] = _alike(new, state)
    return result


def _alike(shardings: Any, wanted: Any) -> bool:
    return all(
        got.is_equivalent_to(leaf.sharding, len(leaf.shape))
        for got, leaf in zip(
            jax.tree.leaves(shardings), jax.tree.leaves(wanted), strict=True
        )
    )


def compare(case: Case) -> list[dict[str, Any]]:
    """Compiles the optimizers on meshes of both kinds and, for FLOPs, on one device."""
    rows = []
    for name in contenders()[0]:
        even = compiled(name, case, None)["dot_flops"] / DEVICES
        for kind in (AxisType.Explicit, AxisType.Auto):
            row = compiled(name, case, kind)
            if "error" not in row:
                row["flops_over_even"] = row["dot_flops"] / even
            rows.append({"optimizer": name, "axes": kind.name, **row})
    return rows


class Model(NamedTuple):
    """The matrices of a layer by name, and their shardings for a number of devices.

    `active_experts` is how many of its experts a token of a mixture passes, whose
    matrices have the experts as their first axis.
    """

    layers: int
    matrices: dict[str, tuple[int, ...]]
    shard: Callable[[int], tuple[str, Mesh, Callable[[str], P]]]
    devices: tuple[int, ...]
    active_experts: int = 1

    def step_flops(self) -> float:
        """Returns the FLOPs of a training step, counting active experts only."""
        sizes = (
            math.prod(shape[-2:]) * (self.active_experts if len(shape) > 2 else 1)
            for shape in self.matrices.values()
        )
        return 6 * self.layers * sum(sizes) * TOKENS_PER_STEP


def _dense_specs(devices: int) -> tuple[str, Mesh, Callable[[str], P]]:
    """Shards by FSDP on the model's width, and by TP of 8 beyond 256 devices."""
    tensor = 8 if devices > 256 else 1
    axes = ("d", "f" if tensor > 1 else None)
    how = f"FSDP {devices // tensor}" + (f" × TP {tensor}" if tensor > 1 else "")

    def spec(name: str) -> P:
        return P(*(axes[::-1] if name in ("o", "down") else axes))

    return how, ((devices // tensor, tensor), ("d", "f")), spec


def _moe_specs(devices: int) -> tuple[str, Mesh, Callable[[str], P]]:
    """Splits experts over 64 devices and FSDP over the rest; attention is all FSDP."""

    def spec(name: str) -> P:
        if name in ("gate", "up", "down"):
            return P("e", None, "d") if name == "down" else P("e", "d", None)
        # Matrices without a side of the model's width are sharded on their outputs.
        return P(("e", "d"), None) if name in ("q_a", "kv_a") else P(None, ("e", "d"))

    how = f"experts 64 × FSDP {devices // 64}"
    return how, ((64, devices // 64), ("e", "d")), spec


def _dense(d: int, kv: int, hidden: int) -> dict[str, tuple[int, ...]]:
    attention = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d)}
    return attention | {"gate": (d, hidden), "up": (d, hidden), "down": (hidden, d)}


_MOE = {
    **dict.fromkeys(("gate", "up"), (384, 7168, 2048)),
    **{"down": (384, 2048, 7168), "q_a": (7168, 1536), "q_b": (1536, 12288)},
    **{"kv_a": (7168, 576), "kv_b": (512, 16384), "o": (8192, 7168)},
}
MODELS = {
    "7B": Model(32, _dense(4096, 4096, 11008), _dense_specs, (8, 64, 256, 1024)),
    "70B": Model(80, _dense(8192, 1024, 28672), _dense_specs, (64, 256, 1024)),
    "1T MoE": Model(61, _MOE, _moe_specs, (64, 256, 1024), active_experts=8),
}


def predict(
    case: Case, method: str = "newton_schulz", dtype: str = "float32"
) -> dict[str, float]:
    """Returns what orthogonalization costs each device, by formula.

    `program_flops` are those in the text of the program: a device without a matrix in
    the last slot of a group skips some.
    """
    params = shaped(case, jax.sharding.AbstractMesh(*case.mesh), dtype)
    numbers = optax.contrib.MuonDimensionNumbers(*case.axes)
    costs = om.describe_placement(
        params,
        method,
        routing=lambda path, leaf: numbers,
        placement=om.Placement(params),
        backend="cpu",
    )
    program = sum(group.flops for group in costs.groups)
    return costs.totals | {"program_flops": program}


def predict_model(model: Model) -> list[dict[str, Any]]:
    """Predicts the costs for each number of devices, by method and dtype."""
    rows = []
    for devices in model.devices:
        how, mesh, spec = model.shard(devices)
        leaves = {
            f"{name}{layer}": (shape, spec(name))
            for layer in range(model.layers)
            for name, shape in model.matrices.items()
        }
        methods, dtypes = ("newton_schulz", "halley"), ("float32", "bfloat16")
        for method, dtype in itertools.product(methods, dtypes):
            begin = time.perf_counter()
            costs = predict(Case(mesh, leaves), method, dtype)
            row = {"devices": devices, "sharding": how, "method": method}
            row |= {"dtype": dtype, **costs}
            row["share_of_step"] = costs["flops"] * devices / model.step_flops()
            rows.append({**row, "seconds": time.perf_counter() - begin})
    return rows


def _stacked(layer: Shapes, layers: int) -> Shapes:
    return {k: ((layers, *shape), P(None, *spec)) for k, (shape, spec) in layer.items()}


def compile_peer(peer: str, model: Model) -> list[dict[str, Any]]:
    """Describes a peer's compiled update of a whole model."""
    rows = []
    for devices in model.devices:
        how, mesh, spec = model.shard(devices)
        layer = {name: (shape, spec(name)) for name, shape in model.matrices.items()}
        one_device = compiled(peer, Case(mesh, layer), None)["dot_flops"] * model.layers
        leaves, times = layer, model.layers
        if peer == MAXTEXT:
            leaves, times = _stacked(layer, model.layers), 1
        found = compiled(peer, Case(mesh, leaves), AxisType.Auto)
        flops = found["dot_flops"] * times
        rows.append(
            {
                **{"optimizer": peer, "devices": devices, "sharding": how},
                "compiled_times": times,
                "collectives": {k: n * times for k, n in found["collectives"].items()},
                "received_bytes": found["received_bytes"] * times,
                "dot_flops": flops,
                "flops_over_even": flops * devices / one_device,
                "share_of_step": flops * devices / model.step_flops(),
            }
        )
    return rows


def run(out: Path) -> dict[str, Any]:
    """Compiles and predicts everything and writes the file."""
    names, left_out = contenders()
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.collectives", *sys.argv[1:]]),
        "environment": environment(),
        "peers": [name for name in names if name != OURS],
        "left_out": left_out,
        "width": WIDTH,
        "dtype": "float32",
        "tokens_per_step": TOKENS_PER_STEP,
        "compiled": {},
        "predicted": {},
        "peers_of_models": {},
    }
    for name, case in cases(WIDTH).items():
        result["compiled"][name] = {
            "mesh": dict(zip(*reversed(case.mesh), strict=True)),
            "leaves": {k: [shape, str(p)] for k, (shape, p) in case.leaves.items()},
            "axes": case.axes,
            "predicted": predict(case),
            "rows": compare(case),
        }
        print(f"{name} is compiled", flush=True)
    for name, model in MODELS.items():
        result["predicted"][name] = predict_model(model)
        result["peers_of_models"][name] = [
            row for peer in result["peers"] for row in compile_peer(peer, model)
        ]
        print(f"{name} is predicted", flush=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def table(path: str | Path) -> str:
    """Returns the results as two Markdown tables."""
    result = json.loads(Path(path).read_text())
    lines = table_head(
        *("sharding", "axes", "optimizer", "collectives", "MiB received", "at least"),
        *("MFLOP", "/ even split", "temporary MiB", "shardings kept"),
    )
    for name, case in result["compiled"].items():
        # Rows that differ only in the kind of axes are one line.
        alike: dict[str, list[str]] = {}
        for row in case["rows"]:
            line = _compiled_line(name, row, case["predicted"]["least_bytes"])
            alike.setdefault(line, []).append(row["axes"].lower())
        for line, axes in alike.items():
            lines.append(line.format(axes="both" if len(axes) > 1 else axes[0]))
    lines += ["", *table_head("model", "devices", "sharding", "optimizer", *_COSTS)]
    for name, rows in result["predicted"].items():
        peers = result["peers_of_models"][name]
        for devices in dict.fromkeys(row["devices"] for row in rows):
            lines += [_peer_line(name, r) for r in peers if r["devices"] == devices]
            # bfloat16 halves the bytes and changes nothing else.
            wide = [row for row in rows if row["dtype"] == "float32"]
            lines += [our_line(name, r) for r in wide if r["devices"] == devices]
    out = result["left_out"].items()
    return "\n".join([*lines, *(f"\n{who} is left out ({why})" for who, why in out)])


def _compiled_line(name: str, row: dict[str, Any], least: float) -> str:
    """Returns a line of the first table, with a place for the kind of axes."""
    cells = [name, "{axes}", row["optimizer"]]
    if "error" in row:
        raised = f"raises {row['error'].partition(':')[0]}"
        return table_row(*cells, raised, *[""] * 6)
    counts = [f"{n} {kind}" for kind, n in row["collectives"].items()]
    kept = row["updates_sharded_as_parameters"] and row["state_sharded_as_before"]
    cells += [", ".join(counts) or "none", f"{row['received_bytes'] / 2**20:.2f}"]
    # The least bytes of an even split are no bound for peers that split otherwise.
    cells += [f"{least / 2**20:.2f}" if row["optimizer"] == OURS else ""]
    cells += [f"{row['dot_flops'] / 1e6:.0f}", f"{row['flops_over_even']:.2f}"]
    cells += [f"{row['temp_bytes'] / 2**20:.1f}"]
    return table_row(*cells, "yes" if kept else "no")


_COSTS = ("GFLOP", "/ even split", "share of a step", "exchanges", "GiB", "at least")


def _model_line(
    name: str, row: dict[str, Any], optimizer: str, flops: float, *exchanged: str
) -> str:
    cells = [name, str(row["devices"]), row["sharding"], optimizer]
    cells += [f"{flops / 1e9:,.0f}", f"{row['flops_over_even']:.2f}"]
    return table_row(*cells, f"{row['share_of_step']:.1%}", *exchanged)


def _peer_line(name: str, row: dict[str, Any]) -> str:
    """Returns a line of the second table from a compiled update."""
    count = f"{sum(row['collectives'].values()):,}"
    # XLA may combine the collectives of layers that were not compiled together.
    exchanged = (f"≤ {count}" if row["compiled_times"] > 1 else count,)
    exchanged += (f"{row['received_bytes'] / 2**30:.3g}", "")
    return _model_line(name, row, row["optimizer"], row["dot_flops"], *exchanged)


def our_line(name: str, row: dict[str, Any]) -> str:
    """Returns a line of the second table from the formulas."""
    sizes = (f"{row[key] / 2**30:.3g}" for key in ("exchanged_bytes", "least_bytes"))
    exchanged = (f"{row['exchanges']:,.0f}", *sizes)
    return _model_line(name, row, f"ours, {row['method']}", row["flops"], *exchanged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the file of results to write")
    parser.add_argument("--table", help="prints the tables of a file and ends")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
    elif args.out:
        # The devices are simulated even if there are real ones.
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", MOST_DEVICES)
        run(args.out)
    else:
        parser.error("one of --out and --table is needed")


if __name__ == "__main__":
    main()
