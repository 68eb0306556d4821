"""Which weights of a model are cast together, and the one node of the graph that casts them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from .plan import plan_of
from .sharding import is_sharded

GROUP_BYTES = 64 * 2**20
"""How many bytes of weights are cast together at most: a group's gradients are all in memory
until the last of them is there, and only then can DistributedDataParallel send any of them."""

SMALL_GROUP = 3
"""Fewer weights than these are cast one by one: an autograd node written in Python takes longer."""

Key: TypeAlias = "tuple[int, torch.dtype]"
Reference: TypeAlias = "weakref.ref[torch.Tensor]"


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


# what Function.apply calls in the end: before that it unwraps tensors that torch.func has left
# behind, which parameters never are, for as long as the casts themselves take
_apply: Any = super(torch.autograd.Function, _CastGroup).apply


def cast_weights(weights: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Do the same as `cast_together` for parameters, outside of every transform of torch.func."""
    if torch.is_grad_enabled() and weights[0].requires_grad:
        return list(_apply(dtype, *weights))
    with torch.no_grad():
        return _cast_data(tuple(weights), dtype)


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


@dataclass
class Group:
    """Weights that are cast together, while they are anybody's, and their bytes."""

    weights: list[Reference] = field(default_factory=list)
    size: int = 0


class WeightGroups:
    """Which weights below a module are cast together, by weight and compute dtype.

    ``outdated`` says whether the model has changed since.
    """

    __slots__ = ("_group_of", "_outside", "outdated")

    def __init__(
        self, layers: Iterable[nn.Module] = (), before: WeightGroups | None = None
    ) -> None:
        self._group_of: dict[Key, tuple[Reference, Group]] = {}
        # what the groups before these found to lie outside need not be looked for again
        outside = {} if before is None else before._outside
        self._outside: dict[Key, Reference] = {
            k: ref for k, ref in outside.items() if ref() is not None
        }
        self.outdated = False
        open_groups: dict[tuple[object, ...], Group] = {}
        for weight, dtype in _weights_below(layers):
            key = (id(weight), dtype)
            if not _groupable(weight) or key in self._group_of:
                continue
            # what one launch can take together, and what is differentiated together
            kind = (dtype, weight.dtype, weight.device, weight.requires_grad)
            group = open_groups.get(kind)
            bytes_here = weight.numel() * weight.element_size()
            if group is None or group.size + bytes_here > GROUP_BYTES:
                group = open_groups[kind] = Group()
            reference = weakref.ref(weight)
            group.weights.append(reference)
            group.size += bytes_here
            self._group_of[key] = reference, group

    def find(self, weight: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return the weights that are cast together with this one; empty if it is in no group.

        A weight that is in none, though it could be, was put into the model after the groups were
        made (or lies outside of it): the groups are then made anew, once.
        """
        key = (id(weight), dtype)
        known = self._group_of.get(key)
        if known is not None and known[0]() is weight:  # else its address was another's
            return [own for reference in known[1].weights if (own := reference()) is not None]
        outside = self._outside.get(key)
        if _groupable(weight) and (outside is None or outside() is not weight):
            self._outside[key] = weakref.ref(weight)
            self.outdated = True
        return []


def _weights_below(layers: Iterable[nn.Module]) -> Iterator[tuple[torch.Tensor, torch.dtype]]:
    """Yield every weight that a layer reads in its compute dtype, and that dtype."""
    for layer in layers:
        plan = plan_of(layer)
        if plan is None or is_sharded(layer):
            continue
        for name in plan.reads:
            weight = layer._parameters.get(name)
            if weight is not None and plan.casts(weight):
                yield weight, plan.compute
