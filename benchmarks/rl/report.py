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
from benchmarks.rl.study import LONG, LONG_ARMS, STEPS, best_rates
from examples.rl.task import KINDS

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


def verbs(run: Job) -> float:
    """The number of parallel verbs that the best policy mostly gets right."""
    return sum(share > 0.5 for share in run["best"]["by_verb"].values())


def decline(run: Job) -> float:
    """What validation loses after the usual length of a run, by its last 60 steps.

    Neither end is chosen by its accuracy: a best step is lucky, and so higher than what
    follows it, in any run.
    """

    def around(low: int, high: int) -> float:
        points = [p for p in run["validation"] if low <= p["step"] <= high]
        return statistics.mean(point["all"] for point in points)

    return around(LONG - 60, LONG) - around(STEPS - 30, STEPS + 30)


def at_end(name: str) -> Measure:
    """The mean of a measure over the last twenty steps."""
    return lambda run: statistics.mean(run["measures"][name]["mean"][-2:])


def spike(run: Job, relative: bool = False) -> float:
    """How far one step's KL is above the mean of its block of ten steps, at most.

    It is in nats or, if it is relative, in multiples of that mean, which sampling noise
    makes larger where the KL is small. It is estimated by k1, because one unlikely
    token can be most of k3. The first quarter is left out, in which the KL rises.
    """
    found = run["measures"]["kl_k1"]
    pairs = list(zip(found["max"], found["mean"], strict=True))
    return max(
        (most - mean) / (max(mean, 1e-4) if relative else 1.0)
        for most, mean in pairs[len(pairs) // 4 :]
    )


def reaches(run: Job, value: Measure, level: float) -> float:
    """The step at which a value of the validation problems reaches a level.

    It is interpolated, and the last step if the level is never reached.
    """
    curve = [(point["step"], -value(point)) for point in run["validation"]]
    step = steps_to(-level, curve)
    return curve[-1][0] if step is None else step


def half_gain(run: Job, kinds: Sequence[str]) -> float:
    """The step at which kinds have made half of what they gain by the best step.

    It is the last step if they gain less than 0.05.
    """

    def value(point: Job) -> float:
        return statistics.mean(point["by_kind"][kind] for kind in kinds)

    first, last = value(run["validation"][0]), max(map(value, run["validation"]))
    if last - first < 0.05:
        return run["validation"][-1]["step"]
    return reaches(run, value, (first + last) / 2)


def to_half(run: Job) -> float:
    """The step at which all problems have made half of what they gain."""
    return half_gain(run, KINDS)


def lead(run: Job) -> float:
    """By how many steps parallel problems are learned before arithmetic."""
    return half_gain(run, ARITHMETIC) - half_gain(run, PARALLEL)


def matched_entropy(run: Job, other: Job) -> float:
    """The entropy when samples are as often right as both runs reach.

    That is after 0.9 of the smaller gain, where both still learn.
    """
    right, entropy = (run["measures"][k]["mean"] for k in ("correct", "entropy"))
    first = min(right[0], other["measures"]["correct"]["mean"][0])
    end = min(at_end("correct")(run), at_end("correct")(other))
    level = first + 0.9 * (end - first)
    return next(e for r, e in zip(right, entropy, strict=True) if r >= level)


def time_to(run: Job, adam: Job) -> float:
    """The step at which a run has made 0.9 of Adam's gain on validation problems."""
    values = [point["all"] for point in adam["validation"]]
    level = values[0] + 0.9 * (max(values) - values[0])
    return reaches(run, lambda point: point["all"], level)


# --------------------------------------------------------------------- answers


def answers_of(runs: Sequence[Job]) -> list[Answer]:
    """Returns the answers to the claims about Hopper."""

    def of(arm: str, phase: str = "finals") -> dict[int, Job]:
        mine = [r for r in runs if (r["arm"], r["phase"]) == (arm, phase)]
        return {run["seed"]: run for run in mine}

    def pairs(first: str, second: str) -> list[tuple[Job, Job]]:
        a, b = of(first), of(second)
        if a.keys() != b.keys():
            raise ValueError(
                f"{first} has the seeds {sorted(a)} and {second} {sorted(b)}: continue "
                "the study until they are the same"
            )
        return [(a[seed], b[seed]) for seed in sorted(a)]

    def each(arm: str, measure: Measure, phase: str = "finals") -> list[float]:
        return [measure(run) for run in of(arm, phase).values()]

    def less(first: str, second: str, measure: Measure) -> list[float]:
        return [measure(a) - measure(b) for a, b in pairs(first, second)]

    matched = [
        matched_entropy(a, b) - matched_entropy(b, a) for a, b in pairs("muon", "adam")
    ]
    speed = [
        time_to(hopper, adam) / max(1.0, time_to(adam, adam))
        for hopper, adam in pairs("hopper", "adam")
    ]
    floor, spikes = "Muon has an entropy floor", "Muon has KL spikes"
    calm, one = "Variance calms Muon", "One Newton-Schulz step beats five"
    smooth, order = "SGD is smooth but last", "Parallel problems before arithmetic"
    late, right = "Training declines late", "share of right test problems"
    change = f"validation, last 60 of {LONG} steps less around step {STEPS}"
    above, below = {"low": 0.0}, {"high": 0.0}
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
            matched,
            **above,
        ),
        judge(
            spikes,
            "largest KL above its mean, Muon less Adam",
            less("muon", "adam", spike),
            **above,
        ),
        judge(
            spikes,
            "the same in multiples of the mean",
            less("muon", "adam", lambda run: spike(run, relative=True)),
            **above,
        ),
        judge(
            smooth,
            "largest KL above its mean, SGD less Adam",
            less("sgd", "adam", spike),
            **below,
        ),
        *(
            judge(
                smooth, f"{right}, SGD less {arm}", less("sgd", arm, accuracy), **below
            )
            for arm in ("adam", "muon", "hopper")
        ),
        judge(
            calm,
            "largest KL above its mean, AdaMuon less Muon",
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
        *(
            judge(f"{one}, at one learning rate", what, found, **where)
            for what, measure, where in (
                (f"{right}, 1 less 5, RMS not matched", accuracy, above),
                ("steps to half of the gain, 1 less 5", to_half, below),
            )
            if (found := less("raw, 1 step", "raw, 5 steps", measure))
        ),
        judge(
            "Hopper learns about twice as fast as Adam",
            "steps to 0.9 of Adam's gain, over Adam's",
            speed,
            high=0.6,
        ),
        judge(
            order,
            "steps between half gains, Hopper",
            each("hopper", lead),
            **above,
        ),
        judge(order, "the same, Adam", each("adam", lead), **above),
        judge(order, "Hopper less Adam", less("hopper", "adam", lead), **above),
        *(
            judge(late, f"{change}, {arm}", found, **below)
            for arm in LONG_ARMS
            if (found := each(arm, decline, "long"))
        ),
        *(
            judge(
                "Hopper, then Adam, beats both",
                f"{right}, less {arm}",
                less("hopper, then adam", arm, accuracy),
                **above,
            )
            for arm in ("hopper", "adam")
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
    heads = ["arm", "learning rate", "right ± σ", "less Adam's", "verdict"]
    heads += ["arithmetic", "par_hard", "seq", "verbs", "pass@8", "nonsense"]
    heads += ["entropy", "KL", "update RMS"]
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
        cells += [f"{_mean(verbs, mine):.1f}"]
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
