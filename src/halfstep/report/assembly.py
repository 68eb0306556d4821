"""What every page is put together with: Jinja2, JSON in a script, Plotly's JavaScript."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import plotly
from markupsafe import Markup


def in_script(value: Any) -> Markup:
    """JSON that cannot end the script element that it stands in, whatever the strings hold."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


@cache
def plotly_js() -> str:
    """Return Plotly's JavaScript, which the Python package brings along."""
    path = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    return path.read_text(encoding="utf-8")


@cache
def environment() -> jinja2.Environment:
    """Return what fills the templates of this folder; what they are given is escaped."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
