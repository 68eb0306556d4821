"""What a step may change inside an optimizer, and how it is put back on the host."""

from __future__ import annotations

import enum
import functools
import logging
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .closures import evaluates_once

ABSENT = type("Absent", (), {"__repr__": lambda _: "absent"})()
"""Stands for an entry that is not there."""

_NUMBERS = (int, float, complex, str, bytes, np.generic)

_CONSTANTS = (
    *(*_NUMBERS, type(None), type, range, frozenset, enum.Enum, functools.partial),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
)
"""What does not change itself: only an entry that holds it can."""

_TOOLS = (
    *(logging.Logger, weakref.ref, RemovableHandle, torch.Generator),
    *((dist.ProcessGroup,) if dist.is_available() else ()),
)
"""What is no state of an optimizer. Random numbers stay drawn: their order means nothing."""

UNCHANGING = _CONSTANTS + _TOOLS
"""What needs no putting back, or is none of an optimizer's."""

_OWN = frozenset(
    """
    state param_groups defaults step grad_scale found_inf _zero_grad_profile_name _opt_called
    _warned_capturable_if_run_uncaptured _need_device_dtype_check_for_fused
    _optimizer_step_pre_hooks _optimizer_step_post_hooks _optimizer_state_dict_pre_hooks
    _optimizer_state_dict_post_hooks _optimizer_load_state_dict_pre_hooks
    _optimizer_load_state_dict_post_hooks
    """.split()  # noqa: SIM905  (a list of words reads as one)
)
"""Attributes that torch itself gives an optimizer."""


@dataclass(frozen=True)
class Change:
    """An entry of a dict that a step replaced, made or removed (`ABSENT`)."""

    container: Any
    key: Any
    old: Any
    new: Any

    def undo(self) -> None:
        """Put back what was there, unless somebody has written to the entry since."""
        if self.container.get(self.key, ABSENT) is not self.new:
            return
        if self.old is ABSENT:
            del self.container[self.key]
        else:
            self.container[self.key] = self.old


@dataclass(frozen=True)
class Element(Change):
    """An element of a list that a step replaced."""

    def undo(self) -> None:
        """Put back what was there, unless somebody has written to the list since."""
        if self.key < len(self.container) and self.container[self.key] is self.new:
            self.container[self.key] = self.old


@dataclass(frozen=True)
class Resized(Change):
    """A list that a step made longer or shorter; ``old`` and ``new`` are its elements."""

    def undo(self) -> None:
        """Give the list its elements back."""
        if list(map(id, self.container)) == list(map(id, self.new)):
            self.container[:] = self.old


@dataclass(frozen=True)
class Made(Change):
    """The state that a step made for a parameter.

    Known by itself and not by its key: 16-bit weights lend the optimizer other parameters for the
    step than those that its state stands under afterwards.
    """

    def undo(self) -> None:
        """Remove it."""
        for key in [key for key, value in self.container.items() if value is self.new]:
            del self.container[key]


class Inside:
    """Everything in an optimizer that a step may change, as it is now.

    Of torch's own optimizers that is the parameters that have gradients, and their state. Of
    others nothing is known: all parameters, all state, all settings, all attributes.

    Attributes:
        parameters: the parameters, by their ids.
        tensors: all other tensors, by their ids.
        unknown: the first object that cannot be looked into, in words; None if there is none.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        own = evaluates_once(optimizer)
        groups = optimizer.param_groups
        every = (p for group in groups for p in group["params"])
        self.parameters = {id(p): p for p in every if not own or p.grad is not None}
        self.tensors: dict[int, Tensor] = {}
        self.unknown: str | None = None
        self._containers: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()
        self._state = optimizer.state
        self._states = list(self._state.items())
        self._attributes: dict[str, Any] = {}
        self._attributes_before: dict[str, Any] = {}
        if own:
            for parameter in self.parameters.values():
                self._look(self._state.get(parameter), "state[parameter]")
            return
        for _, value in self._states:
            self._look(value, "state[parameter]")
        for place, group in enumerate(groups):
            self._look(group, f"param_groups[{place}]")
        self._attributes = vars(optimizer)
        self._attributes_before = not_own(self._attributes)
        for name, value in self._attributes_before.items():
            self._look(value, f"its attribute {name}")

    def _look(self, value: Any, where: str) -> None:
        if isinstance(value, Tensor):
            if id(value) not in self.parameters:
                self.tensors[id(value)] = value
        elif isinstance(value, (dict, list, tuple)):
            self._look_into(value, where)
        elif self.unknown is None and not isinstance(value, UNCHANGING):
            self.unknown = f"a {type(value).__name__} in {where}"

    def _look_into(self, value: Any, where: str) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if not isinstance(value, tuple):
            self._containers.append((value, value.copy()))
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            # the key of a parameter's entry is a tensor, which prints itself at length
            self._look(item, f"{where}[{key!r}]" if isinstance(key, (str, int)) else where)

    def changes(self) -> Iterator[Change]:
        """Yield what has changed since."""
        known = {id(value) for _, value in self._states}
        for key, value in self._state.items():
            if id(value) not in known:
                yield Made(self._state, key, ABSENT, value)
        for key, value in self._removed():
            yield Change(self._state, key, value, ABSENT)
        for container, before in self._containers:
            if isinstance(container, list):
                yield from _in_list(container, before)
            else:
                yield from _in_dict(container, before, container)
        now = not_own(self._attributes)
        yield from _in_dict(self._attributes, self._attributes_before, now)

    def removed(self) -> bool:
        """Whether the state of a parameter has been removed since."""
        return bool(self._removed())

    def _removed(self) -> list[tuple[Any, Any]]:
        now = set(map(id, self._state.values()))
        return [(key, value) for key, value in self._states if id(value) not in now]


def not_own(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return those attributes of an optimizer that torch itself did not give it."""
    return {name: value for name, value in attributes.items() if name not in _OWN}


def _in_dict(container: Any, before: Any, now: Any) -> Iterator[Change]:
    for key in {**before, **now}:
        old, new = before.get(key, ABSENT), now.get(key, ABSENT)
        if not same(old, new):
            yield Change(container, key, old, new)


def _in_list(container: Any, before: Any) -> Iterator[Change]:
    if len(container) != len(before):
        yield Resized(container, None, before, container.copy())
        return
    for place, (old, new) in enumerate(zip(before, container, strict=True)):
        if not same(old, new):
            yield Element(container, place, old, new)


def same(old: Any, new: Any) -> bool:
    """Whether an entry still holds what it held."""
    if old is new:
        return True
    return type(old) is type(new) and isinstance(old, _NUMBERS) and bool(old == new)
