"""A look at every call of a rewritten model: what ran, and what is loud where it was float32."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo import config
from torch._dynamo.utils import counters, get_compilation_metrics
from torch.utils import _python_dispatch

from ...errors import PolicyWarning
from .came_of_it import check
from .painting import Painter
from .regions import depth
from .settings import Settings

REASON = "halfstep.torch.autocast paints graphs of its own: in another's they would be float32"
_HAVE_A_FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)
_IN_A_MODE: Callable[[], bool] = getattr(
    _python_dispatch, "is_in_any_mode_without_ignore_compile_internals", lambda: True
)


def untraced(function: Any) -> Any:
    """Keep a function out of the graphs of compiled code that calls it; it costs nothing."""
    return torch.compiler.disable(function, recursive=False, reason=REASON)  # type: ignore[no-untyped-call]


untraced(depth)


class Watch:
    """Looks at the calls of a rewritten model.

    Args:
        settings: what was asked for.
        painter: what paints its graphs, and counts what is painted and what runs.
    """

    def __init__(self, settings: Settings, painter: Painter) -> None:
        self._settings, self._painter = settings, painter
        self._is_checked, self._attempts = False, 0
        self._said: set[str] = set()
        self._may_be_fast = may_have_fast_path(settings.model)

    @untraced
    def begin(self) -> tuple[int, int]:
        """Note what there was before a call; hand it to :meth:`end`."""
        self._painter.regions.outside = depth()
        return self._painter.runs, time.time_ns()

    @untraced
    def around(self) -> contextlib.AbstractContextManager[Any] | None:
        """Return what must hold around the call, most often nothing."""
        where = _inside()
        if where is None:
            return without_fast_path() if self._may_be_fast else None
        # Dynamo would give the code up for good, where it is told to leave it alone it does not
        stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance

    @untraced
    def end(self, before: tuple[int, int]) -> None:
        """Say what of the call was float32.

        Raises:
            PolicyError: nothing of the model can run in 16 bits.
        """
        runs, attempts = self._painter.runs, counters["frames"]["total"]
        if not self._is_checked or runs == before[0] or attempts != self._attempts:
            self._attempts = attempts
            self._look(*before)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _look(self, runs: int, since: int) -> None:
        where, ran = _inside(), self._painter.runs > runs
        if not ran and where is not None:
            self._say(
                where,
                f"inside of {where} Dynamo compiles nothing, so that this call was float32. Calls "
                "outside of it are not.",
            )
            return
        if not self._is_checked:
            check(self._settings, self._painter)
            self._is_checked, self._painter.taken = True, None
        if recompile_limit_reached(since):
            self._say(
                "limit",
                "Dynamo reached its recompile limit, and runs what no graph of it fits uncompiled "
                "from now on, in float32. TORCH_LOGS=recompiles tells what changes from call to "
                f"call, torch._dynamo.config.recompile_limit ({config.recompile_limit}) allows for "
                "more, and torch._dynamo.reset() begins anew.",
            )
        elif not ran and "limit" not in self._said:
            self._say("no run", _NO_RUN)

    def _say(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(f"{self._settings.where}: {text}", PolicyWarning, stacklevel=6)


_NO_RUN = (
    "this call ran none of its graphs, so that it was float32. Dynamo leaves the code alone behind "
    "torch.compiler.set_stance, torch.compiler.disable and its recompile limit, and for good once "
    "it was called inside of a dispatch mode or a torch.func transform by another torch.compile: "
    "torch._dynamo.reset() brings it back."
)


def recompile_limit_reached(since: int) -> bool:
    """Whether Dynamo gave up on some code for its many graphs.

    Args:
        since: when to begin, in nanoseconds of the clock.
    """
    return any(
        (made.start_time_us or 0) >= since // 1000 and "limit exceeded" in (made.fail_reason or "")
        for made in get_compilation_metrics()
    )


@untraced
def _inside() -> str | None:
    """Name what Dynamo compiles nothing in, if the code that runs now is inside of it."""
    if torch._C._len_torch_dispatch_stack() and _IN_A_MODE():
        modes = _python_dispatch._get_current_dispatch_mode_stack()
        return type(modes[-1]).__name__.lstrip("_") if modes else "a dispatch mode"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func"
    return None


def may_have_fast_path(model: object) -> bool:
    """Whether there may be a layer that :func:`without_fast_path` is for."""
    return not isinstance(model, nn.Module) or any(
        isinstance(module, _HAVE_A_FAST_PATH) for module in model.modules()
    )


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Let attention and transformer layers in ``eval()`` run as they do in training.

    Without a gradient a whole layer is one operation to torch, and nothing of it could be painted.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
