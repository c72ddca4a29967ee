"""Trains nanoGPT `tiny` with every stage and optimizer of the field's records, once.

    python -m benchmarks.nanogpt_stages --out OUT.json
    python -m benchmarks.nanogpt_stages --table OUT.json

It shows that each of them trains the example: the validation loss before and after
`--steps` steps of the usual schedule, on seed 0, at one learning rate that was not
tuned. It ranks nothing. Stages stand in a chain of Muon, in the place that their
documentation gives them.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optax

import optax_matrix as om
from benchmarks.trial import Trial
from examples.nanogpt import configs, record, train

Stage = optax.GradientTransformation
Chain = Callable[[Any], Stage]
NEW_OPTIMIZERS = (
    *("nanochat_muon", "track3", "muon_vs", "muon_nsr", "muon_squared", "mano"),
    *("dion", "muown", "spectral_sphere", "spel"),
)


def muon(
    rate: Any,
    *,
    momentum: Stage | None = None,
    before: Chain | None = None,
    orthogonalize: Any = "newton_schulz",
    after: Chain | None = None,
    last: Chain | None = None,
) -> Chain:
    """Returns a chain of Muon with other or further stages."""

    def chain(layout: Any) -> Stage:
        polar = orthogonalize
        if not isinstance(polar, optax.GradientTransformation):
            polar = om.orthogonalize(polar, layout=layout)
        stages = [
            momentum or om.ema_momentum(0.95),
            before and before(layout),
            polar,
            om.scale_by_shape("spectral", layout=layout),
            after and after(layout),
            optax.scale_by_learning_rate(rate),
            last and last(layout),
        ]
        return optax.chain(*[stage for stage in stages if stage is not None])

    return chain


def orthogonal(layout: Any) -> Stage:
    return om.normalize_frobenius("orthogonal", layout=layout)


def chains(rate: Any) -> dict[str, Chain]:
    """Returns chains by the name of the stage that they have and Muon has not."""

    def cautious(layout: Any) -> Stage:
        return om.add_cautious_weight_decay(0.1)

    def sphere(layout: Any) -> Stage:
        return om.spectral_sphere_retract(layout=layout)

    rows = om.NewtonSchulz(
        coefficients=om.polar_express_rows(0.03, 3),
        method="gram",
        normalization="schatten4",
        precision="highest",
    )
    return {
        "(Muon)": muon(rate),
        "mixed_momentum": muon(rate, momentum=om.mixed_momentum()),
        "scale_by_noise": muon(rate, momentum=om.scale_by_noise()),
        "whiten_momentum": muon(rate, momentum=om.whiten_momentum()),
        "whiten_momentum, two kernels": muon(
            rate,
            momentum=om.whiten_momentum(decays=(0.85, 0.98), weights=(0.4385, 0.5615)),
        ),
        "equalize_norms before": muon(
            rate, before=lambda layout: om.equalize_norms(layout=layout)
        ),
        "equalize_norms after": muon(
            rate, after=lambda layout: om.equalize_norms(layout=layout)
        ),
        "normalize_frobenius": muon(rate, after=orthogonal),
        "add_cautious_weight_decay": muon(rate, after=cautious),
        "floor_update_ratio per output": muon(
            rate,
            after=lambda layout: om.floor_update_ratio(per="output", layout=layout),
        ),
        "radial_brake": muon(rate, after=lambda layout: om.radial_brake(layout=layout)),
        "radial_retract": muon(
            rate, last=lambda layout: om.radial_retract(layout=layout)
        ),
        "Halley": muon(rate, orthogonalize="halley", after=orthogonal),
        "Halley, polished": muon(rate, orthogonalize=om.Halley(1e-3, polish=2)),
        "Zolotarev": muon(rate, orthogonalize="zolotarev", after=orthogonal),
        "MUD": muon(rate, orthogonalize="mud", after=orthogonal),
        "MUD and svd_supplement": muon(
            rate,
            orthogonalize=optax.chain(om.orthogonalize("mud"), om.svd_supplement(4)),
            after=orthogonal,
        ),
        "polar_express_rows": muon(rate, orthogonalize=rows, after=orthogonal),
        "orthogonalize_cached": muon(
            rate, orthogonalize=om.orthogonalize_cached(), after=orthogonal
        ),
        "orthogonalize_with_feedback": muon(
            rate,
            momentum=optax.identity(),
            orthogonalize=om.orthogonalize_with_feedback(),
        ),
        "oblique_tangent": muon(
            lambda count: 0.1 * rate(count), orthogonalize=om.oblique_tangent()
        ),
        "tangent_orthogonalize": muon(
            rate, orthogonalize=om.tangent_orthogonalize(bisections=8), last=sphere
        ),
        "spectral_sphere_retract": muon(rate, last=sphere),
        "stiefel_retract": muon(
            rate, last=lambda layout: om.stiefel_retract(layout=layout)
        ),
        "spectral_norm_cap": muon(
            rate, last=lambda layout: om.spectral_norm_cap(2.0, layout=layout)
        ),
    }


def optimizers(config: configs.Config) -> dict[str, Stage]:
    """Returns whole optimizers by name."""
    rate = train.schedule(0.04, config)
    auxiliary = optax.adamw(train.schedule(config.aux_lr, config), b2=0.95)
    found: dict[str, Stage] = {
        name: om.partition(chain, auxiliary) for name, chain in chains(rate).items()
    }
    steps = config.steps
    found["ema_lookahead"] = om.ema_lookahead(found["(Muon)"])
    found["tail_average"] = om.tail_average(found["(Muon)"], start=steps // 2)
    for name in NEW_OPTIMIZERS:
        own = dataclasses.replace(config, optimizer=name)
        found[f"om.{name}"] = train.make_optimizer(own)
    return found


def run(config: configs.Config, optimizer: Stage) -> tuple[float, float]:
    """Returns the validation losses before and after training."""
    trial = Trial(config, optimizer)
    before = trial.validate()
    trial.advance(config.steps)
    return before, trial.validate()


def table(path: Path) -> str:
    """Returns the table of a result, in Markdown."""
    lines = ["| stage or optimizer | loss before | after |", "| --- | --- | --- |"]
    for name, (before, after) in json.loads(path.read_text())["rows"].items():
        lines.append(f"| {name} | {before:.3f} | {after:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="train, and write the result here")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--table", type=Path, help="print the table of a result")
    arguments = parser.parse_args()
    if arguments.out:
        config = configs.resolve(
            dataclasses.replace(configs.PRESETS["tiny"], steps=arguments.steps)
        )
        rows = {}
        for name, optimizer in optimizers(config).items():
            rows[name] = run(config, optimizer)
            print(name, *rows[name], flush=True)
            command = f"python -m benchmarks.nanogpt_stages --steps {arguments.steps}"
            about = {**record.environment(), "command": f"{command} --out OUT.json"}
            result = {**about, "config": dataclasses.asdict(config), "rows": rows}
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.table:
        print(table(arguments.table))


if __name__ == "__main__":
    main()
