"""The site in headless Chromium: `make browser` builds it and runs this."""

import json
import os
import pathlib
import re
import shutil

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SITE = ROOT / "build" / "docs"
AXE = ROOT / "build" / "package" / "axe.min.js"  # from `npm pack axe-core`
TOUR = sorted(path.stem for path in (ROOT / "docs" / "tour").glob("*.md"))
OTHERS = ["index", "quickstart", "derivations", "convergence", "api/optimizers"]
PAGES = [*(f"tour/{name}" for name in TOUR), *OTHERS]

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver")
    if not driver:
        pytest.skip("chromedriver is not installed (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    for argument in (
        *("--headless=new", "--no-sandbox", "--window-size=1200,900"),
        # Whatever is asked of another host fails, and is in the log.
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking"),
    ):
        options.add_argument(argument)
    logs = {"browser": "ALL", "performance": "ALL"}
    options.set_capability("goog:loggingPrefs", logs)
    service = webdriver.ChromeService(driver)
    with webdriver.Chrome(options=options, service=service) as found:
        found.set_script_timeout(60)
        yield found


def visit(browser, page):
    browser.get(f"file://{SITE}/{page}.html")
    return browser


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
    # The theme says there which mode it has chosen.
    said = [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"]
    assert said == []


@pytest.mark.parametrize("page", [f"tour/{name}" for name in TOUR])
def test_sliders_move_by_keyboard(browser, page):
    from selenium.webdriver.common.keys import Keys

    visit(browser, page)
    figures = browser.find_elements("css selector", "figure.tour-widget")
    for figure in figures:
        for slider in figure.find_elements("css selector", "input"):
            assert slider.is_displayed()
            picture = figure.find_element("css selector", ".tour-picture")
            before = picture.get_attribute("innerHTML"), slider.get_attribute("value")
            text = slider.get_attribute("aria-valuetext")
            top = slider.get_attribute("max") == slider.get_attribute("value")
            slider.send_keys(Keys.ARROW_LEFT if top else Keys.ARROW_RIGHT)
            assert slider.get_attribute("value") != before[1]
            assert slider.get_attribute("aria-valuetext") != text
            assert picture.get_attribute("innerHTML") != before[0]
            status = figure.find_element("css selector", "[role=status]").text
            assert len(status) > 10 and "undefined" not in status
        for button in figure.find_elements("css selector", "button"):
            shown = figure.find_element("css selector", "[name=step]")
            before = shown.get_attribute("value")
            button.click()
            browser.execute_async_script("setTimeout(arguments[0], 300)")
            button.click()
            assert shown.get_attribute("value") != before
    if page not in ("tour/index",):
        assert figures


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


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_no_serious_findings_of_axe(browser, page, dark):
    if not AXE.exists():
        pytest.skip(f"{AXE} is missing: run `make browser`")
    mode = "dark" if dark else "light"
    features = [{"name": "prefers-color-scheme", "value": mode}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    visit(browser, page)
    theme = browser.execute_script("return document.documentElement.dataset.theme")
    assert theme == mode
    browser.execute_script(AXE.read_text())
    found = browser.execute_async_script(
        "axe.run().then((r) => arguments[0](r.violations))"
    )
    serious = [
        (each["id"], [node["html"][:200] for node in each["nodes"]][:3])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
    assert serious == []


@pytest.mark.parametrize("page", [f"tour/{name}" for name in TOUR if name != "index"])
def test_without_scripts_there_is_a_figure(page):
    text = (SITE / f"{page}.html").read_text()
    figures = text.split('<figure class="tour-widget"')[1:]
    assert figures
    for figure in figures:
        assert re.search(r'<div class="tour-picture"><svg [^>]*role="img"', figure)
        assert "<form hidden>" in figure
    assert os.path.getsize(SITE / f"{page}.html") < 200_000
