"""Running what was compiled as it was written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., None])


def eagerly() -> AbstractContextManager[object]:
    """Return a context in which compiled modules run as they were written.

    It costs nothing where nothing was compiled: then Dynamo, which takes seconds to import, is not.
    It begins where this is called, not where the context is entered.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def never_compiled(function: _Function) -> _Function:
    """Return ``function``, so that compiled code which calls it leaves its program for it."""
    kept: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return kept
