"""Configures Sphinx: `make docs`."""

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "optax_matrix"
author = "The optax_matrix authors"
version = release = importlib.metadata.version("optax-matrix")
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    "mathml",
    "repository_files",
    "tour",
]
exclude_patterns = ["_build", "_ext"]
default_role = "py:obj"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Cost", "Precision", "Sharding"]

# Other libraries' names are not links, because their inventories are on the network.
nitpick_ignore_regex = [
    ("py:obj", r"(flax|jax|jnp|optax)\..*"),
    ("py:class", r"numpy\..*"),
]

html_theme = "pydata_sphinx_theme"
html_title = "optax_matrix"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
# The summaries of search results are fetched, which browsers refuse from a file.
html_show_search_summary = False
html_context = {"default_mode": "auto"}
html_theme_options = {
    "navigation_with_keys": False,
    # The wide button's label is not what it says, which axe-core finds serious.
    "navbar_persistent": ["search-button"],
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
copyright = "The optax_matrix authors"


def resolve(app: Sphinx, env: Any, node: Any, content: nodes.Node) -> Any:
    """Finds `match_rms` from inside any module."""
    target = node["reftarget"]
    if node.get("refdomain") != "py" or target.startswith("optax_matrix"):
        return None
    where = (env, node["refdoc"], app.builder, "obj", f"optax_matrix.{target}")
    return env.domains["py"].resolve_xref(*where, node, content)


def setup(app: Sphinx) -> None:
    app.connect("missing-reference", resolve)
