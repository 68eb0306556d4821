"""The page of one run: what its numbers were, layer by layer, against what the formats hold."""

from .page import render_run as render_run
from .reading import Run as Run
from .reading import read_run as read_run
