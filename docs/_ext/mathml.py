"""Renders TeX as MathML, which browsers show without JavaScript or fonts of ours."""

import re
from typing import Any

from docutils import nodes
from latex2mathml import converter
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def to_mathml(tex: str, display: str, where: Any = None) -> str:
    """Returns MathML, and warns about TeX that is not understood.

    Args:
      tex: The formula.
      display: "inline" or "block".
      where: The node of the formula, whose place the warning names.
    """
    braces = re.sub(r"\\[{}]", "", tex)
    if braces.count("{") != braces.count("}"):
        logger.warning("braces do not match in %r", tex, location=where)
    try:
        result = converter.convert(tex, display=display)
    except Exception as error:  # the converter's errors have no base of their own
        logger.warning("cannot convert %r: %r", tex, error, location=where)
        return ""
    # Commands that the converter does not know are in its output as they are.
    for command in re.findall(r"\\[a-zA-Z]+", result):
        logger.warning("unknown command %s in %r", command, tex, location=where)
    return result


def inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(to_mathml(node.astext(), "inline", node))
    raise nodes.SkipNode


def block(writer: Any, node: nodes.math_block) -> None:
    mathml = to_mathml(node.astext(), "block", node)
    # Formulas that are wider than a phone scroll.
    writer.body.append(f'<div class="formula" tabindex="0">{mathml}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
