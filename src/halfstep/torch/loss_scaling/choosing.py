"""Choosing between what tensors were and what they became: on the device, exact to the bit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..casting import PLAIN
from .gradients import Bucket, moved

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""As which numbers the bits of an element are handled, by its bytes."""


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is no subclass, and its values lie in one strided memory."""
    return type(tensor) in PLAIN and tensor.layout is torch.strided


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that ``tensor`` is made of.

    Itself, of a plain one; this rank's shard of a DTensor; codes and scales of a quantized one.
    """
    made_of: Any = tensor
    if type(tensor) not in PLAIN and is_traceable_wrapper_subclass(made_of):
        names, _ = made_of.__tensor_flatten__()
        parts = [getattr(tensor, name) for name in names]
        # a DTensor names its mesh too
        return [p for part in parts if isinstance(part, Tensor) for p in plain_tensors(part)]
    return [tensor]


def chosen(found: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Return ``old`` where ``found`` is 1.0, ``new`` where it is 0.0, as a tensor of its own."""
    return torch.where(moved(found, new.device) > 0, old, new)


class Copies:
    """Copies of tensors, and the choice between them and what the tensors have become.

    ::

        copy   = tensor                                     # before the step
        tensor = tensor * (1 - found) + copy * found        # after it, on the bits as integers

    Multiplying integers by 0 and 1 is exact where a float's NaN and infinity would stay, and goes
    for many tensors at a time, which ``torch.where`` does not: 4 grouped calls for each device and
    size of an element. For each element they read and write 9 times its bytes (``torch.where``
    and its copies: 7), and hold once its bytes until the choice is made.

    Tensors that share memory are chosen one by one, since the sum would be taken twice.

    Args:
        tensors: plain ones.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        alone, shared = _by_memory([tensor for tensor in tensors if not _expanded(tensor)])
        buckets: dict[Bucket, list[Tensor]] = {}
        for tensor in alone:
            kind = tensor.device, _BITS[min(tensor.element_size(), 8)]
            buckets.setdefault(kind, []).append(tensor)
        self._buckets = [_copied(bucket) for bucket in buckets.values()]
        self._shared = [(tensor, tensor.detach().clone()) for tensor in shared]

    @torch.no_grad()
    def choose(self, found: Tensor, again: bool = False) -> None:
        """Put the copies back where ``found`` is 1.0; where it is 0.0 the tensors stay.

        Args:
            found: 0-dim; 1.0 or 0.0.
            again: whether there will be another choice; else the copies are used up.
        """
        for bucket in self._buckets:
            views = _views_now(bucket)
            back = moved(found, views[0].device).to(views[0].dtype)
            torch._foreach_mul_(views, 1 - back)
            copies = bucket.copies
            if again:
                copies = list(torch._foreach_clone(copies))
            torch._foreach_mul_(copies, back)
            torch._foreach_add_(views, copies)
        for tensor, copy in self._shared:
            tensor.copy_(chosen(found, copy, tensor))
        if not again:
            self._buckets, self._shared = [], []


@dataclass
class _Bucket:
    tensors: list[Tensor]
    views: list[Tensor]
    places: list[int]
    copies: list[Tensor]


@torch.no_grad()
def _copied(tensors: list[Tensor]) -> _Bucket:
    views = list(map(_bits, tensors))
    places = list(map(Tensor.data_ptr, tensors))
    return _Bucket(tensors, views, places, list(torch._foreach_clone(views)))


def _views_now(bucket: _Bucket) -> list[Tensor]:
    # a step may have put other memory under a tensor, through .data
    if list(map(Tensor.data_ptr, bucket.tensors)) != bucket.places:
        return list(map(_bits, bucket.tensors))
    return bucket.views


def _bits(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_BITS[tensor.element_size()])


def _expanded(tensor: Tensor) -> bool:
    # torch writes into no such tensor, so that a step can only have replaced it
    return not tensor.is_contiguous() and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _by_memory(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Split tensors into those whose memory is theirs alone, and the others."""
    places = sorted((*_extent(tensor), place) for place, tensor in enumerate(tensors))
    shared: set[int] = set()
    reached, last = 0, -1
    for begin, end, place in places:
        if begin < reached:
            shared |= {place, last}
        if end > reached:
            reached, last = end, place
    alone = [tensor for place, tensor in enumerate(tensors) if place not in shared]
    return alone, [tensors[place] for place in sorted(shared)]


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first address of the tensor's memory, and the first one after it."""
    if tensor.is_contiguous():
        begin: int = tensor.data_ptr()
        return begin, begin + tensor.nbytes
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
