"""Bringing back what a layer writes into its arguments, when it was handed casts of them.

A recurrent cell that keeps its state in a dictionary, a layer that appends to a cache: what they
write has to arrive with the caller, though they got a copy in the compute dtype.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from typing import Any

import torch

Return = Callable[[], None]


def returns(given: Any, lent: Any) -> Iterator[Return]:
    """Yield what brings the writes back, to be called after the call that makes them.

    Args:
        given: what the caller passed: tensors in tuples, lists, dicts and dataclasses.
        lent: the same, cast; nothing was written to it yet.

    >>> given, lent = {"a": torch.zeros(1)}, {"a": torch.zeros(1).half()}
    >>> back = list(returns(given, lent))
    >>> lent["b"] = 1
    >>> for bring in back:
    ...     bring()
    >>> given
    {'a': tensor([0.]), 'b': 1}
    """
    if given is lent:
        return
    if isinstance(given, torch.Tensor):
        if not lent.is_inference():
            yield partial(_return_tensor, given, lent, lent._version)
    elif isinstance(given, (tuple, list, deque)):
        if not isinstance(given, tuple):
            yield partial(_return_items, given, lent, list(given), list(lent))
        for one, other in zip(given, lent, strict=True):
            yield from returns(one, other)
    elif isinstance(given, MutableMapping):
        yield partial(_return_entries, given, lent, dict(lent.items()))
        for key in given:
            yield from returns(given[key], lent[key])
    elif dataclasses.is_dataclass(given):
        yield partial(_return_entries, vars(given), vars(lent), dict(vars(lent)))
        for key in [key for key in vars(given) if key in vars(lent)]:
            yield from returns(vars(given)[key], vars(lent)[key])


def _return_tensor(given: torch.Tensor, lent: torch.Tensor, version: int) -> None:
    if lent._version != version:
        given.copy_(lent)


def _return_entries(given: Any, lent: Any, before: dict[Any, Any]) -> None:
    for key in [key for key in before if key not in lent]:
        del given[key]
    for key, value in lent.items():
        if key not in before or value is not before[key]:
            given[key] = value


def _return_items(given: Any, lent: Any, own: list[Any], before: list[Any]) -> None:
    if len(lent) == len(before) and all(a is b for a, b in zip(lent, before, strict=True)):
        return
    # what the caller had stays the caller's, wherever it is now
    theirs = {id(after): one for one, after in zip(own, before, strict=True)}
    items = [theirs.get(id(item), item) for item in lent]
    given.clear()
    given.extend(items)
