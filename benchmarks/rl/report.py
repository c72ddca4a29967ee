"""Prints tables and answers from the runs of study.py, and plots them.

    python -m benchmarks.rl.report RUNS.jsonl [--plot PLOT.png]

Every claim is put as a range for a number that each seed has. It is answered "yes" if
the 95 % interval of the mean over the seeds (Student's t) is inside the range, "no" if
it is outside, and "undecided" otherwise. Differences are between runs of the same seed,
which have the same base, prompts and keys.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.convergence.claims_report import Answer, judge, table
from benchmarks.convergence.evidence import difference, steps_to
from benchmarks.jobs import Job, read
from benchmarks.rl.study import best_rates

RULE = {"confidence": 0.95, "margin": 0.01}
ARITHMETIC, PARALLEL = ("sum", "age", "two"), ("par_easy", "par_hard")
Measure = Callable[[Job], float]


# -------------------------------------------------------------------- measures


def accuracy(run: Job) -> float:
    """The share of test problems that the best policy gets right."""
    return run["best"]["all"]


def nonsense(run: Job) -> float:
    """The share of test problems that the best policy answers with nonsense."""
    return run["best"]["nonsense"]


def decline(run: Job) -> float:
    """The last policy's share of right test problems less the best policy's."""
    return run["last"]["all"] - run["best"]["all"]


def at_end(name: str) -> Measure:
    """The mean of a measure over the last twenty steps."""
    return lambda run: statistics.mean(run["measures"][name]["mean"][-2:])


def spike(run: Job) -> float:
    """How far one step's KL rises above the mean of the ten around it, at most.

    The first quarter is left out, in which the KL grows from 0.
    """
    found = run["measures"]["kl_k3"]
    pairs = list(zip(found["max"], found["mean"], strict=True))
    return max(most / mean for most, mean in pairs[len(pairs) // 4 :])


def reaches(run: Job, value: Measure, level: float) -> float:
    """The step at which a value of the validation problems reaches a level.

    It is interpolated, and the last step if the level is never reached.
    """
    curve = [(point["step"], -value(point)) for point in run["validation"]]
    step = steps_to(-level, curve)
    return curve[-1][0] if step is None else step


def half_gain(run: Job, kinds: Sequence[str]) -> float:
    """The step at which kinds have made half of what they gain by the best step."""

    def value(point: Job) -> float:
        return statistics.mean(point["by_kind"][kind] for kind in kinds)

    first, last = value(run["validation"][0]), max(map(value, run["validation"]))
    return reaches(run, value, (first + last) / 2)


def lead(run: Job) -> float:
    """By how many steps parallel problems are learned before arithmetic."""
    return half_gain(run, ARITHMETIC) - half_gain(run, PARALLEL)


def matched_entropy(run: Job, other: Job) -> float:
    """The entropy when samples are first as often right as in both runs at the end."""
    level = min(at_end("correct")(run), at_end("correct")(other))
    measures = run["measures"]
    for right, entropy in zip(
        measures["correct"]["mean"], measures["entropy"]["mean"], strict=True
    ):
        if right >= level:
            return entropy
    return measures["entropy"]["mean"][-1]


def time_to(run: Job, adam: Job) -> float:
    """The step at which a run has made 0.9 of Adam's gain on validation problems."""
    values = [point["all"] for point in adam["validation"]]
    level = values[0] + 0.9 * (max(values) - values[0])
    return reaches(run, lambda point: point["all"], level)


# --------------------------------------------------------------------- answers


