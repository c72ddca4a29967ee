"""The tour's widgets: their data, and what JavaScript draws of it."""

import gzip
import importlib
import importlib.util
import itertools
import json
import math
import pathlib
import re
import xml.etree.ElementTree

import jax
import numpy as np
import pytest

import optax_matrix as om

DOCS = pathlib.Path(__file__).parents[1] / "docs"
NAMES = sorted(path.stem for path in (DOCS / "tour" / "data").glob("*.json"))
USED = [
    name
    for page in sorted((DOCS / "tour").glob("*.md"))
    for name in re.findall(r"^```\{widget\} (\w+)$", page.read_text(), re.M)
]


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def widgets(monkeypatch):
    """The functions that compute the data, by name."""
    monkeypatch.syspath_prepend(DOCS / "tour")
    return importlib.import_module("widgets").WIDGETS


def load(name):
    return json.loads((DOCS / "tour" / "data" / f"{name}.json").read_text())


def choices(control):
    """All places of a control, or some of its steps."""
    if control.get("step"):
        return [0, control["max"] // 2, control["max"]]
    if control.get("many"):
        return [(), (2,), tuple(range(len(control["texts"])))]
    return range(len(control["texts"]))


@pytest.fixture(scope="module")
def canvas():
    pytest.importorskip("py_mini_racer", reason="the extra `docs` is not installed")
    return module(DOCS / "_ext" / "tour.py").Canvas()


def test_every_widget_is_on_a_page_once(widgets):
    assert sorted(USED) == NAMES == sorted(widgets)


@pytest.mark.parametrize("name", NAMES)
def test_a_widget_is_drawn_in_all_its_states(canvas, name):
    data = load(name)
    names = [control["name"] for control in data["controls"]]
    places = list(itertools.product(*map(choices, data["controls"])))
    states = [dict(zip(names, values, strict=True)) for values in places]
    for width in (720, 340):
        pictures = canvas.draw(data, *states, width=width)
        for found in pictures:
            xml.etree.ElementTree.fromstring(found["svg"])
            assert f'viewBox="0 0 {width} ' in found["svg"]
            assert not re.search(r"NaN|undefined|Infinity|null", found["svg"])
            assert len(found["status"]) > 10 and "undefined" not in found["status"]
    drawn = {
        values: found["svg"] for values, found in zip(places, pictures, strict=True)
    }
    for place, control in enumerate(data["controls"]):
        # Each control changes the picture, in some state of the others.
        def others(item, place=place):
            values = item[0]
            return (*values[:place], *values[place + 1 :])

        rows = sorted(drawn.items(), key=others)
        groups = [
            {svg for _, svg in group} for _, group in itertools.groupby(rows, others)
        ]
        assert any(len(group) > 1 for group in groups), control["name"]


def test_paths_are_drawn_where_they_are(canvas):
    data = {
        **{"name": "p", "title": "P", "kind": "paths", "series": ["a", "b"]},
        "controls": [
            {"name": "step", "label": "Step", "max": 3, "value": 2, "step": 1}
        ],
        **{"xs": [-2, 2], "ys": [-1, 1], "curvatures": [[1.0, 4.0]], "levels": [0.5]},
        "by": [[], []],
        "paths": [
            {"": [[-100, 0, 100], [50, 0, -50], [1.0, 0.0, 1.0]]},
            {"": [[100, 300], [0, 0], [0.5, None]]},
        ],
    }
    (found,) = canvas.draw(data, {})
    assert found["status"] == "Step 2. a: loss 1, b left the picture."
    left, top, width, height = 50, 30, 720 - 68, 720 * 0.46
    points = [
        (left + width * (x + 2) / 4, top + height * (1 - (y + 1) / 2))
        for x, y in ((-1, 0.5), (0, 0), (1, -0.5))
    ]
    want = "".join(
        f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points)
    )
    assert re.sub(r"\.0(?=\D|$)", "", want) in found["svg"]


def test_chosen_curves_are_those_of_their_series(canvas):
    race = load("race")
    status = canvas.draw(race, {"series": [0, 6], "seed": 2})[0]["status"]
    ends = [race["values"]["2"][place][-1] for place in (0, 6)]
    found = re.fullmatch(r"At the end: sgd (\S+), sign_sgd (\S+)\.", status)
    assert found
    np.testing.assert_allclose([float(x) for x in found.groups()], ends, rtol=0.05)


