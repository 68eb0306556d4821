"""Blame: which operation of a step made the first infinity or NaN, and what helps."""

from .search import blame as blame
