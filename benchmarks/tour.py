"""Measures the tour in headless Chromium: sizes of its pages, and times of redraws.

    make docs
    python -m benchmarks.tour --out TOUR.json

A redraw is what happens when a control moves: the picture is drawn, and the browser
lays it out. Each widget is redrawn 200 times, in other states. Sizes are after gzip.
"""

import argparse
import gzip
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from selenium import webdriver

from examples.nanogpt import record

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "docs" / "tour"
SCRIPTS = ROOT / "docs" / "_static" / "tour"
REDRAW = """
const picture = arguments[0].querySelector(".tour-picture");
const data = JSON.parse(arguments[0].querySelector("script").textContent);
const count = (c) => (c.max ?? c.texts.length - 1) + 1;
const times = [];
for (let i = 0; i < 200; i++) {
  const state = Tour.initial(data);
  for (const c of data.controls) {
    state[c.name] = c.many ? c.texts.map((_, k) => k) : (c.value + i) % count(c);
  }
  const begin = performance.now();
  picture.innerHTML = Tour.draw(state, data, 720).svg;
  picture.getBoundingClientRect();
  times.push(performance.now() - begin);
}
return times;
"""


def chromium(*arguments: str) -> webdriver.Chrome:
    """Returns a headless Chromium; raises if it is not installed."""
    driver = shutil.which("chromedriver")
    if driver is None:
        raise RuntimeError(
            "chromedriver is not on the PATH: install it (Debian: chromium-driver)"
        )
    options = webdriver.ChromeOptions()
    window = ("--headless=new", "--window-size=1200,900")
    container = ("--no-sandbox", "--disable-dev-shm-usage")  # where /dev/shm is small
    for argument in (*window, *container, *arguments):
        options.add_argument(argument)
    logs = {"browser": "ALL", "performance": "ALL"}
    options.set_capability("goog:loggingPrefs", logs)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def size(*paths: Path) -> int:
    """Returns the bytes of files after gzip."""
    return sum(len(gzip.compress(path.read_bytes())) for path in paths)


def measure() -> dict[str, Any]:
    """Returns the browser, the sizes, and milliseconds of redraws by widget."""
    pages, redraws = {}, {}
    with chromium() as browser:
        for page in sorted(SITE.glob("[0-9]*.html")):
            pages[page.stem] = size(page)
            browser.get(page.as_uri())
            for figure in browser.find_elements("css selector", "figure.tour-widget"):
                times = browser.execute_script(REDRAW, figure)
                name = str(figure.get_attribute("id")).removeprefix("widget-")
                redraws[name] = {
                    "median": round(statistics.median(times), 2),
                    "95 %": round(statistics.quantiles(times, n=20)[-1], 2),
                }
        version = browser.capabilities["browserVersion"]
    scripts = size(*SCRIPTS.glob("*.js"))
    return {"chromium": version, "scripts": scripts, "pages": pages, "ms": redraws}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    result = {**record.environment(), **measure()}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    largest = max(result["pages"].values())
    slowest = max(result["ms"], key=lambda name: result["ms"][name]["95 %"])
    print(f"scripts {result['scripts']} bytes, largest page {largest} bytes")
    print(f"slowest redraw: {slowest}, {result['ms'][slowest]} ms")


if __name__ == "__main__":
    main()
