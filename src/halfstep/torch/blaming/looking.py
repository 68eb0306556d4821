"""Looking at tensors: what is not finite in them, their ranges, an operation in a wider format."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...core.fault import TensorFacts
from ..casting import LOW

_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}

Badness = Callable[[Tensor], tuple[bool, bool]]
"""Looks at a tensor: whether it has what is looked for, and whether it has NaN."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results of an operation: nested tuples, lists, dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def values_of(tensor: Tensor) -> Tensor | None:
    """Return the floating values of a tensor, None if it has none that can be looked at."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
        return None
    if tensor.dtype.itemsize == 1 or tensor.is_nested or tensor.is_quantized:
        return None
    local = getattr(tensor, "_local_tensor", tensor)  # of a DTensor: the shard that is here
    if local.layout is torch.sparse_coo:
        return torch.Tensor._values(local)
    return local if local.layout is torch.strided else None


def not_finite(tensor: Tensor) -> tuple[bool, bool]:
    """Return whether there is an infinity or a NaN, and whether there is a NaN.

    >>> not_finite(torch.tensor([1.0, float("inf")]))
    (True, False)
    """
    values = values_of(tensor)
    if values is None or bool(torch.isfinite(values).all()):
        return False, False
    return True, bool(torch.isnan(values).any())


def all_zero(tensor: Tensor) -> tuple[bool, bool]:
    """Return whether every value of a tensor of 16 bits or more is zero (and False).

    >>> all_zero(torch.zeros(2)), all_zero(torch.zeros(0)), all_zero(torch.zeros(2).bool())
    ((True, False), (False, False), (False, False))
    """
    values = values_of(tensor)
    if values is None or values.numel() == 0:
        return False, False
    return not bool(values.any()), False


def facts(tensor: Tensor, name: str = "") -> TensorFacts:
    """Return what ``tensor`` holds. It reads the host."""
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized)
    values = values_of(tensor.double() if whole else tensor)
    shape = tuple(tensor.shape)
    dtype = str(tensor.dtype).removeprefix("torch.")
    if values is None or values.is_complex():
        return TensorFacts(name, shape, dtype, math.nan, math.nan, math.nan, 0, 0, 0)
    wide = values if values.dtype is torch.float64 else values.float()
    finite = wide[torch.isfinite(wide)]
    low = high = nearest = math.nan
    if finite.numel():
        low, high = (float(end) + 0.0 for end in finite.aminmax())  # + 0.0: no -0
        above = finite[finite != 0].abs()
        nearest = float(above.min()) if above.numel() else math.nan
    zeros, infinities, nans = (
        int(mask.sum()) for mask in (wide == 0, torch.isinf(wide), torch.isnan(wide))
    )
    return TensorFacts(name, shape, dtype, low, high, nearest, zeros, infinities, nans)


def narrowest(tensors: Iterator[Tensor] | list[Tensor]) -> torch.dtype | None:
    """Return the floating dtype with the smallest range among tensors, None if none is floating."""
    found = {tensor.dtype for tensor in tensors if values_of(tensor) is not None}
    order = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return next((dtype for dtype in order if dtype in found), None)


def in_wider(func: Any, args: Any, kwargs: Any, low: torch.dtype) -> Any:
    """Return the result of an operation on the same inputs in the next wider format than ``low``.

    Only operations that draw no random numbers are run again. None where that is not possible.
    """
    wider = _WIDER.get(low)
    if wider is None or torch.Tag.nondeterministic_seeded in func.tags:
        return None
    narrow = LOW if low in LOW else {low}

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(wider) if value.dtype in narrow else value.clone()
        if isinstance(value, torch.dtype):
            return wider if value in narrow else value
        if isinstance(value, tuple | list):
            return type(value)(widen(item) for item in value)
        return value

    try:
        with torch.no_grad(), torch._C._DisableAutocast():
            return func(*widen(args), **{key: widen(item) for key, item in kwargs.items()})
    except (RuntimeError, NotImplementedError, TypeError):
        return None  # an operation that does not exist in that dtype says nothing
