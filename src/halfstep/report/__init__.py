"""One offline HTML page from what a run left behind; it reads files, never live tensors.

>>> from halfstep import report
>>> page = report.render(report.load("runs/demo.json"))  # doctest: +SKIP
"""

from .page import load as load
from .page import render as render
