"""Multiplying losses, whatever they stand in, by a scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...errors import LossScaleError
from .gradients import moved, widened


class OutputsError(LossScaleError, ValueError):
    """Something that is not made of tensors. A ValueError too, as torch.amp raises."""


def scaled(tensor: Tensor, scale: Tensor) -> Tensor:
    """Return the product in float32: a float16 one overflows at the first scale of most runs."""
    return widened(tensor) * moved(scale, tensor.device)


def over_tensors(value: Any, apply: Callable[[Tensor], Tensor]) -> Any:
    """Return ``value`` with ``apply`` done to every tensor in it.

    Lists, tuples (named ones too) and dicts keep their type; other iterables become lists, since
    a lazy one would do its work after the step, or never.

    Raises:
        OutputsError: something in it that is neither a tensor nor an iterable of them.

    >>> import torch
    >>> over_tensors({"a": torch.ones(1), "b": (torch.ones(1),)}, lambda x: x * 2)
    {'a': tensor([2.]), 'b': (tensor([2.]),)}
    """
    if isinstance(value, Tensor):
        return apply(value)
    if isinstance(value, dict):
        changed = {key: over_tensors(item, apply) for key, item in value.items()}
        return changed if type(value) is dict else _like(value, changed)
    if hasattr(value, "__iter__") and not isinstance(value, (str, bytes)):
        items = [over_tensors(item, apply) for item in value]
        if isinstance(value, tuple):
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return type(value)(items) if isinstance(value, list) else items
    raise OutputsError(
        "outputs must be a Tensor or an iterable of Tensors (a list, tuple, dict, ...), got "
        f"{value!r}, a {type(value).__name__}."
    )


def _like(value: dict[Any, Any], changed: dict[Any, Any]) -> dict[Any, Any]:
    # a copy keeps what a subclass knows besides its items: a default factory, an order
    copied = value.copy()
    copied.update(changed)
    return copied