def test_handles_go_to_the_nearest_place(canvas):
    def drag(name, state, x, y):
        given = (
            f"Tour.drag({json.dumps(state)}, {json.dumps(load(name))}, 720, {x}, {y})"
        )
        return json.loads(str(canvas.engine.eval(f"JSON.stringify({given})")))

    def handle(name, state):
        svg = canvas.draw(load(name), state)[0]["svg"]
        shape = re.search(r'class="handle" cx="(\S+)" cy="(\S+)"', svg)
        box = re.search(
            r'class="frame" x="(\S+)" y="(\S+)" width="(\S+)" height="(\S+)"', svg
        )
        assert shape and box
        x, y = map(float, shape.groups())
        left, top, width, height = map(float, box.groups())
        assert left < x < left + width and top < y < top + height
        return x, y

    for start in range(9):
        state = {"curvature": 1, "start": start}
        assert drag("newton", state, *handle("newton", state)) == {"start": start}
    for eta, gamma in itertools.product(range(4), range(9)):
        state = {"eta": eta, "gamma": gamma}
        assert drag("circle", state, *handle("circle", state)) == state


def losses(status):
    return [float(x) for x in re.findall(r"loss ([\de.+-]*\d)", status)]


def test_the_losses_of_paths_are_those_of_their_valley(canvas):
    data = load("newton")
    for curvature, start in itertools.product(range(3), range(9)):
        state = {"curvature": curvature, "start": start, "step": 0}
        x, y = data["starts"][start]
        loss = (x**2 + (1.0, 5.0, 25.0)[curvature] * y**2) / 2
        found = losses(canvas.draw(data, state)[0]["status"])
        np.testing.assert_allclose(found, [loss] * 2, 0.05)
    # Losses too small for places in hundredths: gradient descent shrinks each number.
    state = {"rate": 2, "curvature": 2, "start": 6, "step": 29}
    x, y = (start * (1 - 0.07 * a) ** 29 for start, a in ((-2.0, 1), (0.6, 25)))
    found = losses(canvas.draw(data, state)[0]["status"])
    assert found[0] == pytest.approx((x**2 + 25 * y**2) / 2, rel=0.06)


def test_a_step_is_said_to_be_lower_or_higher(canvas):
    data = load("slopes")
    for place, rate in enumerate(map(float, data["controls"][0]["texts"])):
        status = canvas.draw(data, {"rate": place})[0]["status"]
        want = [-rate + curvature * rate**2 / 2 for curvature in (0.5, 4.0)]
        np.testing.assert_allclose(losses(status), want, 0.01, 1e-3)
        words = ["lower than before", "as before", "higher than before"]
        said = [words[int(np.sign(round(loss, 6))) + 1] for loss in want]
        assert re.findall(r", ([a-z ]+ before|as before)", status) == said


def test_level_sets_are_those_of_the_hessian(canvas):
    data = load("hessian")
    texts = {control["name"]: control["texts"] for control in data["controls"]}
    shapes, levels = {}, data["levels"]
    for xx, yy, xy in itertools.product(range(5), range(5), range(5)):
        state = {"xx": xx, "yy": yy, "xy": xy}
        a, b, c = (float(texts[name][place]) for name, place in state.items())
        values = np.linalg.eigvalsh([[a, c], [c, b]])
        (found,) = canvas.draw(data, state)
        shapes[tuple(np.sign(np.round(values, 6)))] = found["status"].split(": ")[1]
        # On each level set the function has one value, which is among the levels.
        left, side = (720 - 360) / 2 + 10, 360
        drawn = set()
        top = float(re.search(r'class="frame" x="\S+" y="(\S+)"', found["svg"])[1])
        paths = re.findall(r'class="level( dashed)?" d="M([^"]+)"', found["svg"])
        assert len(paths) >= 2
        for below, points in paths:
            pixels = np.array([p.split() for p in points.split("L")], float)
            x = (pixels[:, 0] - left) / side * 4 - 2
            y = 2 - (pixels[:, 1] - top) / side * 4
            near = (abs(x) < 2) & (abs(y) < 2)
            heights = ((a * x**2 + b * y**2) / 2 + c * x * y)[near]
            if len(heights):
                sign = -1 if below else 1
                level = min(levels, key=lambda each: abs(sign * heights[0] - each))
                np.testing.assert_allclose(sign * heights, level, atol=0.02, rtol=0.03)
                drawn.add(sign * level)
        # All levels are there whose sets cross the picture.
        edge = np.linspace(-2, 2, 401)
        grid = (a * edge**2 + b * edge[:, None] ** 2) / 2 + c * edge * edge[:, None]
        low, high = grid.min(), grid.max()
        signed = [sign * level for sign in (-1, 1) for level in levels]
        assert {each for each in signed if low + 0.05 < each < high - 0.05} <= drawn
        assert drawn <= {each for each in signed if low - 0.05 < each < high + 0.05}
    assert shapes == {
        (1.0, 1.0): "a bowl.",
        (-1.0, 1.0): "a saddle.",
        (-1.0, -1.0): "a hill.",
        (0.0, 1.0): "a valley without end.",
        (-1.0, 0.0): "a ridge without end.",
    }


