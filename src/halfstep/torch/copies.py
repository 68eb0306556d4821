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
from .plan import plan_of, traced, transformed
from .sharding import Recasts, is_sharded

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
        if len(there) == len(gradients):
            return (None, *cast_together(there, ctx.dtype))
        cast = dict(zip(map(id, there), cast_together(there, ctx.dtype), strict=True))
        return (None, *[None if g is None else cast.get(id(g), g) for g in gradients])


def cast_together(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Cast tensors of one dtype to another with one launch, differentiably, to any order."""
    if not tensors:
        return []
    if not torch.is_grad_enabled():
        return _cast_data(tuple(tensors), dtype)
    if any(tensor.requires_grad for tensor in tensors):
        return list(_CastGroup.apply(dtype, *tensors))  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return _cast_data(tuple(tensors), dtype)


def _groupable(tensor: torch.Tensor) -> bool:
    return type(tensor) is nn.Parameter and tensor.layout is torch.strided


class WeightGroups:
    """Which weights below a module are cast together, by weight and compute dtype."""

    __slots__ = ("_group_of", "_outside", "outdated")

    def __init__(
        self,
        weights: Iterable[tuple[torch.Tensor, torch.dtype]],
        before: WeightGroups | None = None,
    ) -> None:
        self._group_of: dict[Key, list[torch.Tensor]] = {}
        # what the groups before these found to lie outside need not be looked for again
        self._outside: dict[Key, torch.Tensor] = {} if before is None else before._outside
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


class _Copy:
    """A copy, and what its weight looked like when it was made."""

    __slots__ = ("any_time", "looks", "low", "weight")

    def __init__(self, weight: torch.Tensor, low: torch.Tensor) -> None:
        self.weight = weight
        self.looks = _looks(weight)
        self.low = low
        # it has a graph, and can be saved for a backward pass: nothing more to ask of it
        self.any_time = low.requires_grad and not low.is_inference()

    def is_fresh(self, weight: torch.Tensor) -> bool:
        """Whether the copy is still one of this weight, and can be used as things are now."""
        if self.weight is not weight or self.looks != _looks(weight):
            return False
        if self.any_time:
            return True
        low = self.low
        if low.is_inference() and not torch.is_inference_mode_enabled():
            return False  # it could not be saved for a backward pass
        # one made under no_grad has no graph: used now, it would cut the weight's gradient off
        return low.requires_grad or not (weight.requires_grad and torch.is_grad_enabled())


def _looks(tensor: torch.Tensor) -> tuple[int, int]:
    """What tells a tensor that was written to, or given other data, as far as torch can say."""
    version = 0 if tensor.is_inference() else tensor._version
    # only a parameter has memory for certain: torch.func's tensors have none
    return tensor.data_ptr() if type(tensor) is nn.Parameter else 0, version


def _sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(torch.int16).sum()


class WeightCopies:
    """The copies made so far in one call of the outermost module.

    Args:
        groups: which weights are cast together.
        watch: remember what each copy looked like, for :meth:`written_to`.
        kept: it outlives a call, so it keeps copies of parameters only: a weight that is computed
            in each call is another tensor each time.
    """

    __slots__ = ("_copies", "_groups", "_kept", "_watched")

    def __init__(self, groups: WeightGroups, watch: bool = False, kept: bool = False) -> None:
        self._groups = groups
        self._kept = kept
        self._copies: dict[Key, _Copy] = {}
        self._watched: list[tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]] | None = (
            [] if watch else None
        )

    @property
    def watches(self) -> bool:
        """Whether it can say which copies were written to."""
        return self._watched is not None

    def clear(self) -> None:
        """Forget every copy."""
        self._copies.clear()

    def outdate(self) -> None:
        """Have the next call look at the model anew: it was sharded since the last look."""
        self._groups.outdated = True

    def made(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the copy of ``weight`` in ``dtype`` that was made earlier in this call, if any."""
        copy = self._copies.get((id(weight), dtype))
        return copy.low if copy is not None and copy.is_fresh(weight) else None

    def make(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a new copy of ``weight`` in ``dtype``; the others of its group are made too."""
        group = self._group(weight, dtype)
        if len(group) < SMALL_GROUP:
            low = weight.to(dtype)
            self._remember(weight, dtype, low)
            return low
        copies = dict(zip(map(id, group), cast_together(group, dtype), strict=True))
        for original in group:
            self._remember(original, dtype, copies[id(original)])
        return copies[id(weight)]

    def _remember(self, weight: torch.Tensor, dtype: torch.dtype, low: torch.Tensor) -> None:
        parameter = type(weight) is nn.Parameter
        if parameter or not self._kept:
            self._copies[id(weight), dtype] = _Copy(weight, low)
        if self._watched is not None and parameter and not transformed():
            self._watched.append((weight, low, low.data_ptr(), _sum_of_bits(low)))

    def _group(self, weight: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        if _one_by_one():
            return []
        group = self._groups.find(weight, dtype)
        # without a parameter that was frozen, thawed, moved or given another dtype since
        trained, stored, device = weight.requires_grad, weight.dtype, weight.device
        return [
            other
            for other in group
            if other.requires_grad is trained and other.dtype is stored and other.device == device
        ]

    def written_to(self) -> list[torch.Tensor]:
        """Return the weights whose copies were changed since they were made (if watched).

        It reads the host once. The sum over the bits shows what a version does not: ``.data`` has
        one of its own.
        """
        watched = self._watched or []
        now = [_sum_of_bits(low) for _, low, _, _ in watched]
        then = [bits for _, _, _, bits in watched]
        same = [True] * len(watched)
        if watched and not any(low.is_meta for _, low, _, _ in watched):
            home = now[0].device
            pairs = zip(now, then, strict=True)
            same = torch.stack([(a == b).to(home) for a, b in pairs]).tolist()
        return [
            weight
            for (weight, low, place, _), alike in zip(watched, same, strict=True)
            if not alike or low.data_ptr() != place
        ]


def _one_by_one() -> bool:
    """Whether the weights of a group must be cast one by one just now."""
    if transformed() or traced():
        return True  # torch.func and the tracer know plain casts, and no autograd.Function
    ddp = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    # it looks in the graph for parameters that take no part in this step; in a group all do
    return ddp is not None and ddp.find_unused_parameters


@dataclass
class Entry:
    """What is known of a module that is called from outside: its weights and their devices.

    ``watched`` holds the modes (training or not) in which its first call was watched for writes;
    ``sharded`` says whether FSDP2 gathers weights in it.
    """

    groups: WeightGroups
    devices: tuple[str, ...]
    sharded: bool = False
    watched: set[bool] = field(default_factory=set)


_entries: WeakKeyDictionary[nn.Module, Entry] = WeakKeyDictionary()


def entry_of(module: nn.Module) -> Entry:
    """Return what is known of ``module`` as an outermost one; found out at its first call."""
    if traced():
        return Entry(WeightGroups(()), devices_of(module))
    entry = _entries.get(module)
    if entry is None or entry.groups.outdated:
        before = None if entry is None else entry.groups
        groups = WeightGroups(weights_below(module), before)
        sharded = any(map(is_sharded, module.modules()))
        entry = _entries[module] = Entry(groups, devices_of(module), sharded)
    return entry


def forget_entry(module: nn.Module) -> None:
    """Forget what is known of ``module``: its weights moved or its policy changed."""
    _entries.pop(module, None)


def weights_below(module: nn.Module) -> Iterator[tuple[torch.Tensor, torch.dtype]]:
    """Yield every weight that a layer in ``module`` reads in its compute dtype, and that dtype."""
    for layer in module.modules():
        plan = plan_of(layer)
        if plan is None or is_sharded(layer):
            continue
        for name in plan.reads:
            weight = layer._parameters.get(name)
            if weight is not None and plan.casts(weight):
                yield weight, plan.compute


def devices_of(module: nn.Module) -> tuple[str, ...]:
    """Return the types of device that the weights of ``module`` lie on, if autocast knows them."""
    types = dict.fromkeys(parameter.device.type for parameter in module.parameters())
    return tuple(kind for kind in types if torch.amp.is_autocast_available(kind))


def is_selective() -> bool:
    """Whether selective activation checkpointing records or replays operations just now.

    It wants the recomputation of a block to do what the block did; a copy that one block made and
    the next one used would be missing there. So each reading casts by itself then.
    """
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    mode = type(torch.utils._python_dispatch._get_current_dispatch_mode())
    return mode.__module__ == "torch.utils.checkpoint"


class _Calls(threading.local):
    """The policied modules whose forward this thread is in, and the copies they share."""

    def __init__(self) -> None:
        self.stack: list[nn.Module] = []
        self.copies: WeightCopies | None = None
        self.recasts: Recasts | None = None
        self.kept: list[tuple[frozenset[int], WeightCopies]] = []
        self.devices: tuple[str, ...] = ()


calls = _Calls()


def copies_for(module: nn.Module, entry: Entry, watch: bool) -> WeightCopies:
    """Return the copies that a call of ``module`` from outside uses: kept ones, or new ones."""
    for modules, copies in reversed(calls.kept):
        if id(module) in modules:
            return copies
    return WeightCopies(entry.groups, watch)


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
    copies = WeightCopies(entry_of(model).groups, kept=True)
    calls.kept.append((frozenset(map(id, model.modules())), copies))
    hook = register_optimizer_step_post_hook(lambda *_: copies.clear())
    try:
        yield
    finally:
        hook.remove()
        calls.kept.pop()
