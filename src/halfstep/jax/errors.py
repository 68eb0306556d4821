"""The error that only this door raises."""

from __future__ import annotations

from ..errors import HalfstepError


class NotTraceableError(HalfstepError, TypeError):
    """A function that JAX cannot trace, so that there is nothing to rewrite."""
