"""16-bit copies of weights that FSDP2 gathers for a moment: nothing keeps them for the backward.

``fully_shard`` gathers a module's full weights before its forward and frees them after it. A cast
of such a weight is what the layer's matrix product saves for its backward pass, so that every
copy would stay, whole, from the forward to the backward: more than FSDP2 had saved. So a copy is
made for one reading and never remembered, and what autograd saves of it is a note of how to make
it again: by then FSDP2 has gathered the weight anew.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from .shards import local

MARK = "_is_fsdp_managed_module"
"""What ``fully_shard`` writes into every module whose parameters it shards (for Dynamo, too)."""

_CHECKPOINT = "torch.utils.checkpoint"

Pack = Callable[[torch.Tensor], Any]
Unpack = Callable[[Any], torch.Tensor]


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` gathers and frees the module's own parameters.

    >>> is_sharded(nn.Linear(2, 2))
    False
    """
    return bool(module.__dict__.get(MARK))


@dataclass(frozen=True)
class Note:
    """A 16-bit copy, or a view of one, as autograd saves it: how to make it from its weight."""

    weight: torch.Tensor
    dtype: torch.dtype
    view: Callable[[torch.Tensor], torch.Tensor]

    def read(self) -> torch.Tensor:
        """Return the tensor again, from the weight as it is gathered now."""
        return self.view(self.weight.detach().to(self.dtype))


@dataclass(frozen=True)
class _Strided:
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def __call__(self, low: torch.Tensor) -> torch.Tensor:
        return low.as_strided(self.size, self.stride, self.offset)


def _same(low: torch.Tensor) -> torch.Tensor:
    return low


def _transposed(low: torch.Tensor) -> torch.Tensor:
    return low.permute(*reversed(range(low.dim())))


@dataclass(frozen=True)
class _Looks:
    """How a copy looked when it was made."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    plain: bool

    @classmethod
    def of(cls, low: torch.Tensor) -> _Looks:
        """Return the looks of a copy."""
        return cls(low.shape, low.stride(), low.dtype, local(low) is low)

    def view_as(self, saved: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """How ``saved`` looks at the copy's memory; None for a DTensor seen in a rare way."""
        if saved.dtype is not self.dtype:
            return None
        if self.plain:
            return _Strided(saved.size(), saved.stride(), int(saved.storage_offset()))
        if (saved.shape, saved.stride()) == (self.shape, self.stride):
            return _same
        if (saved.shape, saved.stride()) == (self.shape[::-1], self.stride[::-1]):
            return _transposed
        return None


@dataclass(frozen=True)
class _Kept:
    """A tensor that is no copy, as autograd itself would save it: with its version."""

    tensor: torch.Tensor
    version: int

    def read(self) -> torch.Tensor:
        """Return the tensor, if nobody wrote to it since."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of shape {tuple(self.tensor.shape)} is at version "
                f"{self.tensor._version}; expected version {self.version} instead."
            )
        return self.tensor


@dataclass(frozen=True)
class _Outer:
    """What the user's own hooks made of a tensor, and how they give it back."""

    packed: Any
    unpack: Unpack

    def read(self) -> torch.Tensor:
        """Return the tensor."""
        return self.unpack(self.packed)


class Recasts:
    """The copies of sharded weights that one call of a model makes, and its hooks on saving.

    Of nested hooks torch calls the innermost only, so that what is no copy goes on to those of
    the user (``save_on_cpu``, activation checkpointing) from here.
    """

    __slots__ = ("_made", "_outer")

    def __init__(self) -> None:
        self._made: dict[int, tuple[StorageWeakRef, torch.Tensor, _Looks]] = {}
        outer: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self._outer: tuple[Pack, Unpack] | None = outer

    def make(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a new copy of a gathered weight."""
        low = weight.to(dtype)
        if low.requires_grad:
            storage = local(low).untyped_storage()
            # weakly, which also keeps its address from being given to another one
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._made[storage._cdata] = (reference, weight, _Looks.of(low))
        return low

    def hooks(self) -> AbstractContextManager[Any]:
        """Return the context in which copies are saved as notes.

        A checkpointed region saves nothing, and counts what passes by: forward and recomputation
        must show it the same, whether or not the model is called from outside of it.
        """
        checkpointed = self._outer is not None and self._outer[0].__module__ == _CHECKPOINT
        if checkpointed or not torch.is_grad_enabled():
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: torch.Tensor) -> Note | _Kept | _Outer:
        note = self._note(tensor)
        if note is not None:
            return note
        if self._outer is not None:
            return _Outer(self._outer[0](tensor), self._outer[1])
        # not the tensor itself: one that its own node saves would keep itself alive
        return _Kept(tensor.detach(), tensor._version)

    def _note(self, tensor: torch.Tensor) -> Note | None:
        part = local(tensor)
        if part.layout is not torch.strided or not self._made:
            return None
        made = self._made.get(part.untyped_storage()._cdata)
        if made is None or made[0].expired():  # type: ignore[no-untyped-call]
            return None
        _, weight, looks = made
        view = looks.view_as(tensor)
        return None if view is None else Note(weight, tensor.dtype, view)


def _unpack(saved: Note | _Kept | _Outer) -> torch.Tensor:
    return saved.read()
