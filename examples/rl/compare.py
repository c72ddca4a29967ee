"""Trains Adam and Hopper from the same base, and shows what both learned on one card.

python -m examples.rl.compare
python -m examples.rl.compare --optimizers adam muon --steps 100

One seed and one learning rate for each cannot rank optimizers: the card shows what
reinforcement learning changes. It is written to runs/rl/scorecard.txt and .png.
"""

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.rl import base, configs, evaluate, task, train
from examples.rl.task import Problem

SHOWN = ("sum", "age", "two", "par_easy", "par_hard", "seq")


def examples() -> list[Problem]:
    """Returns the six problems of the card: the first test problem of six kinds."""
    held = task.held_out("test", 8)
    return [next(p for p in held if p.kind == kind) for kind in SHOWN]


def answers(graph: Any, policies: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns what each policy responds to the six problems."""
    return {
        name: evaluate.respond(graph, params, examples())
        for name, params in policies.items()
    }


def marked(response: str, problem: Problem) -> str:
    """Returns a response with a mark of whether it is right."""
    right = evaluate.grade(response, problem).correct
    return f"{'✓' if right else '✗'} {response}"


def text(
    accuracy: Mapping[str, Mapping[str, Any]], responses: Mapping[str, Sequence[str]]
) -> str:
    """Returns the card as text.

    Args:
      accuracy: The result of `evaluate.greedy` by policy.
      responses: The responses to `examples` by policy.
    """
    width = max(len(name) for name in accuracy) + 2
    kinds = (*task.KINDS, "all")
    lines = ["Share of test problems that are right, at temperature 0", ""]
    lines.append(" " * width + "".join(f"{kind:>10}" for kind in kinds))
    for name, found in accuracy.items():
        shares = [*(found["by_kind"][kind] for kind in task.KINDS), found["all"]]
        lines.append(f"{name:<{width}}" + "".join(f"{s:>10.2f}" for s in shares))
    for place, problem in enumerate(examples()):
        lines += ["", f"{problem.prompt} ({problem.answer})"]
        lines += [
            f"  {name:<{width}}{marked(given[place], problem)}"
            for name, given in responses.items()
        ]
    return "\n".join(lines)


def plot(
    accuracy: Mapping[str, Mapping[str, Any]],
    responses: Mapping[str, Sequence[str]],
    curves: Mapping[str, Sequence[tuple[int, float]]],
    path: Path,
) -> None:
    """Writes the card as a picture, with the accuracy during training."""
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    (bars, lines), (left, right) = figure.subplots(2, 2, height_ratios=(1, 0.9))
    share = 0.8 / len(accuracy)
    for place, (name, found) in enumerate(accuracy.items()):
        heights = [*(found["by_kind"][kind] for kind in task.KINDS), found["all"]]
        at = [
            x + share * (place - (len(accuracy) - 1) / 2) for x in range(len(heights))
        ]
        bars.bar(at, heights, share, label=name)
    bars.set_xticks(range(len(task.KINDS) + 1), [*task.KINDS, "all"], fontsize=8)
    bars.set(ylim=(0, 1.25), title="share of test problems that are right")
    bars.legend(fontsize=8, ncols=len(accuracy), loc="upper center")
    for place, (name, curve) in enumerate(curves.items(), 1):
        lines.plot(*zip(*curve, strict=True), label=name, color=f"C{place}")
    lines.set(xlabel="step", title="validation problems, all kinds")
    lines.legend(fontsize=8)
    shown = examples()
    for axes, places in ((left, range(3)), (right, range(3, 6))):
        axes.axis("off")
        said = []
        for place in places:
            said += [
                *textwrap.wrap(f"{shown[place].prompt} ({shown[place].answer})", 58)
            ]
            said += [
                f"  {name:<8}{marked(given[place], shown[place])}"
                for name, given in responses.items()
            ]
            said.append("")
        axes.text(0, 1, "\n".join(said), va="top", family="monospace", fontsize=8.5)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimizers", nargs="+", default=["adam", "hopper"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/rl"))
    given = parser.parse_args()
    of_all = configs.resolve(configs.Config())
    graph, params = base.load(
        of_all.base_steps, of_all.base_seed, quiet=False, say=print
    )
    held = task.held_out("test", of_all.test_problems)
    policies, curves = {"base": params}, {}
    accuracy = {"base": evaluate.greedy(graph, params, held)}
    for name in given.optimizers:
        folder = str(given.out / name)
        config = configs.Config(
            optimizer=name,
            steps=given.steps,
            seed=given.seed,
            out=folder,
            overwrite=True,
        )
        result = train.train(config)
        if result["stopped"]:
            raise SystemExit(f"stopped by {result['stopped']}")
        policies[name], accuracy[name] = result["state"].best, result["best"]
        records = [each for each in result["records"] if each["kind"] == "val"]
        curves[name] = [(each["step"], each["all"]) for each in records]
    responses = answers(graph, policies)
    card = text(accuracy, responses)
    (given.out / "scorecard.txt").write_text(card + "\n")
    plot(accuracy, responses, curves, given.out / "scorecard.png")
    print(f"\n{card}\n\nwritten to {given.out}/scorecard.txt and .png")


if __name__ == "__main__":
    main()
