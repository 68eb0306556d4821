"""Warnings that become notes of a comparison, where nobody reads a terminal."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def noting(notes: list[str], *kinds: type[Warning]) -> Iterator[None]:
    """Add what is warned of meanwhile to the notes, by these kinds; the others are shown after.

    >>> notes = []
    >>> with noting(notes, UserWarning):
    ...     warnings.warn("nothing runs in 16 bits")
    >>> notes
    ['nothing runs in 16 bits']
    """
    with warnings.catch_warnings(record=True) as caught:
        for kind in kinds:
            warnings.simplefilter("always", kind)
        yield
    for warning in caught:
        if issubclass(warning.category, kinds):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
