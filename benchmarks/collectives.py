"""What an optimizer update exchanges over a mesh, beside optax.contrib.muon.

    python -m benchmarks.collectives --out benchmarks/results/NAME.json
    python -m benchmarks.collectives --table benchmarks/results/NAME.json

Nothing is run and nothing is timed. `compiled` is read from the text of programs that
XLA makes for eight simulated CPU devices: the whole of `tx.update`, the state donated,
every array of it and every gradient sharded as its parameter, where results lie left to
the compiler. `predicted` is what `describe_placement` says of the orthogonalization of
large models on meshes that are only described. `peer_of_models` is the peer's update of
one layer, compiled for as many simulated devices, times the layers, as it takes every
leaf by itself; XLA may combine collectives of several layers, so these are at most.

XLA for TPU and GPU goes on to combine collectives and overlaps them with products: the
numbers say what a partitioning sends, not how many calls or how long it takes there.
"""

import argparse
import collections
import itertools
import json
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
from benchmarks.step_time import PEER, environment

OURS = "ours"
DEVICES = 8
MOST_DEVICES = 1024
WIDTH = 256
# FLOPs alone, and links as slow as between hosts: see `om.Placement`.
FLOPS_PER_BYTE = (0, 8000)

Shapes = dict[str, tuple[tuple[int, ...], P]]
Mesh = tuple[tuple[int, ...], tuple[str, ...]]
Leaves = dict[str, jax.ShapeDtypeStruct]


class Case(NamedTuple):
    """Leaves of a model and how they lie on a mesh."""

    mesh: Mesh
    leaves: Shapes


def gpt(d: int, layers: int, spec: Callable[[str], P], stack: bool = False) -> Shapes:
    """The hidden matrices of a GPT; `stack` has the layers in one leaf a kernel."""
    kernels = {**dict.fromkeys("qkvo", (d, d)), "up": (d, 4 * d), "down": (4 * d, d)}
    if stack:
        return {name: ((layers, *s), spec(name)) for name, s in kernels.items()}
    return {
        f"{name}{layer}": (shape, spec(name))
        for layer in range(layers)
        for name, shape in kernels.items()
    }


def cases(d: int) -> dict[str, Case]:
    """How people shard a model of width `d` over eight devices."""
    one, two = ((8,), ("x",)), ((2, 4), ("d", "f"))

    def megatron(name: str) -> P:
        return P("f", "d") if name in ("o", "down") else P("d", "f")

    moe: Shapes = {}
    for layer in range(4):
        moe[f"up{layer}"] = ((8, d, 4 * d), P("d", "f", None))
        moe[f"down{layer}"] = ((8, 4 * d, d), P("d", None, "f"))
    hybrid = ((2, 4), ("replica", "shard"))
    return {
        "replicated": Case(one, gpt(d, 4, lambda _: P())),
        "FSDP on inputs": Case(one, gpt(d, 4, lambda _: P("x", None))),
        "FSDP on outputs": Case(one, gpt(d, 4, lambda _: P(None, "x"))),
        "FSDP × TP": Case(two, gpt(d, 4, megatron)),
        "HSDP": Case(hybrid, gpt(d, 4, lambda _: P("shard", None))),
        "stacked, by layers": Case(one, gpt(d, 8, lambda _: P("x"), True)),
        "stacked, by inputs": Case(one, gpt(d, 8, lambda _: P(None, "x"), True)),
        "MoE": Case(two, moe),
    }


def optimizer(
    name: str, placement: om.Placement | None = None
) -> optax.GradientTransformation:
    """Five steps of Jordan's Newton-Schulz on every leaf, momentum 0.95 with Nesterov.

    Axes before the last two count matrices: the peer has to be told, ours is by rule.
    """
    if name == PEER:
        numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
        return optax.contrib.muon(0.02, muon_weight_dimension_numbers=numbers)
    return om.muon(
        0.02, debias=True, routing=lambda path, leaf: True, placement=placement
    )


def shaped(
    case: Case, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, dtype: str
) -> Leaves:
    """Descriptions of the leaves as they lie on a mesh."""
    return {
        k: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for k, (shape, spec) in case.leaves.items()
    }


def compiled(name: str, case: Case, kind: AxisType | None) -> dict[str, Any]:
    """What the update is compiled to; on one device if there is no kind of mesh."""
    if kind is None:
        leaves = case.leaves.items()
        params = {k: jax.ShapeDtypeStruct(s, "float32") for k, (s, _) in leaves}
        return _read(optimizer(name), params, None)
    mesh = jax.make_mesh(*case.mesh, (kind,) * len(case.mesh[0]))
    params = shaped(case, mesh, "float32")
    told = om.Placement(params) if kind is AxisType.Auto else None
    with jax.set_mesh(mesh):
        try:
            return _read(optimizer(name, told), params, mesh)
        # Whatever it is, that it does not work is the result.
        except Exception as error:
            line = str(error).partition("\n")[0]
            return {"error": f"{type(error).__name__}: {line}"}


