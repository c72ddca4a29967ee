"""The documentation: what its pages contain, and what they load."""

import importlib.metadata
import importlib.util
import operator
import pathlib
import re
import subprocess
import sys
import tomllib
import types

import pytest

import optax_matrix as om

DOCS = pathlib.Path(__file__).parents[1] / "docs"
EXTENSIONS = DOCS / "_ext"


def test_every_public_name_is_in_the_reference_once():
    text = "".join(page.read_text() for page in (DOCS / "api").glob("*.rst"))
    names = re.findall(r"^\.\. auto(?:function|class|data):: (\w+)$", text, re.M)
    assert sorted([*names, "diagnostics"]) == sorted(om.__all__)
    assert ".. automodule:: optax_matrix.diagnostics\n   :members:" in text


def test_citations_are_those_of_the_docstrings():
    text = (DOCS / "citations.md").read_text()
    bib = (DOCS / "references.bib").read_text()
    entries = dict(re.findall(r"^@misc\{(\w+),\n(.*?)^\}$", bib, re.M | re.S))
    assert len(entries) == bib.count("@")
    assert all("title = " in entry and "year = " in entry for entry in entries.values())
    rows = {
        name: re.findall(r"`(\w+)`", keys)
        for names, keys in re.findall(r"^\| (`.*`) \| (.*) \|$", text, re.M)
        for name in re.findall(r"`([^`]+)`", names)
    }
    assert set(entries) == {key for keys in rows.values() for key in keys}
    assert all(rows.values())
    assert set(om.OPTIMIZERS) - {"sgd"} <= set(rows)
    methods = [name for name in rows if name.endswith(")")]
    for name in methods:
        assert isinstance(eval(f"om.{name}", {"om": om}), om.PolarMethod)
    for name in rows.keys() - set(methods) - set(om.OPTIMIZERS):
        assert callable(operator.attrgetter(name)(om))
    for name in om.__all__:
        cited = set(re.findall(r"arXiv:([\d.]+\d)", getattr(om, name).__doc__ or ""))
        if name != "diagnostics" and cited:
            keys = rows[name] if name in rows else rows[f"{name}()"]
            found = "".join(entries[key] for key in keys)
            assert cited <= set(re.findall(r"eprint = \{(.*)\}", found)), name


def extension(name):
    spec = importlib.util.spec_from_file_location(name, EXTENSIONS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_included_files_lead_to_pages(tmp_path, monkeypatch):
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    files = extension("repository_files")
    docs = tmp_path / "docs"
    (docs / "deep").mkdir(parents=True)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "README.md").write_text(
        "[a](../docs/deep/page.md#x) [b](raw.json) [c](https://x.org/y) [d](#here)"
    )
    (docs / "bench.md").write_text("# Top\n\n```{include} ../bench/README.md\n```\n")
    (docs / "deep" / "page.md").write_text(
        "[e](../../bench) [f](../../bench/README.md)"
    )
    monkeypatch.setattr(files, "DOCS", docs)

    noted = []
    app = types.SimpleNamespace()
    app.env = types.SimpleNamespace(note_dependency=noted.append)

    def read(name):
        source = [(docs / f"{name}.md").read_text()]
        files.read(app, name, source)
        return source[0]

    assert read("bench") == (
        "# Top\n\n[a](deep/page.md#x) [b](../bench/raw.json) [c](https://x.org/y) "
        "[d](#here)\n"
    )
    assert noted == [str(tmp_path / "bench" / "README.md")]
    assert read("deep/page") == "[e](../bench.md) [f](../bench.md)"


def test_formulas_that_are_not_understood_are_warnings(caplog):
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    pytest.importorskip("latex2mathml")
    mathml = extension("mathml")
    warnings = []
    mathml.logger.warning = lambda text, *given, **_: warnings.append(text % given)
    assert "<mfrac>" in mathml.to_mathml(r"\frac{1}{2}", "inline") and not warnings
    mathml.to_mathml(r"\unknown x", "block")
    mathml.to_mathml(r"\frac{1", "block")
    assert "unknown command \\unknown" in warnings[0]
    mathml.to_mathml(r"\left( x", "block")
    assert "braces do not match" in warnings[1]
    assert warnings[-1].startswith("cannot convert '\\\\left( x'")


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", DOCS, tmp_path]
    subprocess.run(command, check=True)
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        assert "<math" not in text or r"\frac" not in text
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", text):
            loaded = re.search(r"\b(?:src|href)=\"([^\"]*)\"", tag)
            assert not loaded or not re.match(r"\w+:|//", loaded[1]), (page, tag)
        for sheet in tmp_path.rglob("_static/*.css"):
            assert not re.search(r"url\([\"']?(https?:)?//", sheet.read_text())


def test_there_is_one_version():
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]
    cited = (DOCS.parent / "CITATION.cff").read_text()
    assert f"\nversion: {project['version']}\n" in cited
    assert importlib.metadata.version("optax-matrix") == project["version"]
