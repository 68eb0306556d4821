"""Watching the numbers of a run, and what its loss scale does."""

from .monitor import NumericsMonitor as NumericsMonitor