def _read(
    tx: optax.GradientTransformation, params: Leaves, mesh: jax.sharding.Mesh | None
) -> dict[str, Any]:
    """Compiles an update and reads its text."""

    def lies(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """A leaf of the state, which has the sharding of the parameter of its name."""
        if mesh is None:
            return leaf
        like = params.get(getattr(path[-1], "key", ""))
        sharding = like.sharding if like is not None else NamedSharding(mesh, P())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map_with_path(lies, jax.eval_shape(tx.init, params))
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
        result["updates_lie_as_parameters"] = _alike(updates, params)
        result["state_lies_as_before"] = _alike(new, state)
    return result


def _alike(shardings: Any, wanted: Any) -> bool:
    return all(
        got.is_equivalent_to(leaf.sharding, len(leaf.shape))
        for got, leaf in zip(
            jax.tree.leaves(shardings), jax.tree.leaves(wanted), strict=True
        )
    )


def compare(case: Case) -> list[dict[str, Any]]:
    """Both optimizers on a mesh of either kind, each beside itself on one device."""
    rows = []
    for name in (PEER, OURS):
        even = compiled(name, case, None)["dot_flops"] / DEVICES
        for kind in (AxisType.Explicit, AxisType.Auto):
            row = compiled(name, case, kind)
            if "error" not in row:
                row["flops_over_even"] = row["dot_flops"] / even
            rows.append({"optimizer": name, "axes": kind.name, **row})
    return rows


class Model(NamedTuple):
    """Matrices by name, for each layer; `lie` says how on so many devices."""

    layers: int
    matrices: dict[str, tuple[int, ...]]
    lie: Callable[[int], tuple[str, Mesh, Callable[[str], P]]]
    devices: tuple[int, ...]


def _dense_specs(devices: int) -> tuple[str, Mesh, Callable[[str], P]]:
    """FSDP on the model's width, and beyond 256 devices tensors over eight as well."""
    tensor = 8 if devices > 256 else 1
    axes = ("d", "f" if tensor > 1 else None)
    how = f"FSDP {devices // tensor}" + (f" × TP {tensor}" if tensor > 1 else "")

    def spec(name: str) -> P:
        return P(*(axes[::-1] if name in ("o", "down") else axes))

    return how, ((devices // tensor, tensor), ("d", "f")), spec


def _moe_specs(devices: int) -> tuple[str, Mesh, Callable[[str], P]]:
    """64 slices of the experts, FSDP over the rest; attention is FSDP over all."""

    def spec(name: str) -> P:
        if name in ("gate", "up", "down"):
            return P("e", None, "d") if name == "down" else P("e", "d", None)
        # Where the model's width is no side of the matrix, its outputs are cut.
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
    "1T MoE": Model(61, _MOE, _moe_specs, (64, 256, 1024)),
}


def predict(
    case: Case,
    method: str = "newton_schulz",
    dtype: str = "float32",
    flops_per_byte: float = 0.0,
) -> dict[str, float]:
    """What orthogonalization costs a device by formula, without devices."""
    params = shaped(case, jax.sharding.AbstractMesh(*case.mesh), dtype)
    placement = om.Placement(params, flops_per_byte=flops_per_byte)
    return om.describe_placement(
        params, method, routing=lambda _, leaf: True, placement=placement
    ).totals


def predict_model(model: Model) -> list[dict[str, Any]]:
    """The costs on all numbers of devices, by method, dtype and worth of a byte."""
    rows = []
    for devices in model.devices:
        how, mesh, spec = model.lie(devices)
        leaves = {
            f"{name}{layer}": (shape, spec(name))
            for layer in range(model.layers)
            for name, shape in model.matrices.items()
        }
        for method, dtype, worth in itertools.product(
            ("newton_schulz", "halley"), ("float32", "bfloat16"), FLOPS_PER_BYTE
        ):
            begin = time.perf_counter()
            costs = predict(Case(mesh, leaves), method, dtype, worth)
            row = {"devices": devices, "sharding": how, "method": method}
            row |= {"dtype": dtype, "flops_per_byte": worth, **costs}
            rows.append({**row, "seconds": time.perf_counter() - begin})
    return rows


def compile_peer(model: Model) -> list[dict[str, Any]]:
    """What the peer's update of a whole model is compiled to, from that of a layer."""
    rows = []
    for devices in model.devices:
        how, mesh, spec = model.lie(devices)
        layer = {name: (shape, spec(name)) for name, shape in model.matrices.items()}
        case = Case(mesh, layer)
        even = compiled(PEER, case, None)["dot_flops"] / devices
        found = compiled(PEER, case, AxisType.Auto)
        counts = {k: n * model.layers for k, n in found["collectives"].items()}
        rows.append(
            {
                **{"devices": devices, "sharding": how, "layers_compiled": 1},
                "collectives": counts,
                "received_bytes": found["received_bytes"] * model.layers,
                "dot_flops": found["dot_flops"] * model.layers,
                "flops_over_even": found["dot_flops"] / even,
            }
        )
    return rows


def run(out: Path) -> dict[str, Any]:
    """Compiles and predicts everything and writes the file."""
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.collectives", *sys.argv[1:]]),
        "environment": environment(),
        "peer": PEER,
        "width": WIDTH,
        "dtype": "float32",
        "compiled": {},
        "predicted": {},
        "peer_of_models": {},
    }
    for name, case in cases(WIDTH).items():
        result["compiled"][name] = {
            "mesh": dict(zip(*reversed(case.mesh), strict=True)),
            "leaves": {k: [shape, str(p)] for k, (shape, p) in case.leaves.items()},
            "predicted": predict(case),
            "rows": compare(case),
        }
        print(f"{name} is compiled", flush=True)
    for name, model in MODELS.items():
        result["predicted"][name] = predict_model(model)
        result["peer_of_models"][name] = compile_peer(model)
        print(f"{name} is predicted", flush=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def table(path: str | Path) -> str:
    """The results as two Markdown tables."""
    result = json.loads(Path(path).read_text())
    lines = _head(
        *("sharding", "axes", "optimizer", "collectives", "MiB received"),
        *(
            "at least",
            "MFLOP",
            "/ even split",
            "temporary MiB",
            "results lie as inputs",
        ),
    )
    for name, case in result["compiled"].items():
        # What differs in the kind of axes alone is one line.
        alike: dict[str, list[str]] = {}
        for row in case["rows"]:
            line = _compiled_line(name, row, case["predicted"]["least_bytes"])
            alike.setdefault(line, []).append(row["axes"].lower())
        for line, axes in alike.items():
            lines.append(line.format(axes="both" if len(axes) > 1 else axes[0]))
    names = ("model", "devices", "sharding", "method", "FLOPs a byte")
    lines += ["", *_head(*names, *_COSTS)]
    for name, rows in result["predicted"].items():
        for peer in result["peer_of_models"][name]:
            lines.append(_peer_line(name, peer))
            for row in rows:
                # bfloat16 has half the bytes, and else the same.
                if row["dtype"] == "float32" and row["devices"] == peer["devices"]:
                    lines.append(_predicted_line(name, row))
    return "\n".join(lines)


def _peer_line(name: str, row: dict[str, Any]) -> str:
    """A line of the second table, of one compiled layer times the layers."""
    cells = [name, str(row["devices"]), row["sharding"], PEER, ""]
    cells += [f"{row['dot_flops'] / 1e9:,.0f}", f"{row['flops_over_even']:.2f}"]
    cells += [f"≤ {sum(row['collectives'].values()):,} collectives"]
    cells += [f"{row['received_bytes'] / 2**30:,.0f}"]
    return _row(*cells, *[""] * (len(_COSTS) - 4))


def _predicted_line(name: str, row: dict[str, Any]) -> str:
    """A line of the second table, by formula."""
    cells = [name, str(row["devices"]), row["sharding"], f"ours, {row['method']}"]
    cells += [f"{row['flops_per_byte']:,}"]
    costs = [f"{row[key] / unit:{form}}" for key, unit, form in _COSTS.values()]
    return _row(*cells, *costs)


def _compiled_line(name: str, row: dict[str, Any], least: float) -> str:
    """A line of the first table, with a place for the kind of axes."""
    cells = [name, "{axes}", row["optimizer"]]
    if "error" in row:
        return _row(*cells, f"raises {row['error'].partition(':')[0]}", *[""] * 6)
    counts = [f"{n} {kind}" for kind, n in row["collectives"].items()]
    kept = row["updates_lie_as_parameters"] and row["state_lies_as_before"]
    cells += [", ".join(counts) or "none", f"{row['received_bytes'] / 2**20:.2f}"]
    # Of an even split, which the peer makes no attempt at.
    cells += [f"{least / 2**20:.2f}" if row["optimizer"] == OURS else ""]
    cells += [f"{row['dot_flops'] / 1e6:.0f}", f"{row['flops_over_even']:.2f}"]
    cells += [f"{row['temp_bytes'] / 2**20:.1f}"]
    return _row(*cells, "yes" if kept else "no")


_COSTS = {
    "GFLOP": ("flops", 1e9, ",.0f"),
    "/ even split": ("flops_over_even", 1, ".2f"),
    "exchanges": ("exchanges", 1, ".0f"),
    "GiB exchanged": ("exchanged_bytes", 2**30, ".3g"),
    "least GiB": ("least_bytes", 2**30, ".3g"),
    "sums": ("sums", 1, ".0f"),
    "gathers": ("gathers", 1, ".0f"),
    "GiB of parts": ("part_bytes", 2**30, ".3g"),
}


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _head(*cells: str) -> list[str]:
    return [_row(*cells), "| --- " * len(cells) + "|"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the file of results to write")
    parser.add_argument("--table", help="prints the tables of a file and ends")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
    elif args.out:
        # The devices are simulated, also where there are others.
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", MOST_DEVICES)
        run(args.out)
    else:
        parser.error("one of --out and --table is needed")


if __name__ == "__main__":
    main()
