"""Every Python block of the README and docs/ runs, with one namespace per page."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    collectives,
    nanogpt_stages,
    polar_methods,
    preconditioners,
    qk_clip,
    state_memory,
    step_time,
)
from benchmarks.convergence import claims_report, report
from benchmarks.jobs import read
from benchmarks.rl import report as rl_report

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "docs" / "tour").glob("*.md"))
LONG = {
    "attention.md",
    "extending.md",
    "frameworks.md",
    "learning_rates.md",
    "preconditioners.md",
    "record.md",
    "sharding.md",
}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=[pytest.mark.slow] if p.name in LONG else [])
        for p in PAGES
    ],
    ids=lambda p: p.name,
)
def test_python_blocks_run(page):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    namespace: dict = {}
    try:
        with jax.numpy_rank_promotion("allow"):  # as for users
            for block in blocks:
                exec(compile(block, str(page), "exec"), namespace)
    finally:
        # A page may set a mesh for good, as a training script does.
        jax.set_mesh(jax.sharding.Mesh(np.empty((), dtype=object), ()))
    if page.name == "README.md":
        assert len(blocks) >= 4
        params, tx = namespace["params"], namespace["tx"]
        assert namespace["losses"][-1] < namespace["losses"][0]
        assert tx.init(params)
        for name in ("halley", "gentle", "fused"):
            namespace[name].init(params)
        weights = {"embed": {"weight": jnp.ones((9, 4))}}
        weights |= {"layers": [{"weight": jnp.ones((3, 4)), "bias": jnp.ones(3)}]}
        table = namespace["equinox"].init(weights).inner_states["matrix"]
        assert [leaf.shape for leaf in jax.tree.leaves(table)] == [(), (3, 4)]
        haiku = {"mlp/~/linear_0": {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}}
        haiku |= {"embed": {"embeddings": jnp.ones((9, 3))}}
        table = namespace["haiku"].init(haiku).inner_states["matrix"]
        assert [leaf.shape for leaf in jax.tree.leaves(table)] == [(), (3, 4)]


def test_the_speeds_are_those_of_the_raw_results():
    sets = {}
    for name in ("2026-11-22", "gpt384_2026-11-24"):
        path = ROOT / "benchmarks" / "results" / f"step_time_{name}.json"
        sets |= json.loads(path.read_text())["sets"]

    def speed(size, name):
        return f"{sets[size]['contenders'][name]['speedup']['median']:.1f} times"

    text = " ".join((ROOT / "README.md").read_text().split())
    small, large = (speed(size, "ours") for size in ("gpt-384", "gpt-768"))
    assert f"{small} as fast on the 36 matrices" in text
    assert f"{large} on the 72 of width 768" in text
    small, large = (speed(size, "ours, Halley") for size in ("gpt-384", "gpt-768"))
    assert f"updates differ, {small.removesuffix(' times')} and {large}" in text


@pytest.mark.parametrize(
    "name",
    ["7B", *(pytest.param(n, marks=pytest.mark.slow) for n in ("70B", "1T MoE"))],
)
def test_the_costs_of_large_models_are_those_of_the_formulas(name):
    text = (ROOT / "docs" / "sharding.md").read_text()
    rows = collectives.predict_model(collectives.MODELS[name])
    for row in rows:
        if row["dtype"] == "float32":
            assert collectives.our_line(name, row) in text


def test_the_tables_of_the_docs_are_those_of_the_raw_results():
    results = ROOT / "benchmarks" / "results"
    text = (ROOT / "benchmarks" / "README.md").read_text()
    names = ("gpt384_2026-11-24", "many224_2026-11-24", "many700_2026-11-24")
    for name in (*names, "2026-11-22"):
        assert step_time.table(results / f"step_time_{name}.json").strip() in text
    assert preconditioners.table(results / "preconditioners_2026-11-29.json") in text
    page = (ROOT / "docs" / "sharding.md").read_text()
    for part in collectives.table(results / "collectives_2026-11-24.json").split(
        "\n\n"
    ):
        assert part in page
    page = (ROOT / "docs" / "polar_methods.md").read_text()
    methods = results / "polar_methods_2026-11-24.json"
    assert polar_methods.table(methods) in page
    ratios = json.loads(methods.read_text())["solves_over_inverse"]
    square, two, four = (f"{ratio:.2f}" for ratio in ratios.values())
    assert f"{square} (square), {two} (2:1) and {four} (4:1)" in page
    assert nanogpt_stages.table(results / "nanogpt_stages_2026-11-24.json") in text
    page = (ROOT / "docs" / "convergence.md").read_text()
    runs = read(results / "convergence_tiny-250.jsonl")
    seconds = json.loads((results / "convergence_seconds.json").read_text())["arms"]
    each = {arm: measured["seconds"] for arm, measured in seconds.items()}
    assert report.table(runs, each) in page
    assert report.table(read(results / "convergence_sotu-250.jsonl")) in page
    for name in ("methods-250", "tiny-1000", "medium-500"):
        assert report.table(read(results / f"convergence_{name}.jsonl")) in page
    assert report.headlines(runs) in (ROOT / "README.md").read_text()
    said = (ROOT / "docs" / "hopper.md").read_text()
    for epochs in (1, 4):
        found = read(results / f"rl_ablation_{epochs}.jsonl")
        answers = claims_report.table(rl_report.answers_of(found))
        for table in (rl_report.arms_of(found), answers, rl_report.rates_of(found)):
            assert table in said
    assert rl_report.long_of(read(results / "rl_ablation_1.jsonl")) in said
    said = (ROOT / "docs" / "memory.md").read_text()
    seconds = json.loads(
        (results / "state_memory_seconds_2026-11-29.json").read_text()
    )["optimizers"]
    runs = read(results / "state_memory_2026-11-29.jsonl")
    assert state_memory.table(runs, seconds) in said
    said = (ROOT / "docs" / "attention.md").read_text()
    assert qk_clip.table(read(results / "qk_clip_2026-11-29.jsonl")) in said
    tour = json.loads((results / "tour_2026-11-29.json").read_text())
    medians = [found["median"] for found in tour["ms"].values()]
    slowest = max(found["95 %"] for found in tour["ms"].values())
    said = " ".join((ROOT / "benchmarks" / "README.md").read_text().split())
    assert f"takes {min(medians)} to {max(medians)} ms" in said
    assert f"take less than {slowest:.1f} ms" in said
    assert f"scripts have {tour['scripts'] / 1e3:.1f} kB" in said
    assert f"largest page {max(tour['pages'].values()) / 1e3:.1f} kB" in said
    runs = read(results / "convergence_dynamics.jsonl")
    assert claims_report.table(claims_report.dynamics_of(runs)) in page
    runs = read(results / "convergence_flattening.jsonl")
    assert claims_report.table(claims_report.flattening_of(runs)) in page
    losses, answers = claims_report.rates_of(read(results / "convergence_rates.jsonl"))
    assert losses in page and claims_report.table(answers) in page
    transfer = read(results / "convergence_transfer.jsonl")
    tables, answers = claims_report.transfer_of(transfer)
    assert all(table in page for table in tables.split("\n\n"))
    assert claims_report.table(answers) in page
    scaled = read(results / "convergence_scaled.jsonl")
    assert claims_report.gained_of(scaled, transfer) in page
    for study in ("scaled", "auxiliary", "tokens", "coordinates"):
        runs = read(results / f"convergence_{study}.jsonl")
        tables, answers = claims_report.ANSWERS[study](runs)
        assert all(table in page for table in tables.split("\n\n"))
        assert not answers or claims_report.table(answers) in page


def test_the_numbers_of_the_tour_are_those_of_the_raw_results():
    results = ROOT / "benchmarks" / "results"
    runs = read(results / "convergence_tiny-250.jsonl")
    rows = {row.arm: row for row in report.rows_of(runs)}
    longer = report.rows_of(read(results / "convergence_tiny-1000.jsonl"))
    long = {row.arm: row for row in longer}
    methods = report.rows_of(read(results / "convergence_methods-250.jsonl"))
    polar = {row.arm: row for row in methods}
    seconds = json.loads((results / "convergence_seconds.json").read_text())["arms"]

    def momentum(arm, of=rows):
        return f"{of[arm].values['momentum']:.3g}"

    def gap(first, second="muon", of=rows):
        return f"{of[first].mean - of[second].mean:.2f}"

    def steps(arm):
        return f"{np.mean(rows[arm].steps):.0f}"

    def ms(arm):
        return f"{seconds[arm]['seconds'] * 1e3:.0f} ms"

    tuned = rows["adamw"].values
    b2 = {
        run["values"]["b2"]: run["loss"]
        for run in runs
        if (run["arm"], run["phase"]) == ("adamw", "search")
        and {**run["values"], "b2": 0} == {**tuned, "b2": 0}
    }
    decays = {
        run["values"]["weight_decay"]: run["loss"]
        for run in runs
        if (run["arm"], run["phase"]) == ("adamw", "search")
        and {**run["values"], "weight_decay": 0} == {**tuned, "weight_decay": 0}
    }
    against = rows["muonw"].against
    assert against
    dynamics = read(results / "convergence_dynamics.jsonl")
    top = [
        np.mean([point["gradient"]["top_5"] for point in run["points"]])
        for run in dynamics
        if run["arm"] == "adamw"
    ]
    flattening = read(results / "convergence_flattening.jsonl")
    later = [
        np.mean([point["momentum"][5] for point in run["points"][1:]])
        for run in flattening
    ]
    near = [
        np.mean([point["momentum"] for point in run["points"]], axis=0)
        for run in flattening
    ]
    shares = [f"{100 * share:.0f} %" for share in np.mean(near, axis=0)]
    rates = {}
    for run in read(results / "convergence_rates.jsonl"):
        if run["arm"] == "muonw":
            rates.setdefault(run["learning_rate"], []).append(run["loss"])
    quarter, half, middle, twice, four = (np.mean(rates[r]) for r in sorted(rates))
    kept = claims_report.kept_of(read(results / "convergence_transfer.jsonl"))
    adamw, muonh = (
        re.findall(rf"^\| {arm} .*$", kept, re.M)[0].split(" | ")
        for arm in ("adamw", "muonh")
    )
    numbers = {
        "01_sgd": [
            f"ended {quarter - middle:.2f} higher",
            f"and four times it {four - middle:.2f}",
            f"ended {half - middle:.2f} and {twice - middle:.2f} higher",
        ],
        "12_muonh": [
            f"only {float(muonh[4][1:6]):.2f} ± {float(muonh[4][9:]):.2f}",
        ],
        "02_momentum": [
            f"[{momentum('muon')} in runs of 250 steps]",
            f"[{momentum('muon', long)} in runs of 1,000]",
            f"for `om.halley_muon` was {momentum('entry+halley+neuron')} in both",
        ],
        "03_adam": [
            f"keeping the old one cost {float(adamw[4][1:6]):.2f}.",
            f"a loss of {b2[0.95]:.3f} on one seed",
            f"0.9 ended {b2[0.9] - b2[0.95]:.3f} higher",
            f"and 0.975 {b2[0.975] - b2[0.95]:.3f}",
        ],
        "04_signal": [
            f"ended {gap('halley+neuron', 'entry+halley+neuron', polar)} higher",
        ],
        "05_adamw": [
            f"{decays[0.05]:.3f}, {decays[0.1]:.3f} and {decays[0.2]:.3f} with decays",
            f"was {-against.mean:.3f} ± {against.half_width:.3f} below Muon",
        ],
        "06_signs": [f"ended [{gap('adamuon')} above Muon]"],
        "07_lion": [f"Lion ended {gap('lion', 'adamw')} above AdamW"],
        "08_scales": [f"hold {100 * np.mean(top):.0f} %"],
        "09_curvature": [
            f"takes {ms('soap_refresh_1')} on two CPU cores",
            f"against {ms('adamw')} with AdamW",
            f"after {steps('soap_refresh_1')} steps instead of {steps('adamw')}",
        ],
        "10_muon": [
            f"[{gap('adamw')} below tuned AdamW]",
            f"of {gap('entry+none+neuron', 'entry+halley+neuron', polar)}.",
            f"{shares[3]} are near 1 after three steps, {shares[4]} after four",
            f"and {shares[5]} after five",
            f"five steps bring {100 * np.mean(later):.0f} % there",
        ],
        "11_shampoo": [
            f"[{gap('shampoo')} above Muon]",
            f"SOAP ended {gap('soap_refresh_1')} above Muon",
        ],
    }
    assert momentum("entry+halley+neuron") == momentum("entry+halley+neuron", long)
    for page, texts in numbers.items():
        content = (ROOT / "docs" / "tour" / f"{page}.md").read_text()
        content = " ".join(content.split())
        for text in texts:
            assert text in content, (page, text)


def test_the_scorecard_of_the_page_is_that_of_its_run():
    results = ROOT / "benchmarks" / "results"
    page = (ROOT / "examples" / "rl" / "README.md").read_text()
    card = (results / "make_rl_2026-11-29.txt").read_text().splitlines()
    for line in card[2:6]:
        name, *shares = line.split() if line.strip()[0] != "s" else ["", *line.split()]
        assert f"| {' | '.join([name, *shares])} |" in page
    records = (results / "make_rl_2026-11-29.jsonl").read_text().splitlines()
    finals = [r for r in map(json.loads, records) if r["kind"] == "final"]
    for line, final in zip(card[4:6], finals, strict=True):
        assert line.split()[-1] == f"{final['best']['all']:.2f}"
