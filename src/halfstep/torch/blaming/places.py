"""Where an operation runs: the module whose forward it belongs to, and the line of code."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HALFSTEP = os.path.dirname(os.path.dirname(os.path.dirname(__file__))) + os.sep
_MODELS = tuple(os.path.join(_HALFSTEP, name) + os.sep for name in ("recipes",))
_PLUMBING = frozenset({"contextlib.py", "functools.py"})
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


@dataclass(frozen=True)
class Place:
    """A module and a line of code.

    Attributes:
        path: of the innermost module of the model; ``""`` for the model itself, or outside of it.
        kind: the class of that module; empty outside of the model.
        file: the file of the innermost code that is neither torch's nor this library's.
        line: its line there.
        function: its function there.
    """

    path: str = ""
    kind: str = ""
    file: str = ""
    line: int = 0
    function: str = ""

    @property
    def words(self) -> str:
        """The module in words."""
        if not self.kind:
            return "The loss function"
        return f"{self.path or 'The model'} ({self.kind})"

    @property
    def source(self) -> str:
        """File, line, function and text of the line; empty if unknown."""
        if not self.file:
            return ""
        text = linecache.getline(self.file, self.line).strip()
        where = f"{_shortened(self.file)}:{self.line}, in {self.function}"
        return f"{where}: {text}" if text else where


def _shortened(file: str) -> str:
    here = os.getcwd() + os.sep
    if file.startswith(here):
        return file[len(here) :]
    _, installed, rest = file.rpartition(f"site-packages{os.sep}")
    return rest if installed else file


class Places:
    """Follows the forwards of a model's modules, and knows which one a backward node belongs to.

    Autograd numbers its nodes in the order in which the forward makes them; the number that the
    next node will get is known while an operation runs, so that the operations of a backward pass
    find the place of their forward by the number of their node.

    Args:
        model: its modules have the paths of ``model.named_modules()``, without the names that
            wrappers (compiled modules, data parallel ones) put in between.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {
            module: clean_path(path)
            for path, module in model.named_modules()
            # a compiled module is a wrapper, and has the path of what it wraps; a scripted one
            # takes no hooks, so that its operations count as those of the module around it
            if "_orig_mod" not in module._modules and not isinstance(module, torch.jit.ScriptModule)
        }
        self._stack: list[tuple[str, str, bool]] = []
        self._of_node: dict[int, Place] = {}

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow the forward of each module of the model inside a ``with`` block."""
        with ExitStack() as stack:
            stack.callback(self._stack.clear)
            for module in self._names:
                entering = module.register_forward_pre_hook(self._enter, prepend=True)
                stack.callback(entering.remove)
                leaving = module.register_forward_hook(self._leave, always_call=True)
                stack.callback(leaving.remove)
            yield

    def _enter(self, module: nn.Module, _: Any) -> None:
        recomputed = _node() is not None
        self._stack.append((self._names[module], type(module).__name__, recomputed))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack:
            self._stack.pop()

    def here(self) -> tuple[Place, str]:
        """Return where the operation that runs now belongs, and its node in a backward pass.

        A forward that activation checkpointing runs again in the middle of a backward pass is one.
        """
        node = _node()
        if node is None or (self._stack and self._stack[-1][2]):
            return self._forward(), ""
        return self._of_node.get(node._sequence_nr(), Place()), str(node.name())

    def _forward(self) -> Place:
        path, kind, _ = self._stack[-1] if self._stack else ("", "", False)
        place = Place(path, kind, *_calling_code())
        made: int = torch.autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]
        self._of_node.setdefault(made, place)
        return place


def _node() -> Any:
    """The node of autograd that runs now in a backward pass, if any."""
    return torch._C._current_autograd_node()


def clean_path(path: str) -> str:
    """Return a module's path without what wrappers add to it.

    >>> clean_path("_orig_mod.blocks.0._orig_mod.attn")
    'blocks.0.attn'
    """
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _calling_code() -> tuple[str, int, str]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        own = file.startswith((_TORCH, _HALFSTEP)) and not file.startswith(_MODELS)
        if not own and not file.startswith("<frozen") and os.path.basename(file) not in _PLUMBING:
            return file, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back
    return "", 0, ""