def answers_of(runs: Sequence[Job]) -> list[Answer]:
    """Returns the answers to the claims about Hopper."""

    def of(arm: str, phase: str = "finals") -> list[Job]:
        mine = [r for r in runs if (r["arm"], r["phase"]) == (arm, phase)]
        return sorted(mine, key=lambda run: run["seed"])

    def less(first: str, second: str, measure: Measure) -> list[float]:
        pairs = zip(of(first), of(second), strict=True)
        return [measure(a) - measure(b) for a, b in pairs]

    def paired(
        first: str, second: str, measure: Callable[[Job, Job], float]
    ) -> list[float]:
        pairs = zip(of(first), of(second), strict=True)
        return [measure(a, b) - measure(b, a) for a, b in pairs]

    plain = ("adam", "muon", "adamuon", "hopper")
    seeds = range(len(of("sgd")))
    lowest = [min(accuracy(of(arm)[i]) for arm in plain) for i in seeds]
    both = [max(accuracy(of(arm)[i]) for arm in ("hopper", "adam")) for i in seeds]
    hybrid = [accuracy(run) for run in of("hopper, then adam")]
    speed = [
        time_to(hopper, adam) / time_to(adam, adam)
        for hopper, adam in zip(of("hopper"), of("adam"), strict=True)
    ]
    floor, spikes = "Muon has an entropy floor", "Muon has KL spikes"
    calm, one = "Variance calms Muon", "One Newton-Schulz step beats five"
    smooth, order = "SGD is smooth but last", "Parallel problems before arithmetic"
    late, right = "Training declines late", "share of right test problems"
    above, below = {"low": 0.0}, {"high": 0.0}
    sgd = [accuracy(run) - other for run, other in zip(of("sgd"), lowest, strict=True)]
    gain = [a - b for a, b in zip(hybrid, both, strict=True)]
    return [
        judge(
            floor,
            "entropy at the end, Muon less Adam",
            less("muon", "adam", at_end("entropy")),
            **above,
        ),
        judge(
            floor,
            "the same when both are as often right",
            paired("muon", "adam", matched_entropy),
            **above,
        ),
        judge(
            spikes,
            "largest KL over its mean, Muon less Adam",
            less("muon", "adam", spike),
            **above,
        ),
        judge(
            smooth,
            "largest KL over its mean, SGD less Adam",
            less("sgd", "adam", spike),
            **below,
        ),
        judge(smooth, f"{right}, SGD less the lowest other", sgd, **below),
        judge(
            calm,
            "largest KL over its mean, AdaMuon less Muon",
            less("adamuon", "muon", spike),
            **below,
        ),
        judge(
            calm, "the same, Hopper less Muon", less("hopper", "muon", spike), **below
        ),
        judge(
            one,
            f"{right}, 1 less 5",
            less("hopper", "hopper, 5 steps", accuracy),
            **above,
        ),
        judge(
            one,
            "share of nonsense, 1 less 5",
            less("hopper", "hopper, 5 steps", nonsense),
            **below,
        ),
        judge(
            "Hopper learns twice as fast as Adam",
            "steps to 0.9 of Adam's gain, over Adam's",
            speed,
            high=0.6,
        ),
        judge(
            order,
            "steps between half gains, Hopper",
            list(map(lead, of("hopper"))),
            **above,
        ),
        judge(order, "the same, Adam", list(map(lead, of("adam"))), **above),
        judge(order, "Hopper less Adam", less("hopper", "adam", lead), **above),
        *(
            judge(late, f"{right}, last less best, {arm}", decline_of, **below)
            for arm in ("adam", "muon", "hopper")
            if (decline_of := list(map(decline, of(arm, "long"))))
        ),
        judge(
            "Hopper, then Adam, beats both",
            f"{right}, less the better of both",
            gain,
            **above,
        ),
    ]


# --------------------------------------------------------------------- tables


