"""Importing the core costs nothing but NumPy: no framework, no command line, no page."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "jax", "keras", "tensorflow", "click", "rich", "plotly", "jinja2", "pynvml")

SHOW = """
import importlib, json, pkgutil, sys
for name in {names!r}:
    importlib.import_module(name)
    if name == "halfstep.core":
        for found in pkgutil.walk_packages(sys.modules[name].__path__, "halfstep.core."):
            importlib.import_module(found.name)
{then}
print(json.dumps(sorted(sys.modules)))
"""


def modules_after(*names: str, then: str = "") -> set[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SHOW.format(names=names, then=then)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("names", [("halfstep",), ("halfstep.core",), ("halfstep.cli",)])
def test_importing_leaves_every_framework_out(names):
    loaded = modules_after(*names)
    assert not loaded.intersection(HEAVY)
    assert "numpy" in loaded  # the check sees modules at all


def test_every_module_of_the_core_was_imported():
    loaded = modules_after("halfstep.core")
    assert {"halfstep.core.formats", "halfstep.core.hardware", "halfstep.core.policy"} <= loaded


def test_using_the_core_leaves_every_framework_out():
    use = (
        "import halfstep, logging; logging.disable()\n"
        "halfstep.compatibility_check('mixed_float16')\n"
        "rule = halfstep.DynamicLossScale(); rule.update(rule.init(), True)\n"
        "halfstep.format_of('bfloat16').round([0.1])\n"
    )
    # pynvml may be asked, where it is installed: it is the driver's, not a framework
    assert not modules_after("halfstep", then=use).intersection(set(HEAVY) - {"pynvml"})
