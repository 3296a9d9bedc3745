"""Sphinx settings of the documentation: `make docs`."""

from __future__ import annotations

import os
import re
from importlib.metadata import version as version_of

project = "timm_contconv"
author = "The timm_contconv authors"
copyright = author
release = version_of("timm_contconv")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "sphinx_design",
]
source_suffix = {".md": "myst-nb"}
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "timm_contconv"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {"source_repository": "", "navigation_with_keys": True}
html_show_sourcelink = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Notebooks run when the site is built; an error in a cell is an error of the build.
nb_execution_mode = "force"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Parameters", "params_style")]
napoleon_use_ivar = True

# Names of PyTorch link to its documentation where the network allows it.
intersphinx_mapping = {}
if os.environ.get("DOCS_INTERSPHINX"):
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }


def _markdown_to_rst(app, what, name, obj, options, lines):
    """Docstrings write code in single backticks and mean every asterisk."""
    for number, line in enumerate(lines):
        lines[number] = re.sub(r"(?<![`:])`([^`]+)`(?!`)", r"``\1``", line).replace("*", r"\*")
        for code in re.findall(r"``[^`]+``", lines[number]):
            lines[number] = lines[number].replace(code, code.replace(r"\*", "*"))


def _notebooks_apart(app, env, docnames):
    """Spread the notebooks: they take longest, and Sphinx reads pages next to each other in one process."""
    notebooks = [name for name in docnames if name.startswith("notebooks/")]
    for number, name in enumerate(notebooks):
        docnames.remove(name)
        docnames.insert(number * (len(docnames) // len(notebooks)), name)


def setup(app):
    app.connect("env-before-read-docs", _notebooks_apart)
    app.connect("autodoc-process-docstring", _markdown_to_rst, priority=0)  # ahead of napoleon
