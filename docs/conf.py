"""Sphinx configuration: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

import proctree

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from examples import failures  # noqa: E402

project = "proctree"
author = "the proctree developers"
copyright = "the proctree developers"  # noqa: A001
version = release = proctree.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["build"]
html_theme = "furo"
html_title = f"proctree {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
# Napoleon makes a reference of each name under "Attributes:", and several classes have a `pid`.
suppress_warnings = ["ref.python"]


def _run_examples(_app: Sphinx) -> None:
    # A warning each; with -W an example that does not do what the page says fails the build.
    logger = logging.getLogger(__name__)
    for page in (HERE.parent / "README.md", *sorted(HERE.glob("*.md"))):
        for failure in failures(page):
            logger.warning("%s", failure)


def setup(app: Sphinx) -> None:
    """Runs every example before the pages are built."""
    app.connect("builder-inited", _run_examples)
