"""The directive `widget`: a picture with controls, drawn by docs/_static/tour/draw.js.

    ```{widget} valley
    What it shows, in a sentence.
    ```

The build draws it in V8 for readers without JavaScript; the browser draws it again when
a control moves. Scripts are on pages with widgets only.
"""

import html
import json
from pathlib import Path
from typing import Any

from docutils import nodes
from py_mini_racer import MiniRacer
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

DOCS = Path(__file__).parents[1]
WIDTH = 720


class Canvas:
    """Draws widgets in V8."""

    def __init__(self) -> None:
        self.engine = MiniRacer()
        for name in ("svg.js", "draw.js"):
            self.engine.eval((DOCS / "_static" / "tour" / name).read_text())

    def draw(
        self, data: dict[str, Any], *states: dict[str, Any], width: int = WIDTH
    ) -> list[dict[str, str]]:
        """Returns the SVG and the status of a widget in each of some states.

        Args:
          data: Its data.
          *states: The places of controls; the others are where the widget begins.
          width: The width in pixels.
        """
        code = f"(() => {{ const data = {json.dumps(data)}; "
        code += f"return JSON.stringify({json.dumps(states)}.map((state) => "
        code += (
            f"Tour.draw({{...Tour.initial(data), ...state}}, data, {width}))); }})()"
        )
        return json.loads(str(self.engine.eval(code)))


def picture(name: str) -> str:
    """Returns a widget as an SVG of its own, on white."""
    style = (DOCS / "_static" / "tour" / "tour.css").read_text()
    style += "svg.tour-widget { margin: 0; background: white; font-family: sans-serif }"
    (drawn,) = Canvas().draw(load(name), {})
    begin, rest = drawn["svg"].removeprefix("<svg ").split(">", 1)
    namespace = '<svg xmlns="http://www.w3.org/2000/svg" class="tour-widget" '
    return f"{namespace}{begin}><style>{style}</style>{rest}\n"


def load(name: str) -> dict[str, Any]:
    """Returns the data of a widget."""
    return json.loads((DOCS / "tour" / "data" / f"{name}.json").read_text())


def slider(control: dict[str, Any]) -> str:
    """Returns a label, a range, and its value as text."""
    most = control.get("max", len(control.get("texts", ())) - 1)
    value = control["value"]
    text = control["texts"][value] if "texts" in control else str(value)
    return (
        f"<label>{html.escape(control['label'])} "
        f'<input type="range" name="{control["name"]}" min="0" max="{most}" step="1" '
        f'value="{value}" aria-valuetext="{html.escape(text)}" autocomplete="off">'
        f'<output aria-hidden="true">{html.escape(text)}</output></label>'
    )


def checkboxes(control: dict[str, Any]) -> str:
    """Returns a group of checkboxes."""
    boxes = "".join(
        f'<label><input type="checkbox" name="{control["name"]}" value="{place}" '
        f'autocomplete="off"{" checked" if place in control["value"] else ""}>'
        f"{html.escape(text)}</label>"
        for place, text in enumerate(control["texts"])
    )
    legend = f"<legend>{html.escape(control['label'])}</legend>"
    return f"<fieldset>{legend}{boxes}</fieldset>"


class Widget(SphinxDirective):
    """The directive."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        data = load(name)
        scripts = ("_static/tour/svg.js", "_static/tour/draw.js")
        for path in (f"tour/data/{name}.json", *scripts):
            self.env.note_dependency(str(DOCS / path))
        (drawn,) = Canvas().draw(data, {})
        controls = "".join(
            (checkboxes if control.get("many") else slider)(control)
            for control in data["controls"]
        )
        if any(control.get("step") for control in data["controls"]):
            controls += '<button type="button" name="play">Play</button>'
        controls += '<button type="button" name="reset">Reset</button>'
        text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
        text = text.replace("</", "<\\/")  # as in any script
        caption = nodes.paragraph()
        self.state.nested_parse(self.content, self.content_offset, caption)
        begin = (
            f'<figure class="tour-widget" id="widget-{name}">'
            f'<div class="tour-picture">{drawn["svg"]}</div>'
            f"<form hidden>{controls}</form>"
            f'<p role="status">{html.escape(drawn["status"])}</p>'
            f'<script type="application/json">{text}</script>'
            "<figcaption>"
        )
        children = caption.children
        raw = nodes.raw("", begin, format="html")
        end = nodes.raw("", "</figcaption></figure>", format="html")
        return [raw, *children, end]


def add_scripts(app: Sphinx, page: str, template: str, context: Any, tree: Any) -> None:
    """Adds the scripts and the style of widgets to the pages that have some."""
    if tree is not None and "tour-widget" in context.get("body", ""):
        for name in ("svg.js", "draw.js", "run.js"):
            app.add_js_file(f"tour/{name}", loading_method="defer")
        app.add_css_file("tour/tour.css")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("widget", Widget)
    app.connect("html-page-context", add_scripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    # The picture of the README.
    (DOCS / "_static" / "memory.svg").write_text(picture("memory"))
