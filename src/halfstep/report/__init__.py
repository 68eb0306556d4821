"""One offline HTML page from what a run left behind; it reads files, never live tensors.

>>> from halfstep import report
>>> html = report.page("runs/demo.json")  # doctest: +SKIP
>>> html = report.page("run.jsonl")  # doctest: +SKIP
"""

from .comparison import load as load
from .comparison import render as render
from .kinds import page as page
from .numerics import read_run as read_run
from .numerics import render_run as render_run
