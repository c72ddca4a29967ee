"""Trains what is needed to answer claims about optimizers, and measures on the way.

    python -m benchmarks.convergence.claims dynamics --out DYNAMICS.jsonl

`dynamics` trains at a constant learning rate and records, every 25 steps and as means
over the hidden matrices: the Frobenius norm of the weights, the relative length of a
step, the spectral entropy and the participation ratio of the weights, and those of the
gradient with the share of its five largest singular values in its energy. `flattening`
does so with the share of singular values that 0 to 5 Newton-Schulz steps bring near 1.
`rates` trains MuonW and MuonH at five learning rates with the usual schedule, and
`transfer` five optimizers in short runs of models of four widths and four depths.
`scaled` repeats this for two of them with learning rates that are scaled from those of
the smallest model, and `auxiliary` some of that for MuonH beside an AdamW at the rate
that was best for AdamW alone. `tokens` trains MuonH for three numbers of steps, at six
multiples of all learning rates. `coordinates` records how much activations change in
ten steps of models of four widths, with and without scaled rates, and the size of the
last one. Each line of a file is a run; the same command continues an existing file.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_matrix as om
from benchmarks import jobs
from benchmarks.convergence import scaling
from benchmarks.convergence.arms import Arm, named
from benchmarks.convergence.run import fit
from benchmarks.jobs import Job
from benchmarks.trial import Trial
from examples.nanogpt import configs, record

SEEDS = (1, 2, 3)
STEPS, EVERY = 250, 25
ARMS: Mapping[str, Arm] = {
    "adamw": named(
        "adamw", {"learning_rate": 4e-3}, fixed={"b2": 0.95, "weight_decay": 0.0}
    ),
    "muon": named("muon", {"learning_rate": 0.04}),
    "muonw": named("muonw", {"learning_rate": 0.04}, fixed={"weight_decay": 0.1}),
    "muonh": named("muonh", {"learning_rate": 0.06}),
    "spectral_sphere": named("spectral_sphere", {"learning_rate": 0.1}),
}
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the learning rates


def short(optimizer: str, learning_rate: float, **fixed: Any) -> Arm:
    """Returns an arm of `transfer`, whose runs are too short for long memories."""
    decay = {"b2": 0.95} if optimizer == "adamw" else {"momentum": 0.85}
    return named(optimizer, {"learning_rate": learning_rate}, fixed={**decay, **fixed})


TRANSFERRED: Mapping[str, Arm] = {
    "adamw": short("adamw", 6e-3, weight_decay=0.0),
    "muon_spectral": short("muon", 0.06, shape_scale="spectral"),
    "muon_mup": short("muon", 0.06, shape_scale="mup"),
    "muon_rms": short("muon", 0.02, shape_scale="rms"),
    "muonh": short("muonh", 0.1),
}
SHORT = {"steps": 50, "batch_size": 8, "val_windows": 256}
SIZES = [
    *({"width": width, "layers": 1} for width in scaling.WIDTHS),
    *({"width": 64, "layers": layers} for layers in (2, 4, 8)),
]
# Arms of `transfer`, and what their learning rates mean, see `om.width_factors`.
SCALED = {"adamw": "entrywise", "muonh": "spectral"}
CHECKED = {**SCALED, "muon_spectral": "spectral", "muon_rms": "rms"}


def jobs_of(study: str) -> list[Job]:
    """Returns the runs of a study."""
    if study == "dynamics":
        return [{"arm": arm, "seed": seed} for arm in ARMS for seed in SEEDS]
    if study == "flattening":
        return [{"arm": "muon", "seed": seed} for seed in SEEDS]
    if study == "coordinates":
        return [
            {"arm": arm, "scaled": is_scaled, "seed": seed}
            for arm in CHECKED
            for seed in SEEDS
            for is_scaled in (False, True)
        ]
    if study == "tokens":
        return [
            {
                "arm": "muonh",
                **SIZES[0],
                "steps": n,
                "seed": s,
                "learning_rate": 0.1 * f,
            }
            for n in (50, 200, 800)
            for f in (*FACTORS, 8.0)
            for s in SEEDS
        ]
    if study == "auxiliary":
        rates = (0.1, 0.2, 0.4)
        return [
            {"arm": "muonh", **size, "scaled": is_scaled, "seed": s, "learning_rate": r}
            for size in (SIZES[0], SIZES[3], SIZES[-1])
            for r in rates
            for s in SEEDS
            for is_scaled in (False, True)
        ]
    arms, sizes = TRANSFERRED, SIZES
    if study == "scaled":
        arms = {arm: TRANSFERRED[arm] for arm in SCALED}
    if study == "rates":
        arms, sizes = {arm: ARMS[arm] for arm in ("muonw", "muonh")}, [{}]
    return [
        {"arm": name, **size, "seed": seed, "learning_rate": float(f"{rate:.4g}")}
        for size in sizes
        for name, arm in arms.items()
        for rate in (arm.start["learning_rate"] * factor for factor in FACTORS)
        for seed in SEEDS
        # Over depth, AdamW's rates would be those of `transfer`.
        if not (study == "scaled" and name == "adamw" and size["layers"] > 1)
    ]


def hidden(tree: Any) -> list[jax.Array]:
    """Returns the hidden matrices of the model or of its gradient."""
    return [leaf for leaf in jax.tree.leaves(tree["blocks"]) if leaf.ndim == 2]


def mean(tree: Any) -> float:
    return float(jnp.mean(jnp.concatenate([jnp.ravel(x) for x in tree])))


def spectrum(matrices: list[jax.Array]) -> dict[str, float]:
    """Returns spectral entropy (over that of equal values) and participation ratio."""
    entropies = [
        om.diagnostics.spectral_entropy(x) / math.log(min(x.shape)) for x in matrices
    ]
    ratios = [om.diagnostics.participation_ratio(x) / min(x.shape) for x in matrices]
    return {"entropy": mean(entropies), "participation": mean(ratios)}


def measure(trial: Trial) -> dict[str, Any]:
    """Takes one step and measures it, the weights before, and the gradient."""
    # Copies, because the step donates the parameters.
    before = [jnp.copy(x) for x in hidden(trial.state.params)]
    gradient = hidden(trial.gradient())
    trial.advance(1)
    after = hidden(trial.state.params)
    steps = [
        om.diagnostics.update_to_weight(b - a, a)
        for a, b in zip(before, after, strict=True)
    ]
    energies = [jnp.square(om.diagnostics.singular_values(x)) for x in gradient]
    top = [e[:, :5].sum(-1) / e.sum(-1) for e in energies]
    return {
        "step": trial.count - 1,
        "norm": mean([jnp.linalg.norm(x)[None] for x in before]),
        "relative_step": mean(steps),
        "weights": spectrum(before),
        "gradient": {**spectrum(gradient), "top_5": mean(top)},
    }


def near_one(matrices: list[jax.Array]) -> list[float]:
    """Returns the share of singular values in [1/2, 3/2] after 0 to 5 Jordan steps.

    The matrices are divided by their Frobenius norm first, as by Newton-Schulz.
    """

    def share(steps: int) -> float:
        polar = om.NewtonSchulz(steps, precision="highest").polar if steps else _unit
        sigmas = [om.diagnostics.singular_values(polar(x)) for x in matrices]
        return mean([jnp.abs(sigma - 1) <= 0.5 for sigma in sigmas])

    return [share(steps) for steps in range(6)]


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x)


def flatten(trial: Trial) -> dict[str, Any]:
    """Measures what Newton-Schulz steps make of the next update, then takes it."""
    beta = 0.95  # Muon's default
    gradient = hidden(trial.gradient())
    momentum = hidden(optax.tree.get(trial.state.optimizer, "momentum"))
    pairs = list(zip(momentum, gradient, strict=True))
    moved = [beta * m + (1 - beta) * g for m, g in pairs]
    ahead = [beta * m + (1 - beta) * g for m, g in zip(moved, gradient, strict=True)]
    point = {"step": trial.count, "gradient": near_one(gradient)}
    trial.advance(1)
    return {**point, "momentum": near_one(ahead)}


def over_steps(
    job: Job, config: configs.Config, take: Callable[[Trial], dict[str, Any]]
) -> dict[str, Any]:
    """Trains at a constant rate; `take` measures and takes one step of every 25."""
    config = dataclasses.replace(config, cooldown=0.0)
    arm = ARMS[job["arm"]]
    trial, points = Trial(config, arm.make(arm.start, config)), []
    while trial.count < config.steps:
        point = take(trial)
        trial.advance(min(EVERY, config.steps - point["step"]) - 1)
        points.append(point)
    return {
        **{"points": points, "loss": trial.validate()},
        **{"data_sha256": trial.dataset.sha256, **record.environment()},
    }


SHORT_STUDIES = ("transfer", "scaled", "auxiliary", "tokens", "coordinates")
STUDIES = ("dynamics", "flattening", "rates", *SHORT_STUDIES)


def do(study: str, job: Job, *, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Does one run."""
    short = study in SHORT_STUDIES
    basic = SHORT if short else {"steps": STEPS, "val_windows": 1024}
    size = {name: job[name] for name in ("width", "layers", "steps") if name in job}
    if study == "coordinates":
        size = {"layers": 1, "steps": scaling.UPDATES, "val_windows": 16}
    elif study == "auxiliary":
        size["aux_lr"] = 0.012  # the best of AdamW's rates for the smallest model
    elif study == "tokens":
        size["aux_lr"] = 0.12 * job["learning_rate"]  # HyperP scales all rates alike
    all_fields = {**basic, **size, "seed": job["seed"], **fields}
    config = configs.resolve(dataclasses.replace(configs.TINY, **all_fields))
    arm = (TRANSFERRED if short else ARMS)[job["arm"]]
    if study == "scaled" or job.get("scaled"):
        unit, over_depth = CHECKED[job["arm"]], job["arm"] == "muonh"
        arm = scaling.scaled(arm, unit, over_depth=over_depth)
    if study == "dynamics":
        found = over_steps(job, config, measure)
    elif study == "flattening":
        found = over_steps(job, config, flatten)
    elif study == "coordinates":
        found = {**scaling.coordinates(arm, config), **record.environment()}
    else:
        values = {"learning_rate": job["learning_rate"]}
        found = fit(config, arm.make(values, config), config.steps)
    return {"study": study, **found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2, help="concurrent processes")
    given = parser.parse_args()
    todo, one = jobs_of(given.study), functools.partial(do, given.study, fields={})
    with jobs.processes(given.workers) as pool:
        for line in jobs.run_all(todo, one, given.out, pool):
            print(line, flush=True)


if __name__ == "__main__":
    main()
