"""Makes pages of Markdown files that lie outside docs/, and links between them.

A page that includes a file, such as `../CONTRIBUTING.md`, is the page of that file.
Links are written as they work in the repository, relative to the file that has them.
"""

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parents[1]
INCLUDE = re.compile(r"^```\{include\} (\S+)\n```$", re.MULTILINE)
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def included(page: Path) -> list[Path]:
    """Returns the files that a page includes."""
    return [
        (page.parent / path).resolve() for path in INCLUDE.findall(page.read_text())
    ]


def adapt(text: str, file: Path, page: Path) -> str:
    """Returns the text of a file with links that work on a page."""
    pages = {file: page for page in DOCS.rglob("*.md") for file in included(page)}

    def adapted(link: re.Match[str]) -> str:
        target = (file.parent / link[1]).resolve()
        target = pages.get(target / "README.md", pages.get(target, target))
        path = Path(os.path.relpath(target, page.parent)).as_posix()
        return f"]({path}{link[2] or ''})"

    return LINK.sub(adapted, text)


def read(app: Sphinx, name: str, source: list[str]) -> None:
    """Includes files in a page, and adapts all links."""
    page = DOCS / f"{name}.md"
    if not page.exists():
        return
    text = adapt(source[0], page, page)
    for file in included(page):
        app.env.note_dependency(str(file))
        content = adapt(file.read_text(), file, page)
        text = INCLUDE.sub(lambda match, content=content: content, text, count=1)
    source[0] = text


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
