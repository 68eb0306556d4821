"""Low-precision copies of weights: few launches, one autograd node for many, never stale.

A layer that reads its float32 weight inside its own forward gets a copy in the compute dtype.
Copies live for one call of the outermost module, however often its layers are called in it, and
are made for a whole group of weights at a time: one ``torch._foreach_copy_`` forward and one
backward instead of a cast a weight. The next call makes them anew. Nothing cheaper is right:
fused optimizers do not raise ``Tensor._version`` and neither do writes to ``.data`` (measured on
torch 2.13), so a copy kept longer could be stale and nobody would know.

Where the caller knows that no weight changes, as between the micro-batches of one optimizer step
or in a loop of inference, :func:`weights_unchanged` says so and copies are kept.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import PolicyError
from .plan import plan_of, transformed

GROUP_BYTES = 64 * 2**20
"""How many bytes of weights are cast together at most: a group's gradients are all in memory
until the last of them is there, and only then can DistributedDataParallel send any of them."""

SMALL_GROUP = 3
"""Fewer weights than these are cast one by one: an autograd node written in Python takes longer."""

Key: TypeAlias = "tuple[int, torch.dtype]"


def _cast_data(tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


class _CastGroup(torch.autograd.Function):
    """Cast many tensors in one node of the graph; the backward casts their gradients back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        return tuple(_cast_data(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        # a weight without a gradient in this step must keep none: an optimizer would apply
        # weight decay to it
        there = [g for g in gradients if g is not None and g.layout is torch.strided]
        cast = dict(zip(map(id, there), cast_together(there, ctx.dtype), strict=True))
        return (None, *[None if g is None else cast.get(id(g), g) for g in gradients])


def cast_together(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Cast tensors of one dtype to another with one launch, differentiably, to any order."""
    if not tensors:
        return []
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return list(_CastGroup.apply(dtype, *tensors))  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return _cast_data(tuple(tensors), dtype)


def _groupable(tensor: torch.Tensor) -> bool:
    return type(tensor) is nn.Parameter and tensor.layout is torch.strided


class WeightGroups:
    """Which weights below a module are cast together, by weight and compute dtype."""

    __slots__ = ("_group_of", "_outside", "outdated")

    def __init__(self, weights: Iterable[tuple[torch.Tensor, torch.dtype]]) -> None:
        self._group_of: dict[Key, list[torch.Tensor]] = {}
        self._outside: dict[Key, torch.Tensor] = {}
        self.outdated = False
        open_groups: dict[tuple[object, ...], tuple[list[torch.Tensor], int]] = {}
        for weight, dtype in weights:
            if not _groupable(weight) or (id(weight), dtype) in self._group_of:
                continue
            # what one launch can take together, and what is differentiated together
            kind = (dtype, weight.dtype, weight.device, weight.requires_grad)
            group, size = open_groups.get(kind, ([], GROUP_BYTES))
            bytes_here = weight.numel() * weight.element_size()
            if size + bytes_here > GROUP_BYTES:
                group, size = [], 0
            group.append(weight)
            open_groups[kind] = (group, size + bytes_here)
            self._group_of[id(weight), dtype] = group

    def find(self, weight: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return the weights that are cast together with this one; empty if it is in no group.

        A weight that is in none, though it could be, was put into the model after the groups were
        made (or lies outside of it): the groups are then made anew, once.
        """
        key = (id(weight), dtype)
        group = self._group_of.get(key)
        if group is not None:
            return group
        if _groupable(weight) and self._outside.get(key) is not weight:
            self._outside[key] = weight
            self.outdated = True
        return []

    def renewed(self, weights: Iterable[tuple[torch.Tensor, torch.dtype]]) -> WeightGroups:
        """Return groups made anew that remember what was found to lie outside."""
        groups = WeightGroups(weights)
        groups._outside = self._outside
        return groups


class WeightCopies:
    """The copies made so far in one call of the outermost module.

    Args:
        groups: which weights are cast together.
        watch: remember what each copy looked like, for :meth:`written_to`.
    """

    __slots__ = ("_copies", "_groups", "_watched")

    def __init__(self, groups: WeightGroups, watch: bool = False) -> None:
        self._groups = groups
        self._copies: dict[Key, tuple[torch.Tensor, int, torch.Tensor]] = {}
        self._watched: list[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]] | None = (
            [] if watch else None
        )

    def clear(self) -> None:
        """Forget every copy."""
        self._copies.clear()

    def made(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the copy of ``weight`` in ``dtype`` that was made earlier in this call, if any."""
        made = self._copies.get((id(weight), dtype))
        return made[2] if made is not None and _fresh(weight, *made) else None

    def make(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a new copy of ``weight`` in ``dtype``; the others of its group are made too."""
        group = self._group(weight, dtype)
        if len(group) < SMALL_GROUP:
            copies = [weight.to(dtype)]
            group = [weight]
        else:
            copies = cast_together(group, dtype)
        for original, low in zip(group, copies, strict=True):
            self._copies[id(original), dtype] = (original, _version(original), low)
            if self._watched is not None and type(original) is nn.Parameter:
                self._watched.append((original, low, _looks(low)))
        return self._copies[id(weight), dtype][2]

    def _group(self, weight: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        if _one_by_one():
            return []
        group = self._groups.find(weight, dtype)
        # a parameter that was frozen, thawed, moved or given another dtype since
        return [w for w in group if w.requires_grad == weight.requires_grad
                and w.dtype == weight.dtype and w.device == weight.device]  # fmt: skip

    def written_to(self) -> list[torch.Tensor]:
        """Return the weights whose copies were changed since they were made (if watched)."""
        return [weight for weight, low, made in self._watched or () if _looks(low) != made]


def _looks(copy: torch.Tensor) -> tuple[int, int]:
    return copy.data_ptr(), _version(copy)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _fresh(weight: torch.Tensor, original: torch.Tensor, version: int, low: torch.Tensor) -> bool:
    if original is not weight or version != _version(weight):
        return False
    if low.is_inference() and not torch.is_inference_mode_enabled():
        return False  # it could not be saved for a backward pass
    # a copy made under no_grad has no graph: used now, it would cut the weight's gradient off
    return low.requires_grad or not (weight.requires_grad and torch.is_grad_enabled())


def _one_by_one() -> bool:
    """Whether the weights of a group must be cast one by one just now."""
    if transformed():
        return True  # torch.func differentiates and batches plain casts by itself
    ddp = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    # it looks in the graph for parameters that take no part in this step; in a group all do
    return ddp is not None and ddp.find_unused_parameters


@dataclass
class Entry:
    """What is known of a module that is called from outside: its weights and their devices.

    ``watched`` holds the modes (training or not) in which its first call was watched for writes.
    """

    groups: WeightGroups
    devices: tuple[str, ...]
    watched: set[bool] = field(default_factory=set)


_entries: WeakKeyDictionary[nn.Module, Entry] = WeakKeyDictionary()


def entry_of(module: nn.Module) -> Entry:
    """Return what is known of ``module`` as an outermost one; found out at its first call."""
    entry = _entries.get(module)
    if entry is None:
        entry = Entry(WeightGroups(weights_below(module)), devices_of(module))
        _entries[module] = entry
    elif entry.groups.outdated:
        entry = Entry(entry.groups.renewed(weights_below(module)), devices_of(module))
        _entries[module] = entry
    return entry


def forget_entry(module: nn.Module) -> None:
    """Forget what is known of ``module``: its weights moved or its policy changed."""
    _entries.pop(module, None)


def weights_below(module: nn.Module) -> Iterator[tuple[torch.Tensor, torch.dtype]]:
    """Yield every weight that a layer in ``module`` reads in its compute dtype, and that dtype."""
    for layer in module.modules():
        plan = plan_of(layer)
        if plan is None:
            continue
        for name in plan.reads:
            weight = layer._parameters.get(name)
            if weight is not None and plan.casts(weight):
                yield weight, plan.compute


def devices_of(module: nn.Module) -> tuple[str, ...]:
    """Return the types of device that the weights of ``module`` lie on, if autocast knows them."""
    types = dict.fromkeys(parameter.device.type for parameter in module.parameters())
    return tuple(kind for kind in types if torch.amp.is_autocast_available(kind))


class _Calls(threading.local):
    """The policied modules whose forward this thread is in, and the copies they share."""

    def __init__(self) -> None:
        self.stack: list[nn.Module] = []
        self.copies: WeightCopies | None = None
        self.kept: WeightCopies | None = None
        self.devices: tuple[str, ...] = ()


calls = _Calls()


@contextmanager
def weights_unchanged(model: nn.Module) -> Iterator[None]:
    """State that no weight of ``model`` changes inside the block: its 16-bit copies are kept.

    For gradient accumulation (a cast a weight and optimizer step, not one a micro-batch) and for
    loops of inference. A step of any ``torch.optim`` optimizer and any in-place write that torch
    can see still renews the copies; writes through ``.data`` inside the block are what you
    promise not to do.

    Args:
        model: a module that has a policy.

    Raises:
        PolicyError: the model has none.

    >>> from halfstep.torch import apply_policy
    >>> model = apply_policy(nn.Linear(2, 2), "mixed_bfloat16")
    >>> with weights_unchanged(model):
    ...     for batch in (torch.ones(1, 2), torch.zeros(1, 2)):
    ...         model(batch).sum().backward()
    """
    if plan_of(model) is None:
        raise PolicyError(
            f"weights_unchanged: no policy was applied to this {type(model).__name__}; "
            "call apply_policy first."
        )
    copies = WeightCopies(entry_of(model).groups)
    before = calls.kept
    calls.kept = copies
    hook = register_optimizer_step_post_hook(lambda *_: copies.clear())
    try:
        yield
    finally:
        hook.remove()
        calls.kept = before
