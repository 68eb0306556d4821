"""Where an operation runs: the module whose forward it belongs to, and the line of code."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

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
        self._names = {id(module): clean_path(path) for path, module in model.named_modules()}
        self._stack: list[tuple[str, str]] = []
        self._of_node: dict[int, Place] = {}

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow every module's forward inside a ``with`` block, for the whole process."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._stack.clear()

    def _enter(self, module: nn.Module, _: Any) -> None:
        name = self._names.get(id(module))
        if name is None:  # not of the model: it runs where the code that called it runs
            self._stack.append(self._stack[-1] if self._stack else ("", ""))
        else:
            self._stack.append((name, type(module).__name__))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack:
            self._stack.pop()

    def forward(self) -> Place:
        """Return where the operation that runs now, in a forward pass, belongs."""
        path, kind = self._stack[-1] if self._stack else ("", "")
        place = Place(path, kind, *_calling_code())
        made: int = torch.autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]
        self._of_node.setdefault(made, place)
        return place

    def backward(self, node: Any) -> Place:
        """Return where the forward of a node of autograd was."""
        return self._of_node.get(node._sequence_nr(), Place())


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
