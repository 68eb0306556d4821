"""Blame: which operation of a step made the first infinity or NaN, and what helps."""

from .exhausted import blame_on_exhausted as blame_on_exhausted
from .search import blame as blame
