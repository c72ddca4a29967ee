"""The site in headless Chromium: `make browser` builds it and runs this."""

import importlib
import json
import os
import pathlib
import re
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SITE = ROOT / "build" / "docs"
AXE = ROOT / "build" / "package" / "axe.min.js"  # from `npm pack axe-core`
DOCS = ROOT / "docs"
TOUR = sorted(path.stem for path in (DOCS / "tour").glob("*.md"))
CHAPTERS = [f"tour/{name}" for name in TOUR if name != "index"]
WIDGETS = {
    name: re.findall(
        r"^```\{widget\} (\w+)$", (DOCS / "tour" / f"{name}.md").read_text(), re.M
    )
    for name in TOUR
}
PLAYING = [
    f"tour/{name}"
    for name, widgets in WIDGETS.items()
    if any(
        '"step":true' in (DOCS / "tour" / "data" / f"{widget}.json").read_text()
        for widget in widgets
    )
]
OTHERS = ["index", "quickstart", "derivations", "convergence", "api/optimizers"]
PAGES = [*(f"tour/{name}" for name in TOUR), *OTHERS]

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def browser():
    arguments = [
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--disable-background-networking",
    ]
    # Whatever is asked of another host fails, and is in the log.
    with importlib.import_module("benchmarks.tour").chromium(*arguments) as found:
        found.set_script_timeout(60)
        yield found


def visit(browser, page):
    browser.get(f"file://{SITE}/{page}.html")
    return browser


def wait(browser, true, seconds=10):
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not become true in time"
        browser.execute_async_script("setTimeout(arguments[0], 30)")


