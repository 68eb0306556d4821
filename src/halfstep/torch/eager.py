"""Running what was compiled as it was written."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., None])


class _Held:
    """What everyone who runs eagerly shares: contexts of several owners end in any order."""

    holders = 0
    stance: AbstractContextManager[object] | None = None

    @classmethod
    def take(cls) -> None:
        if cls.holders == 0:
            cls.stance = torch.compiler.set_stance("force_eager")
        cls.holders += 1

    @classmethod
    def release(cls) -> None:
        cls.holders -= 1
        if cls.holders == 0 and cls.stance is not None:
            cls.stance.__exit__(None, None, None)
            cls.stance = None


class _Eagerly(AbstractContextManager[object]):
    def __init__(self) -> None:
        _Held.take()
        # once, also where the owner is forgotten before it has ended
        self._end = weakref.finalize(self, _Held.release)

    def __exit__(self, *error: object) -> None:
        self._end()


def eagerly() -> AbstractContextManager[object]:
    """Return a context in which compiled modules run as they were written.

    It costs nothing where nothing was compiled: then Dynamo, which takes seconds to import, is not.
    It begins where this is called, not where the context is entered, and ends with the last of
    those that overlap.
    """
    return _Eagerly() if "torch._dynamo" in sys.modules else nullcontext()


def never_compiled(function: _Function) -> _Function:
    """Return ``function``, so that compiled code which calls it leaves its program for it."""
    kept: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return kept