def arms_of(runs: Sequence[Job]) -> str:
    """Returns the table of the final runs of all arms, the most accurate first."""
    (epochs,) = {run["epochs"] for run in runs}
    finals: dict[str, list[Job]] = {}
    for run in runs:
        if run["phase"] == "finals":
            finals.setdefault(run["arm"], []).append(run)
    losses = {a: {r["seed"]: 1 - accuracy(r) for r in f} for a, f in finals.items()}
    best = best_rates(runs, epochs)
    tried = {
        arm: {
            r["learning_rate"] for r in runs if (r["arm"], r["phase"]) == (arm, "rates")
        }
        for arm in best
    }
    heads = [
        "arm",
        "learning rate",
        "right ± σ",
        "less Adam's",
        "verdict",
        "arithmetic",
    ]
    heads += ["par_hard", "seq", "pass@8", "nonsense", "entropy", "KL", "update RMS"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for arm, mine in sorted(finals.items(), key=lambda x: -_mean(accuracy, x[1])):
        rates = [mine[0]["learning_rate"], mine[0].get("then_rate")]
        edge = arm in tried and rates[0] in (min(tried[arm]), max(tried[arm]))
        rate = ", ".join(f"{rate:.2g}" for rate in rates if rate)
        shares = [accuracy(run) for run in mine]
        gap = difference(losses[arm], losses["adam"], **RULE)
        verdict = "" if arm == "adam" else gap.verdict
        less = "" if arm == "adam" else f"{-gap.mean:+.3f} ± {gap.half_width:.3f}"
        kinds = (ARITHMETIC, ("par_hard",), ("seq",))
        by_kind = [
            _mean(
                lambda r, k=k: statistics.mean(r["best"]["by_kind"][x] for x in k), mine
            )
            for k in kinds
        ]
        cells = [arm, rate + "*" * edge]
        cells += [f"{statistics.mean(shares):.3f} ± {statistics.stdev(shares):.3f}"]
        cells += [less, verdict, *(f"{share:.3f}" for share in by_kind)]
        cells += [f"{_mean(lambda r: r['best']['pass@8']['all'], mine):.3f}"]
        cells += [f"{_mean(nonsense, mine):.3f}"]
        cells += [f"{_mean(at_end(name), mine):.2g}" for name in ("entropy", "kl_k3")]
        cells += [f"{_mean(at_end('update_rms'), mine):.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(measure: Measure, runs: Sequence[Job]) -> float:
    return statistics.mean(measure(run) for run in runs)


def rates_of(runs: Sequence[Job]) -> str:
    """Returns the share of right validation problems by arm and learning rate."""
    lines = [
        "| arm | learning rate: share of right validation problems |",
        "| --- | --- |",
    ]
    tried: dict[str, dict[float, float]] = {}
    for run in runs:
        if run["phase"] == "rates":
            tried.setdefault(run["arm"], {})[run["learning_rate"]] = 1 - run["loss"]
    for arm, found in tried.items():
        cells = [f"{rate:.2g}: {share:.3f}" for rate, share in sorted(found.items())]
        lines.append(f"| {arm} | {', '.join(cells)} |")
    return "\n".join(lines)


def plot(runs: Sequence[Job], path: Path) -> None:
    """Plots accuracy, entropy and KL over the steps, as means over the final runs."""
    arms = ("sgd", "adam", "muon", "adamuon", "hopper", "hopper, 5 steps")
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    all_axes = figure.subplots(1, 4)
    for place, arm in enumerate(arms):
        mine = [r for r in runs if (r["arm"], r["phase"]) == (arm, "finals")]
        if not mine:
            continue
        steps = [point["step"] for point in mine[0]["validation"]]
        for axes, kinds in zip(all_axes, (ARITHMETIC, PARALLEL), strict=False):
            means = [
                statistics.mean(
                    r["validation"][i]["by_kind"][k] for r in mine for k in kinds
                )
                for i in range(len(steps))
            ]
            axes.plot(steps, means, color=f"C{place}", label=arm)
        for axes, name in zip(all_axes[2:], ("entropy", "kl_k3"), strict=True):
            rows = zip(*(r["measures"][name]["mean"] for r in mine), strict=True)
            means = [statistics.mean(row) for row in rows]
            axes.plot([10 * i + 5 for i in range(len(means))], means, color=f"C{place}")
    titles = ("arithmetic", "parallel problems", "entropy", "KL from the base (k3)")
    for axes, title in zip(all_axes, titles, strict=True):
        axes.set(title=title, xlabel="step")
    all_axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--plot", type=Path, help="write a plot too")
    given = parser.parse_args()
    runs = read(given.runs)
    print("\n\n".join([arms_of(runs), table(answers_of(runs)), rates_of(runs)]))
    if given.plot:
        plot(runs, given.plot)


if __name__ == "__main__":
    main()
