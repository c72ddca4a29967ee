"""Prints tables and answers from the runs of study.py, and plots them.

    python -m benchmarks.rl.report RUNS.jsonl [--plot PLOT.png]

Every claim is put as a range for a number that each seed has. It is answered "yes" if
the 95 % interval of the mean over the seeds (Student's t) is inside the range, "no" if
it is outside, and "undecided" otherwise. Differences are between runs of the same seed,
which have the same base, prompts and keys.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.convergence.claims_report import Answer, judge, table
from benchmarks.convergence.evidence import difference, steps_to
from benchmarks.jobs import Job, read
from benchmarks.rl.study import LONG, LONG_ARMS, SETTINGS, best_rates

RULE = {"confidence": 0.95, "margin": 0.01}
ARITHMETIC, PARALLEL = ("sum", "age", "two"), ("par_easy", "par_hard")
LEARNED = 0.75  # between a half, with or without the habit, and 1
Measure = Callable[[Job], float]
Comparison = Callable[[Job, Job], float]


# -------------------------------------------------------------------- measures


def accuracy(run: Job) -> float:
    """The share of test problems that the best policy gets right."""
    return run["best"]["all"]


def nonsense(run: Job) -> float:
    """The share of nonsense: answers with a wrong equation, or without a number."""
    return run["best"]["nonsense"]


def verbs(run: Job) -> float:
    """The number of parallel verbs that the best policy mostly gets right."""
    return sum(share > 0.5 for share in run["best"]["by_verb"].values())


def at_end(name: str) -> Measure:
    """The mean of a measure over the last twenty steps."""
    return lambda run: statistics.mean(run["measures"][name][-20:])


def all_kinds(point: Job) -> float:
    """The share of right validation problems."""
    return point["all"]


def arithmetic(point: Job) -> float:
    """That of sums, ages and two-step problems."""
    return statistics.mean(point["by_kind"][kind] for kind in ARITHMETIC)


def parallelism(point: Job) -> float:
    """How well parallel problems and their look-alikes are told apart.

    It is a half for the habit, which is wrong in the former, and for its opposite.
    """
    parallel = statistics.mean(point["by_kind"][kind] for kind in PARALLEL)
    return (parallel + point["by_kind"]["seq"]) / 2


def between(run: Job, value: Measure, low: float, high: float) -> float:
    """The mean of a value of the validation problems over some steps."""
    points = [p for p in run["validation"] if low <= p["step"] <= high]
    return statistics.mean(map(value, points))


def reaches(run: Job, value: Measure, level: float) -> float:
    """The step at which a value of the validation problems reaches a level.

    It is interpolated, and the last step if the level is never reached.
    """
    curve = [(point["step"], -value(point)) for point in run["validation"]]
    step = steps_to(-level, curve)
    return curve[-1][0] if step is None else step


def to_learn(run: Job) -> float:
    """The step at which parallel problems are told apart."""
    return reaches(run, parallelism, LEARNED)


def half_gain(run: Job, value: Measure) -> float:
    """The step at which half of a gain is made; not a number if it is below 0.1."""
    values = [value(point) for point in run["validation"]]
    if max(values) - values[0] < 0.1:
        return math.nan
    return reaches(run, value, (values[0] + max(values)) / 2)


def lead(run: Job) -> float:
    """By how many steps parallel problems are learned before arithmetic."""
    return half_gain(run, arithmetic) - half_gain(run, parallelism)


def arithmetic_then(run: Job) -> float:
    """The share of right arithmetic when parallel problems are told apart."""
    step = to_learn(run)
    return between(run, arithmetic, step - 10, step + 10)


def time_to(run: Job, other: Job, share: float) -> float:
    """The step at which a run has made a share of another one's gain."""
    values = [point["all"] for point in other["validation"]]
    level = values[0] + share * (max(values) - values[0])
    return max(1.0, reaches(run, all_kinds, level))