def set_width(browser, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_loads_nothing_from_elsewhere_and_has_no_errors(browser, page):
    for log in ("browser", "performance"):
        browser.get_log(log)
    visit(browser, page)
    events = [
        json.loads(entry["message"])["message"]
        for entry in browser.get_log("performance")
    ]
    loaded = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert len(loaded) > 3
    assert [url for url in loaded if not re.match("file:|data:", url)] == []
    assert said(browser) == []


def parts(figure):
    """The picture of a widget, its status and its controls."""
    picture = figure.find_element("css selector", ".tour-picture")
    status = figure.find_element("css selector", "[role=status]")
    return picture, status, figure.find_elements("css selector", "input")


def figures_of(browser, page):
    """The widgets of a page; the log is empty when they begin."""
    browser.get_log("browser")
    visit(browser, page)
    figures = browser.find_elements("css selector", "figure.tour-widget")
    assert figures
    return figures


def said(browser):
    """What pages have logged, but for the theme, which says what mode it has chosen."""
    return [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"]


@pytest.mark.parametrize("page", CHAPTERS)
def test_controls_change_by_keyboard_and_are_reset(browser, page):
    from selenium.webdriver.common.keys import Keys

    for figure in figures_of(browser, page):
        picture, status, controls = parts(figure)
        first = picture.get_attribute("innerHTML"), status.text
        for control in controls:
            assert control.is_displayed()
            before = picture.get_attribute("innerHTML")
            if control.get_attribute("type") == "checkbox":
                checked = control.is_selected()
                control.send_keys(Keys.SPACE)
                assert control.is_selected() != checked
            else:
                value = control.get_attribute("value")
                text = control.get_attribute("aria-valuetext")
                top = control.get_attribute("max") == value
                control.send_keys(Keys.ARROW_LEFT if top else Keys.ARROW_RIGHT)
                assert control.get_attribute("value") != value
                assert control.get_attribute("aria-valuetext") != text
            assert picture.get_attribute("innerHTML") != before
            assert len(status.text) > 10 and "undefined" not in status.text
        figure.find_element("css selector", "[name=reset]").click()
        assert (picture.get_attribute("innerHTML"), status.text) == first
    assert said(browser) == []


@pytest.mark.parametrize("page", PLAYING)
def test_play_goes_to_the_end_and_begins_again(browser, page):
    figures = figures_of(browser, page)
    assert browser.find_elements("css selector", "[name=play]")
    for figure in figures:
        for play in figure.find_elements("css selector", "[name=play]"):
            step = figure.find_element("css selector", "[name=step]")
            most = step.get_attribute("max")
            play.click()
            assert play.text == "Pause"
            wait(browser, lambda p=play: p.text == "Play", 60)
            assert step.get_attribute("value") == most
            play.click()
            wait(browser, lambda s=step: s.get_attribute("value") in ("0", "1", "2"))
            play.click()
            assert play.text == "Play"
    assert said(browser) == []


def test_other_controls_stop_play_and_count(browser):
    from selenium.webdriver.common.keys import Keys

    (figure,) = figures_of(browser, "tour/02_momentum")
    play = figure.find_element("css selector", "[name=play]")
    step, rate = (
        figure.find_element("css selector", f"[name={name}]")
        for name in ("step", "rate")
    )
    play.click()
    wait(browser, lambda: step.get_attribute("value") != "40")
    before = int(rate.get_attribute("value"))
    rate.send_keys(Keys.ARROW_LEFT)
    assert int(rate.get_attribute("value")) == before - 1
    assert play.text == "Play"
    play.click()
    figure.find_element("css selector", "[name=reset]").click()
    assert play.text == "Play" and step.get_attribute("value") == "40"
    assert int(rate.get_attribute("value")) == before


@pytest.mark.parametrize(
    ("page", "widget", "way", "changed"),
    [
        ("tour/09_curvature", "newton", (150, 40), ["start"]),
        ("tour/12_muonh", "circle", (-60, -90), ["eta", "gamma"]),
    ],
)
@pytest.mark.parametrize("width", [390, 1200])
def test_handles_are_dragged(browser, page, widget, way, changed, width):
    from selenium.webdriver import ActionChains

    set_width(browser, width)
    try:
        figures_of(browser, page)
        figure = browser.find_element("id", f"widget-{widget}")
        _, status, controls = parts(figure)

        def values():
            return {x.get_attribute("name"): x.get_attribute("value") for x in controls}

        before, text = values(), status.text
        handle = figure.find_element("css selector", ".handle")
        center = "arguments[0].scrollIntoView({block: 'center'})"
        browser.execute_script(center, handle)
        scale = 1 if width > 800 else 0.45
        x, y = (round(scale * each) for each in way)
        ActionChains(browser).drag_and_drop_by_offset(handle, x, y).perform()
        after = values()
        assert [name for name in after if after[name] != before[name]] == changed
        assert status.text != text
        assert said(browser) == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_finger_drags_a_handle_and_does_not_scroll(browser):
    def touch(kind, *points):
        places = [{"x": x, "y": y} for x, y in points]
        event = {"type": kind, "touchPoints": places}
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", event)

    set_width(browser, 390)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        figures_of(browser, "tour/09_curvature")
        figure = browser.find_element("id", "widget-newton")
        start = figure.find_element("css selector", "[name=start]")
        handle = figure.find_element("css selector", ".handle")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", handle)
        place = "const r = arguments[0].getBoundingClientRect(); "
        place += "return [r.x + r.width / 2, r.y + r.height / 2]"
        x, y = browser.execute_script(place, handle)
        before = start.get_attribute("value"), browser.execute_script("return scrollY")
        touch("touchStart", (x, y))
        for k in range(1, 11):
            touch("touchMove", (x + k, y + 12 * k))
        touch("touchEnd")
        assert browser.execute_script("return scrollY") == before[1]
        assert start.get_attribute("value") == "0" != before[0]
        # Anywhere else in the picture a finger scrolls the page.
        touch("touchStart", (x + 150, y))
        for k in range(1, 11):
            touch("touchMove", (x + 150, y - 12 * k))
        touch("touchEnd")
        wait(browser, lambda: browser.execute_script("return scrollY") > before[1])
        assert start.get_attribute("value") == "0"
    finally:
        browser.execute_cdp_cmd(
            "Emulation.setTouchEmulationEnabled", {"enabled": False}
        )
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("page", CHAPTERS)
def test_pictures_are_drawn_again_for_another_width(browser, page):
    figures = figures_of(browser, page)
    sizes = []
    try:
        for width in (1200, 390):
            set_width(browser, width)
            browser.execute_async_script("setTimeout(arguments[0], 200)")
            boxes = [
                figure.find_element("css selector", "svg").get_dom_attribute("viewBox")
                for figure in figures
            ]
            sizes.append(boxes)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert all(wide != narrow for wide, narrow in zip(*sizes, strict=True)), sizes
    assert said(browser) == []


@pytest.mark.parametrize("page", PAGES)
def test_a_phone_does_not_scroll_sideways(browser, page):
    set_width(browser, 390)
    try:
        visit(browser, page)
        size = "return [document.documentElement.scrollWidth, window.innerWidth]"
        scroll, width = browser.execute_script(size)
        assert scroll <= width == 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_pages_are_small_and_every_widget_is_redrawn(browser):
    del browser  # skips without Chromium
    found = importlib.import_module("benchmarks.tour").measure()
    assert found["scripts"] <= 15_000
    assert [f"tour/{page}" for page in found["pages"]] == CHAPTERS
    assert max(found["pages"].values()) <= 60_000
    data = (DOCS / "tour" / "data").glob("*.json")
    assert set(found["ms"]) == {path.stem for path in data}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_no_serious_findings_of_axe(browser, page, dark):
    mode = "dark" if dark else "light"
    features = [{"name": "prefers-color-scheme", "value": mode}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        visit(browser, page)
        theme = browser.execute_script("return document.documentElement.dataset.theme")
        assert theme == mode
        browser.execute_script(AXE.read_text())
        found = browser.execute_async_script(
            "axe.run().then((r) => arguments[0](r.violations))"
        )
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    serious = [
        (each["id"], [node["html"][:200] for node in each["nodes"]][:3])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
    assert serious == []


def test_search_works_offline(browser):
    browser.get_log("browser")
    browser.get(f"{(SITE / 'search.html').as_uri()}?q=hyperball_retract")
    found = "#search-results li a"
    wait(browser, lambda: browser.find_elements("css selector", found))
    links = browser.find_elements("css selector", found)
    assert any("api/sizes.html" in link.get_attribute("href") for link in links)
    assert said(browser) == []


@pytest.mark.parametrize("page", CHAPTERS)
def test_without_scripts_there_is_a_figure(browser, page):
    off = {"value": True}
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", off)
    try:
        visit(browser, page)
        figures = browser.find_elements("css selector", "figure.tour-widget")
        assert figures
        for figure in figures:
            assert not figure.find_element("css selector", "form").is_displayed()
            for shape in figure.find_elements("css selector", ".frame, .level, .ring"):
                assert shape.value_of_css_property("stroke") != "none"
            for text in figure.find_elements("css selector", "text")[:3]:
                assert text.is_displayed()
            # A line of a caption that begins with a number and a dot is a list.
            assert not figure.find_elements("css selector", "figcaption ol")
    finally:
        off = {"value": False}
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", off)
    assert os.path.getsize(SITE / f"{page}.html") < 200_000
