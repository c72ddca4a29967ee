"""Compares polar methods on momenta of nanoGPT: FLOPs, accuracy, rounding and time.

    export OPENBLAS_NUM_THREADS=1
    python -m benchmarks.polar_methods --record SPECTRA.json
    python -m benchmarks.polar_methods SPECTRA.json --out OUT.json
    python -m benchmarks.polar_methods --table OUT.json
    python -m benchmarks.polar_methods SPECTRA.json --plot docs/polar_methods.png

The first command trains nanoGPT `tiny` with Muon and writes the singular values of
Nesterov momenta of four matrices of width 128, relative to the Schatten-4 norm. The
second one gives them random singular vectors and measures each method:

- off: ‖OOᵀ − I‖ over √m, in float64,
- cosine: of O and the polar factor, in float64,
- float32: the difference of O in float32 from O in float64, over ‖O‖,
- bfloat16: the same for the input rounded to bfloat16; in parentheses for products in
  bfloat16 too, where a method has them.

They are means over attention (q and o) and MLP matrices (in and out) and all recorded
steps. Times are those of one random matrix of width 768 in float32, over those of five
Jordan steps in the same process: the methods take turns, and the least time of each
counts. The same way are compared two triangular solves with a matrix and the inverse of
the factorized matrix, multiplied by it, between which Halley's method chooses.
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.lax import linalg as lax_linalg
from matplotlib.figure import Figure

import optax_matrix as om
from examples.nanogpt import batches, configs, data, record, sharding, train

LAYER, STEPS, MOMENTUM = 1, (50, 150, 250), 0.95
KINDS = {
    "attention": (("attn", "q"), ("attn", "o")),
    "MLP": (("mlp", "fc"), ("mlp", "proj")),
}


def gram_rows(bound: float, steps: int) -> om.NewtonSchulz:
    """Returns Newton-Schulz on the Gram matrix with rows from a bound."""
    rows = om.polar_express_rows(bound, steps)
    return om.NewtonSchulz(
        coefficients=rows, method="gram", normalization="schatten4", precision="highest"
    )


METHODS: dict[str, Any] = {
    "`NewtonSchulz()`, five Jordan steps": om.NewtonSchulz(precision="highest"),
    "five steps of `quintic`": om.NewtonSchulz(
        coefficients="quintic", precision="highest"
    ),
    "five steps of `polar_express`": om.NewtonSchulz(
        5, coefficients="polar_express", precision="highest"
    ),
    "five steps of `cubic5`": om.NewtonSchulz(
        coefficients="cubic5", precision="highest"
    ),
    "`polar_express_rows(0.03, 3)`, Gram": gram_rows(0.03, 3),
    "`polar_express_rows(0.1, 2)`, Gram": gram_rows(0.1, 2),
    "`Halley()`, bound 0.01": om.Halley(),
    "`Halley(1e-3)`": om.Halley(1e-3),
    "`Halley(1e-3, polish=2)`": om.Halley(1e-3, polish=2),
    "`Zolotarev()`, two poles, bound 3e-3": om.Zolotarev(),
    "`MUD()`, one pass": om.MUD(),
    "`Exact()`": om.Exact(),
}
SHAPES = {"square": (768, 768), "4:1": (768, 3072)}
REPEATS = 9


def recorded() -> dict[str, Any]:
    """Trains, and returns the singular values of the momenta by kind."""
    config = dataclasses.replace(
        configs.PRESETS["tiny"],
        optimizer="muon",
        lr=0.0424,
        settings={"momentum": MOMENTUM},
    )
    config = configs.resolve(config)
    mesh = sharding.make_mesh("", "auto")
    dataset = data.load(config.data, tokenizer=config.tokenizer)
    windows = batches.Batches(dataset, config, mesh)
    graph, optimizer, state = train.initial(config, dataset.vocab_size, mesh)
    step = train.make_step(graph, optimizer, mesh, like=state)
    gradient = jax.jit(lambda params, w: jax.grad(train.loss_fn)(params, graph, w))
    found: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    for count in range(STEPS[-1] + 1):
        batch = windows.train(count)
        if count in STEPS:
            momentum = optax.tree.get(state.optimizer, "momentum")["blocks"][LAYER]
            grads = gradient(state.params, batch[0])["blocks"][LAYER]
            for kind, paths in KINDS.items():
                for outer, inner in paths:
                    m, g = (
                        np.asarray(tree[outer][inner]["kernel"][...], np.float64)
                        for tree in (momentum, grads)
                    )
                    ahead = MOMENTUM * (MOMENTUM * m + (1 - MOMENTUM) * g)
                    ahead += (1 - MOMENTUM) * g
                    sigma = np.linalg.svd(ahead, compute_uv=False)
                    sigma = sigma / np.sum(sigma**4) ** 0.25
                    found[kind].append([float(f"{s:.4g}") for s in sigma])
        state, *_ = step(state, batch)
    command = "python -m benchmarks.polar_methods --record SPECTRA.json"
    about = {"command": command, "config": dataclasses.asdict(config), "steps": STEPS}
    return {**record.environment(), **about, "singular_values": found}


def with_spectrum(sigma: np.ndarray, wide: int, seed: int) -> np.ndarray:
    """Returns a matrix with random singular vectors, m × (wide m)."""
    rng, m = np.random.default_rng(seed), len(sigma)
    left = np.linalg.qr(rng.normal(size=(m, m)))[0]
    right = np.linalg.qr(rng.normal(size=(wide * m, m)))[0]
    return (left * sigma) @ right.T


def relative(found: Any, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - want)) / float(
        np.linalg.norm(want)
    )


def accuracy(method: Any, x: np.ndarray) -> dict[str, float]:
    """Measures a method on one matrix."""
    with jax.enable_x64(True):
        exact = np.asarray(jax.jit(om.Exact().polar)(jnp.asarray(x)))
        o = np.asarray(jax.jit(method.polar)(jnp.asarray(x)))
    single = jnp.asarray(x, "float32")
    rounded = single.astype("bfloat16").astype("float32")
    row = {
        "off": float(np.linalg.norm(o @ o.T - np.eye(len(o)))) / math.sqrt(len(o)),
        "cosine": float(np.sum(o * exact))
        / float(np.linalg.norm(o) * np.linalg.norm(exact)),
        "float32": relative(jax.jit(method.polar)(single), o),
        "bfloat16_input": relative(jax.jit(method.polar)(rounded), o),
    }
    if isinstance(method, om.NewtonSchulz):
        half = dataclasses.replace(method, dtype="bfloat16", precision=None)
        row["bfloat16"] = relative(jax.jit(half.polar)(rounded), o)
    return row


def seconds(functions: dict[str, Any], *given: jax.Array) -> dict[str, float]:
    """Returns the least time of each function, which take turns."""
    run = {name: jax.jit(function) for name, function in functions.items()}
    for function in run.values():
        function(*given).block_until_ready()
    least = dict.fromkeys(run, math.inf)
    for _ in range(REPEATS):
        for name, function in run.items():
            begin = time.perf_counter()
            function(*given).block_until_ready()
            least[name] = min(least[name], time.perf_counter() - begin)
    return least


def normal(m: int, n: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (m, n))


def solved(lower: jax.Array, x: jax.Array) -> jax.Array:
    y = lax_linalg.triangular_solve(lower, x, left_side=True, lower=True)
    return lax_linalg.triangular_solve(
        lower, y, left_side=True, lower=True, transpose_a=True
    )


def multiplied(lower: jax.Array, x: jax.Array) -> jax.Array:
    eye = jnp.eye(len(lower))
    half = lax_linalg.triangular_solve(lower, eye, left_side=True, lower=True)
    return jnp.matmul(half.T @ half, x, precision="highest")


def solves_over_inverse(m: int, n: int) -> float:
    """Returns the time of two triangular solves over that of an inverse."""
    lower = jnp.linalg.cholesky(jnp.eye(m) + normal(m, m) @ normal(m, m).T / m)
    times = seconds({"solves": solved, "inverse": multiplied}, lower, normal(m, n))
    return times["solves"] / times["inverse"]


def measured(spectra: dict[str, Any]) -> dict[str, Any]:
    """Measures every method on the recorded spectra."""
    rows: dict[str, Any] = {}
    for name, method in METHODS.items():
        rows[name] = {}
        for kind, found in spectra["singular_values"].items():
            wide = 1 if kind == "attention" else 4
            each = [
                accuracy(method, with_spectrum(np.array(sigma), wide, seed))
                for seed, sigma in enumerate(found)
            ]
            rows[name][kind] = {
                key: float(np.mean([e[key] for e in each])) for key in each[0]
            }
    for shape, (m, n) in SHAPES.items():
        methods = {name: method.polar for name, method in METHODS.items()}
        times = seconds(methods, normal(m, n))
        base = times["`NewtonSchulz()`, five Jordan steps"]
        for name, method in METHODS.items():
            flops = getattr(method, "flops", None)
            rows[name][shape] = {
                "products": flops and flops(m, n) / (2 * m * m * n),
                "seconds": times[name],
                "time": times[name] / base,
            }
    command = "python -m benchmarks.polar_methods SPECTRA.json --out OUT.json"
    solves = {f"{k}:1": solves_over_inverse(768, 768 * k) for k in (1, 2, 4)}
    return {
        **record.environment(),
        "command": command,
        "rows": rows,
        "solves_over_inverse": solves,
    }


def table(path: Path) -> str:
    """Returns the table of a result, in Markdown."""
    rows = json.loads(path.read_text())["rows"]
    lines = [
        "| method | products | time | off | cosine | float32 | bfloat16 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]

    def pair(values: list[float | None], form: str) -> str:
        return " / ".join("-" if v is None else f"{v:{form}}" for v in values)

    for name, row in rows.items():
        shapes, kinds = [row[s] for s in SHAPES], [row[k] for k in KINDS]
        half = pair([k["bfloat16_input"] for k in kinds], ".0e")
        if "bfloat16" in kinds[0]:
            half += f" ({pair([k['bfloat16'] for k in kinds], '.0e')})"
        cells = [
            name,
            pair([s["products"] for s in shapes], ".3g"),
            pair([s["time"] for s in shapes], ".2f"),
            pair([k["off"] for k in kinds], ".2f"),
            pair([k["cosine"] for k in kinds], ".3f"),
            pair([k["float32"] for k in kinds], ".0e"),
            half,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mapped(method: Any, sigma: np.ndarray, frobenius: float) -> np.ndarray:
    """Returns what becomes of singular values, over the Schatten-4 norm.

    Args:
      method: A method that keeps singular vectors.
      sigma: The singular values.
      frobenius: The Frobenius norm over the Schatten-4 norm, for the methods that
        divide by it.
    """
    if isinstance(method, om.NewtonSchulz):
        schatten4 = method.normalization == "schatten4"
        sigma = sigma if schatten4 else sigma / frobenius
    else:
        for h in method.maps:
            sigma = h(sigma)
    for a, b, c in method.rows:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


def plot(spectra: Path, out: Path) -> None:
    """Writes a figure of the maps of singular values, above the recorded ones."""
    found = json.loads(spectra.read_text())["singular_values"]
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    norms = [np.linalg.norm(sigma) for values in found.values() for sigma in values]
    frobenius, sigma = float(np.mean(norms)), np.geomspace(1e-4, 1.0, 801)
    for name, method in METHODS.items():
        if hasattr(method, "rows"):
            newton = isinstance(method, om.NewtonSchulz)
            style = {"linestyle": "--", "linewidth": 1} if newton else {"linewidth": 2}
            label = name.replace("`", "")
            axes.plot(sigma, mapped(method, sigma, frobenius), label=label, **style)
    axes.axhline(1.0, color="black", linewidth=0.5)
    axes.set(xscale="log", ylabel="singular value of the result")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    edges = np.geomspace(1e-4, 1.0, 41)
    for kind, values in found.items():
        counts, _ = np.histogram(np.concatenate(values), edges)
        below.stairs(counts / counts.sum(), edges, label=kind, fill=True, alpha=0.5)
    below.set(xlabel="singular value over the Schatten-4 norm", ylabel="share")
    below.legend(fontsize="x-small")
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spectra", type=Path, nargs="?")
    parser.add_argument("--record", type=Path, help="train, and write spectra here")
    parser.add_argument("--out", type=Path, help="measure, and write the result here")
    parser.add_argument("--table", type=Path, help="print the table of a result")
    parser.add_argument("--plot", type=Path, help="plot the maps and the spectra")
    arguments = parser.parse_args()
    if (arguments.out or arguments.plot) and not arguments.spectra:
        parser.error("--out and --plot need the file that --record has written")
    if arguments.record:
        arguments.record.write_text(json.dumps(recorded()) + "\n")
    if arguments.out:
        spectra = json.loads(arguments.spectra.read_text())
        arguments.out.write_text(json.dumps(measured(spectra), indent=1) + "\n")
    if arguments.plot:
        plot(arguments.spectra, arguments.plot)
    if arguments.table:
        print(table(arguments.table))


if __name__ == "__main__":
    main()