def spike(run: Job, other: Job) -> float:
    """The largest jump of the KL that another run's has not, less that of the other.

    Jumps are those of the logarithm of the ratio of both (k1, of the same prompts)
    from its median over eleven steps, so that neither what the KL depends on in all
    runs, nor its level, nor its slow growth count. The first quarter is left out.
    """
    pairs = zip(run["measures"]["kl_k1"], other["measures"]["kl_k1"], strict=True)
    ratios = [math.log(max(a, 1e-3) / max(b, 1e-3)) for a, b in pairs]
    jumps = [
        ratio - statistics.median(ratios[max(0, i - 5) : i + 6])
        for i, ratio in enumerate(ratios)
    ]
    jumps = jumps[len(jumps) // 4 :]
    return max(jumps) + min(jumps)


def excess(run: Job) -> float:
    """The largest KL of a step above the median of eleven, in nats."""
    found = run["measures"]["kl_k1"]
    start = len(found) // 4
    return max(
        found[i] - statistics.median(found[i - 5 : i + 6])
        for i in range(max(5, start), len(found))
    )


def matched_entropy(run: Job, other: Job) -> float:
    """The entropy less that of another run, when both are as often right.

    That is after 0.9 of the smaller gain, by interpolated means of ten steps.
    """

    def means(of: Job, name: str) -> list[float]:
        values = of["measures"][name]
        return [statistics.mean(values[i : i + 10]) for i in range(0, len(values), 10)]

    def at(of: Job) -> float:
        right, entropy = means(of, "correct"), means(of, "entropy")
        place = next(i for i, found in enumerate(right) if found >= level)
        if place == 0:
            return entropy[0]
        part = (level - right[place - 1]) / (right[place] - right[place - 1])
        return entropy[place - 1] + part * (entropy[place] - entropy[place - 1])

    begin = min(means(each, "correct")[0] for each in (run, other))
    end = min(max(means(each, "correct")) for each in (run, other))
    if end - begin < 0.05:
        return math.nan
    level = begin + 0.9 * (end - begin)
    return at(run) - at(other)


def late_change(run: Job, others: Sequence[Job]) -> float:
    """What validation gains from the best 60 steps of an arm to its last 60 steps.

    The best are before the last, and those of the mean of the other seeds, because the
    best of a run's own evaluations are lucky.
    """
    last = run["validation"][-1]["step"]

    def until(of: Job, end: float) -> float:
        return between(of, all_kinds, end - 60, end)

    ends = [p["step"] for p in run["validation"] if 60 <= p["step"] <= last - 60]
    best = max(ends, key=lambda end: sum(until(other, end) for other in others))
    return until(run, last) - until(run, best)


# --------------------------------------------------------------------- answers


def answers_of(runs: Sequence[Job]) -> list[Answer]:
    """Returns the answers to the claims about Hopper."""

    def of(arm: str, phase: str = "finals") -> list[Job]:
        mine = [r for r in runs if (r["arm"], r["phase"]) == (arm, phase)]
        return sorted(mine, key=lambda run: run["seed"])

    def pairs(first: str, second: str, phase: str = "finals") -> list[tuple[Job, Job]]:
        a, b = of(first, phase), of(second, phase)
        seeds = [[run["seed"] for run in each] for each in (a, b)]
        if seeds[0] != seeds[1]:
            raise ValueError(
                f"{first} has the seeds {seeds[0]} and {second} {seeds[1]}: continue "
                "the study until they are the same"
            )
        return list(zip(a, b, strict=True))

    def less(first: str, second: str, measure: Measure, **where: str) -> list[float]:
        return [measure(a) - measure(b) for a, b in pairs(first, second, **where)]

    def each_pair(first: str, second: str, compare: Comparison) -> list[float]:
        return [compare(a, b) for a, b in pairs(first, second)]

    answers: list[Answer] = []
    claim = ""

    def add(number: str, values: Sequence[float], **wanted: float) -> None:
        if values:
            answers.append(judge(claim, number, values, **wanted))

    above, below = {"low": 0.0}, {"high": 0.0}
    right, five = "right test problems", "hopper, 5 steps"
    jump = "largest jump of the KL"

    claim = "Muon has an entropy floor, which variance keeps and one step removes"
    entropy = at_end("entropy")
    add("entropy at the end, Muon less Adam", less("muon", "adam", entropy), **above)
    found = each_pair("muon", "adam", matched_entropy)
    add("the same when both are as often right", found, **above)
    found = less("adamuon", "adam", entropy)
    add("entropy at the end, AdaMuon less Adam", found, **above)
    found = less("hopper", five, entropy)
    add("the same, one step less five", found, **below)

    claim = "Muon has KL spikes"
    add(f"{jump}, Muon against Adam", each_pair("muon", "adam", spike), **above)
    add("the same in nats", less("muon", "adam", excess), **above)

    claim = "Variance calms Muon"
    add(
        f"{jump}, with variance against without",
        each_pair(five, "muon", spike),
        **below,
    )
    add("the same in nats", less(five, "muon", excess), **below)
    add(f"{jump}, AdaMuon against Muon", each_pair("adamuon", "muon", spike), **below)

    claim = "SGD is smooth and earns more than Muon in training, but is last in tests"
    add(f"{jump}, SGD against Muon", each_pair("sgd", "muon", spike), **below)
    found = less("sgd", "muon", at_end("correct"))
    add("right samples at the end, SGD less Muon", found, **above)
    for arm in ("adam", "muon", "hopper"):
        add(f"{right}, SGD less {arm}", less("sgd", arm, accuracy), **below)

    claim = "One Newton-Schulz step is better than five"
    add(f"{right}, one less five", less("hopper", five, accuracy), **above)
    add("share of nonsense, one less five", less("hopper", five, nonsense), **below)
    add(f"{jump}, one against five", each_pair("hopper", five, spike), **below)

    claim += ", at one learning rate without matched RMS"
    raw = "raw, 1 step", "raw, 5 steps"
    add(f"{right}, one less five", less(*raw, accuracy), **above)
    found = each_pair(*raw, lambda a, b: time_to(a, b, 0.5) - time_to(b, b, 0.5))
    add("steps to half of the gain of five, one less five", found, **below)
    add(f"{jump}, one against five", each_pair(*raw, spike), **below)

    claim = "Hopper learns about twice as fast as Adam"
    limit = {"high": math.log2(0.6)}
    found = each_pair(
        "hopper",
        "adam",
        lambda a, b: math.log2(time_to(a, b, 0.9) / time_to(b, b, 0.9)),
    )
    add("octaves of the steps to 0.9 of Adam's gain, Hopper less Adam", found, **limit)
    found = less("hopper", "adam", lambda run: math.log2(max(1.0, to_learn(run))))
    add("octaves of the steps to parallelism, Hopper less Adam", found, **limit)
    last = SETTINGS[runs[0]["epochs"]].steps
    found = each_pair(
        "hopper",
        "adam",
        lambda a, b: (
            between(a, all_kinds, last / 2 - 10, last / 2)
            - between(b, all_kinds, last - 10, last)
        ),
    )
    add("right at half of the steps less Adam's at the end", found, low=-0.01)

    claim = "Parallelism before arithmetic"
    add("steps between half gains, Hopper", list(map(lead, of("hopper"))), **above)
    add("the same, Adam", list(map(lead, of("adam"))), **above)
    found = less("hopper", "adam", arithmetic_then)
    add("arithmetic when parallelism is learned, Hopper less Adam", found, **below)

    claim = "Training declines late"
    change = "validation, last 60 steps less the best 60 before"
    late = {}
    for arm in LONG_ARMS:
        runs_of = of(arm, "long")
        late[arm] = [
            late_change(run, [other for other in runs_of if other is not run])
            for run in runs_of
        ]
        add(f"{change}, {arm}", late[arm], **below)
    found = [a - b for a, b in zip(late["hopper"], late["adam"], strict=True)]
    add(f"{change}, Hopper less Adam", found, **below)

    claim = "Hopper, then Adam, beats both"
    for arm in ("hopper", "adam"):
        found = less("hopper, then adam", arm, lambda run: run["last"]["all"])
        add(f"{right} after the last step, less {arm}", found, **above)
    for arm in ("hopper", "adam"):
        found = less(
            "hopper, then adam", arm, lambda run: run["last"]["all"], phase="long"
        )
        add(f"the same after {LONG} steps, less {arm}", found, **above)
    return answers


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
    heads += ["arithmetic", "par_hard", "seq", "verbs", "pass@8", "nonsense", "formed"]
    heads += ["entropy", "KL", "clipped", "update RMS"]
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
        cells += [f"{_mean(x, mine):.3f}" for x in (nonsense, at_end("format"))]
        cells += [f"{_mean(at_end(name), mine):.2g}" for name in ("entropy", "kl_k3")]
        cells += [f"{_mean(at_end('clip_fraction'), mine):.4f}"]
        cells += [f"{_mean(at_end('update_rms'), mine):.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(measure: Measure, runs: Sequence[Job]) -> float:
    return statistics.mean(measure(run) for run in runs)


def rates_of(runs: Sequence[Job]) -> str:
    """Returns the mean share of right validation problems by arm and rate."""
    lines = [
        "| arm | learning rate: mean share of right validation problems |",
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


def long_of(runs: Sequence[Job]) -> str:
    """Returns how the long runs go on: means over seeds, by arm."""
    steps = range(0, LONG + 1, LONG // 6)
    heads = ["arm", *(f"step {step}" for step in steps), "right test problems ± σ"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for arm in LONG_ARMS:
        mine = [r for r in runs if (r["arm"], r["phase"]) == (arm, "long")]
        if not mine:
            continue
        shares = [
            statistics.mean(
                next(p["all"] for p in run["validation"] if p["step"] == step)
                for run in mine
            )
            for step in steps
        ]
        ends = [run["last"]["all"] for run in mine]
        cells = [arm, *(f"{share:.3f}" for share in shares)]
        cells += [f"{statistics.mean(ends):.3f} ± {statistics.stdev(ends):.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
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
        for axes, value in zip(all_axes, (arithmetic, parallelism), strict=False):
            rows = zip(*(map(value, r["validation"]) for r in mine), strict=True)
            axes.plot(
                steps, [*map(statistics.mean, rows)], color=f"C{place}", label=arm
            )
        for axes, name in zip(all_axes[2:], ("entropy", "kl_k1"), strict=True):
            rows = zip(*(r["measures"][name] for r in mine), strict=True)
            axes.plot([*map(statistics.mean, rows)], color=f"C{place}", lw=1)
    titles = ("arithmetic", "parallelism", "entropy", "KL from the base")
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
    parts = [arms_of(runs), table(answers_of(runs)), rates_of(runs)]
    if any(run["phase"] == "long" for run in runs):
        parts.append(long_of(runs))
    print("\n\n".join(parts))
    if given.plot:
        plot(runs, given.plot)


if __name__ == "__main__":
    main()
