"""Every Python block of the README and docs/ runs, one namespace a file."""

import pathlib
import re

import pytest

from benchmarks import nanogpt_sweep

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
    if page.name == "README.md":
        assert len(blocks) >= 4
        params, tx = namespace["params"], namespace["tx"]
        assert tx.init(params)  # the first block's result is in use
        for name in ("halley", "gentle", "fused"):
            namespace[name].init(params)


def test_the_table_is_that_of_the_raw_results():
    text = (ROOT / "README.md").read_text()
    (path,) = set(re.findall(r"\((benchmarks/results/nanogpt\S+?\.json)\)", text))
    assert nanogpt_sweep.table(ROOT / path) in text
