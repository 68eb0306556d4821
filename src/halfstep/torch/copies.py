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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import PolicyError
from . import replicas
from .grouping import SMALL_GROUP, Key, WeightGroups, cast_weights
from .plan import plan_of, traced, transformed
from .sharding import Recasts, is_sharded

Copy: TypeAlias = "tuple[torch.Tensor, torch.Tensor, int, int, bool]"
"""A weight, its copy, and what the weight looked like then: its version, where its memory was.

The last says that the copy has a graph and can be saved for a backward pass, so that nothing
about where it is used can make it wrong. (A plain tuple: many are made in every call.)
"""


def _copies_of(
    weights: list[torch.Tensor], lows: list[torch.Tensor], parameters: bool
) -> Iterator[Copy]:
    """Note copies of weights that were made together; of parameters, or of other tensors too."""
    if not parameters or any(map(torch.Tensor.is_inference, weights)):
        looks = map(_looks, weights)
        return (
            (weight, low, *look, False)
            for weight, low, look in zip(weights, lows, looks, strict=True)
        )
    versions = [weight._version for weight in weights]
    places = [weight.data_ptr() for weight in weights]
    lasting = lows[0].requires_grad and not lows[0].is_inference()
    return zip(weights, lows, versions, places, repeat(lasting))


def _is_fresh(copy: Copy, weight: torch.Tensor) -> bool:
    """Whether a copy is still one of this weight, and can be used as things are now."""
    of, low, *looks, _ = copy
    if of is not weight or (*looks,) != _looks(weight):
        return False
    if low.is_inference() and not torch.is_inference_mode_enabled():
        return False  # it could not be saved for a backward pass
    # one made under no_grad has no graph: used now, it would cut the weight's gradient off
    return low.requires_grad or not (weight.requires_grad and torch.is_grad_enabled())


def _looks(tensor: torch.Tensor) -> tuple[int, int]:
    """What tells a tensor that was written to, or given other data, as far as torch can say."""
    version = 0 if tensor.is_inference() else tensor._version
    # only a parameter has memory for certain: torch.func's tensors have none
    return version, tensor.data_ptr() if type(tensor) is nn.Parameter else 0


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

    __slots__ = ("_copies", "_groups", "_kept", "_made", "_watched")

    def __init__(self, groups: WeightGroups, watch: bool = False, kept: bool = False) -> None:
        self._groups = groups
        self._kept = kept
        self._copies: dict[Key, Copy] = {}
        self._made: dict[Key, tuple[list[torch.Tensor], list[torch.Tensor], int]] = {}
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
        self._made.clear()

    def outdate(self) -> None:
        """Have the next call look at the model anew: it was sharded since the last look."""
        self._groups.outdated = True

    def made(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the copy of ``weight`` in ``dtype`` that was made earlier in this call, if any."""
        copy = self._copies.get((id(weight), dtype))
        if copy is None:
            return None
        of, low, version, place, lasting = copy
        if lasting and of is weight:  # this answers nearly all
            return low if weight._version == version and weight.data_ptr() == place else None
        return low if _is_fresh(copy, weight) else None

    def make(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a new copy of ``weight`` in ``dtype``; the others of its group are made too."""
        group = [] if _one_by_one() else _alike(weight, self._groups.find(weight, dtype))
        if len(group) < SMALL_GROUP:
            low = weight.to(dtype)
            parameter = type(weight) is nn.Parameter
            if parameter or not self._kept:
                self._remember([weight], dtype, [low], parameter)
            return low
        self._remember(group, dtype, cast_weights(group, dtype), True)
        return self._copies[id(weight), dtype][1]

    def _remember(
        self,
        weights: list[torch.Tensor],
        dtype: torch.dtype,
        lows: list[torch.Tensor],
        parameters: bool,
    ) -> None:
        keys = [(id(weight), dtype) for weight in weights]
        if parameters and not lows[0].is_inference():
            self._made[keys[0]] = weights, lows, lows[0]._version
        self._copies.update(zip(keys, _copies_of(weights, lows, parameters), strict=True))
        if self._watched is None or transformed():
            return
        for weight, low in zip(weights, lows, strict=True):
            if type(weight) is nn.Parameter:
                self._watched.append((weight, low, low.data_ptr(), _sum_of_bits(low)))

    def written_in_place(self) -> list[torch.Tensor]:
        """Return the weights whose copies count more writes than when they were made.

        Asked after every call, for nothing on the device; ``.data`` and inference tensors do not
        count their writes.
        """
        return [
            weight
            for weights, lows, version in self._made.values()
            for weight, low in zip(weights, lows, strict=True)
            if low._version != version
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


def _alike(weight: torch.Tensor, group: list[torch.Tensor]) -> list[torch.Tensor]:
    """The group without a parameter that was frozen, thawed or cast since, or has hooks.

    The one node of a group hands a gradient, or none, to every weight in it, and torch runs their
    hooks for both.
    """
    trained, stored = weight.requires_grad, weight.dtype
    if _hooked(weight):
        return []
    return [w for w in group if w.requires_grad is trained and w.dtype is stored and not _hooked(w)]


def _hooked(weight: torch.Tensor) -> bool:
    return bool(weight._backward_hooks or weight._post_accumulate_grad_hooks)


def _one_by_one() -> bool:
    """Whether the weights of a group must be cast one by one just now."""
    if transformed() or traced():
        return True  # torch.func and the tracer know plain casts, and no autograd.Function
    # it sends a gradient as soon as it is told of it, and a group's node tells of all of them
    # (and where a checkpointed block is run again, in the midst of its backward, it is the same)
    return replicas.active() is not None or torch._C._current_graph_task_id() != -1


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
        return Entry(WeightGroups(), devices_of(module))
    entry = _entries.get(module)
    if entry is None or entry.groups.outdated:
        before = None if entry is None else entry.groups
        groups = WeightGroups(module.modules(), before)
        sharded = any(map(is_sharded, module.modules()))
        entry = _entries[module] = Entry(groups, devices_of(module), sharded)
    return entry


def forget_entries() -> None:
    """Forget what is known of all modules: in one, weights moved or a policy changed.

    Of all, because one that lies in others is known there, and does not know where.
    """
    _entries.clear()


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