def test_the_picture_of_the_readme_is_what_is_drawn(canvas):
    del canvas  # skips without V8
    text = (DOCS / "_static" / "memory.svg").read_text()
    xml.etree.ElementTree.fromstring(text)
    assert text == module(DOCS / "_ext" / "tour.py").picture("memory")
    assert "docs/_static/memory.svg" in (DOCS.parent / "README.md").read_text()


def test_scripts_and_data_are_small():
    scripts = list((DOCS / "_static" / "tour").glob("*.js"))
    assert len(scripts) == 3
    assert sum(len(gzip.compress(path.read_bytes())) for path in scripts) <= 15_000
    for page in sorted((DOCS / "tour").glob("*.md")):
        names = re.findall(r"^```\{widget\} (\w+)$", page.read_text(), re.M)
        files = [DOCS / "tour" / "data" / f"{name}.json" for name in names]
        size = sum(len(gzip.compress(path.read_bytes())) for path in files)
        assert size <= 40_000, page.name


def test_known_numbers_of_the_data():
    counts = load("condition")["values"]["1"]
    assert counts[2] == [1.0] * 13 and counts[0][-1] > 10 * counts[1][-1]
    assert load("condition")["values"]["2"][0][-1] == 3280  # below what is looked at
    after = load("spectrum")["values"]["3,7"][1]  # exact
    np.testing.assert_allclose(after, 1.0, atol=1e-3)
    for found in load("circle")["values"].values():
        assert math.hypot(*found["end"]) == pytest.approx(1.0, abs=2e-3)
    left = load("decay")["values"]["2,1"][1]
    np.testing.assert_allclose(left, (1 - 0.1 * 0.01) ** 200 * np.ones(5), rtol=0.03)


@pytest.mark.slow
@pytest.mark.core
@pytest.mark.parametrize("name", NAMES)
def test_data_is_what_the_library_computes(widgets, name):
    """Almost all numbers: other processors round differently."""

    def close(a, b, path=""):
        if isinstance(a, dict):
            assert a.keys() == b.keys(), path
            return [x for k in a for x in close(a[k], b[k], f"{path}/{k}")]
        if isinstance(a, list):
            assert abs(len(a) - len(b)) <= 1, path
            return [
                x for i, y in enumerate(zip(a, b, strict=False)) for x in close(*y, i)
            ]
        if isinstance(a, str):
            return []  # the notes of `maps`
        if a is None or b is None:
            return [a is b]
        # Places are in hundredths.
        rounding = 1 if isinstance(a, int) and isinstance(b, int) else 1e-6
        return [abs(a - b) <= max(0.02 * max(abs(a), abs(b)), rounding)]

    with jax.numpy_rank_promotion("allow"):
        widget = widgets[name]()
    made, kept = json.loads(json.dumps(widget)), load(name)
    if name == "race":
        # Polar factors and eigenbases of matrices that are nearly singular depend on
        # rounding, so only the first steps of these rungs are the same everywhere.
        for race, seed in itertools.product((made, kept), kept["values"]):
            for place, rung in enumerate(race["series"]):
                if rung in om.MATRIX_OPTIMIZERS:
                    race["values"][seed][place] = race["values"][seed][place][:5]
    computed = {"values", "paths", "runs", "curve", "best", "curves"}
    assert made.keys() == kept.keys()
    for field in kept.keys() - computed:
        assert made[field] == kept[field], field
    for field in kept.keys() & computed:
        assert np.mean(close(kept[field], made[field])) > 0.98, field
