"""Sphinx: MyST pages, the furo theme, autodoc from the installed package; no network."""

import inspect
import os
import sys
from pathlib import Path

from sphinx.application import Sphinx

import halfstep

sys.path.insert(0, str(Path(__file__).parent))  # tables.py
os.environ.setdefault("KERAS_BACKEND", "torch")  # autodoc imports the Keras door

project = "halfstep"
author = "The halfstep authors"
project_copyright = "The halfstep authors, Apache-2.0"
version = release = halfstep.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "tables",
]
exclude_patterns = ["_build"]
default_role = "py:obj"  # a docstring's `step` links to the method where Sphinx finds it

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_type_aliases = {
    name: name for name in ("ArrayLike", "Closure", "FloatArray", "Policies", "Scalar", "Event")
}
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 90
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"halfstep {release}"
html_static_path = ["_static"]
html_css_files = ["halfstep.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "native"
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#1f5f8b",
        "color-brand-content": "#1f5f8b",
        "font-stack": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif",
    },
    "dark_css_variables": {
        "color-brand-primary": "#7fb8e0",
        "color-brand-content": "#7fb8e0",
    },
}


def plain_property(app: Sphinx, what: str, name: str, obj: object, *rest: object) -> None:
    """Undo what napoleon does to a property: it takes a first line up to a colon for a type."""
    lines = rest[-1]
    text = inspect.cleandoc(obj.__doc__ or "")
    if what == "property" and isinstance(lines, list) and "\nRaises:" not in text:
        lines[:] = [*text.splitlines(), ""]


def setup(app: Sphinx) -> None:
    """Run after napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", plain_property, priority=600)
