"""Seeing that a module casts by itself, or switches autocast off."""

from __future__ import annotations

import linecache
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...core.advice import OwnCast
from ..blaming.places import Place, Places
from ..casting import FLOATS, LOW
from ..plan import plan_of
from .operations import dtype_name
from .watch import path_of

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = str(Path(__file__).parents[2]) + os.sep
_RECIPES = os.path.join(_OURS, "recipes") + os.sep

_CASTS = ("to", "float", "half", "bfloat16", "double", "type", "type_as")
_WRITTEN_DOWN = re.compile(r"\b(float16|bfloat16)\b|\.half\(")

_SWITCH = "autocast(enabled=False)"


class CastWatch(TorchFunctionMode):
    """Collects the casts that modules with a 16-bit policy make by themselves.

    Attributes:
        casts: what was seen, by place and line.
    """

    def __init__(self, model: nn.Module, places: Places) -> None:
        super().__init__()
        self._places = places
        self._modules = dict(model.named_modules())
        self.casts: dict[tuple[str, ...], OwnCast] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function and note whether it was a cast."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _CASTS and isinstance(result, Tensor) and isinstance(args[0], Tensor):
            self._look_at_cast(name, args[0], result)
        elif isinstance(result, Tensor) and result.dtype in FLOATS:
            self._look_at_autocast(result)
        return result

    def _look_at_cast(self, name: str, before: Tensor, after: Tensor) -> None:
        if before.dtype is after.dtype or not {before.dtype, after.dtype} <= FLOATS:
            return
        if called_by_us():
            return
        place = self._places.here()[0]
        up = before.dtype in LOW and after.dtype not in LOW
        down = after.dtype in LOW and _written_down(place)
        if up or down:
            call = f".{name}()" if name not in ("to", "type", "type_as") else f".{name}(...)"
            size = after.numel() * after.element_size()
            self._note(place, call, dtype_name(before), dtype_name(after), size)

    def _look_at_autocast(self, result: Tensor) -> None:
        if torch.is_autocast_enabled(result.device.type) or called_by_us():
            return
        place = self._places.here()[0]
        if place.kind and self._wants_autocast(place.path):
            self._note(place, _SWITCH, "", "", 0)

    def _wants_autocast(self, path: str) -> bool:
        """Whether the policy switched autocast on for the module, or for the one around it."""
        while True:
            plan = plan_of(self._modules[path]) if path in self._modules else None
            if plan is not None and plan.region is not None:
                return plan.region.dtype is not None
            if not path:
                return False
            path = path.rpartition(".")[0]

    def _note(self, place: Place, call: str, before: str, after: str, size: int) -> None:
        path = path_of(place)
        module = self._modules.get(path)
        plan = None if module is None else plan_of(module)
        if plan is None or not plan.policy.is_low or not place.kind:
            return
        key = (path, call, before, after, place.file, str(place.line))
        known = self.casts.get(key)
        if known is None:
            self.casts[key] = OwnCast(path, place.kind, call, before, after, place.source, 1, size)
        else:
            self.casts[key] = replace(known, times=known.times + 1, size=known.size + size)

    def found(self, float32_flops: Mapping[str, int]) -> tuple[OwnCast, ...]:
        """Return what was seen; the arithmetic in float32 of a place goes to its first cast up."""
        left = dict(float32_flops)
        found = []
        for cast in self.casts.values():
            up = cast.after not in ("float16", "bfloat16")
            found.append(replace(cast, flops=left.pop(cast.place, 0)) if up else cast)
        return tuple(found)


def called_by_us() -> bool:
    """Whether halfstep itself, not a user's code, makes the present call of torch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith((_TORCH, "<")):
            return file.startswith(_OURS) and not file.startswith(_RECIPES)
        frame = frame.f_back
    return False


def _written_down(place: Place) -> bool:
    """Whether the line names a 16-bit dtype, and does not take it from another tensor."""
    return bool(_WRITTEN_DOWN.search(linecache.getline(place.file, place.line)))
