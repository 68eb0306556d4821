"""Gathering facts while a batch runs: what each operation was, in which dtype, how large."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...core.advice import LOSS, Constant, Product, Range, Reduction
from ..blaming.looking import tensors_in, values_of
from ..blaming.operations import ALLOCATIONS, Kind, base_name, kind_of
from ..blaming.places import Place, Places
from ..casting import LOW, PLAIN
from .operations import (
    REDUCTIONS,
    dtype_name,
    numbers_in,
    plain,
    product_of,
    reduced,
)

_PUTS_IN = frozenset(("masked_fill", "where", "full", "full_like", "fill", "scalar_tensor"))
"""What puts in a number that was asked for, an infinity too."""

_PASSES_ON = frozenset(("expand", "view", "_unsafe_view", "unsqueeze", "squeeze", "detach"))
"""What an added constant goes through unchanged."""

_MADE = "_halfstep_made"
_HOLDS = "_halfstep_holds"


class Made(NamedTuple):
    """What made a tensor.

    Attributes:
        operation: its name; through casts, what was before them.
        dtype: the narrowest dtype of that operation and its result.
    """

    operation: str
    dtype: str


class Watch(TorchDispatchMode):
    """Collects facts about every operation of a forward pass and a loss.

    Attributes:
        last: where the operation ran that was started last.
        weight_copies: the memory of the 16-bit copies of weights.
    """

    def __init__(self, places: Places) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._places = places
        self.last = Place()
        self.weight_copies: set[int] = set()
        self._products: dict[tuple[Any, ...], Product] = {}
        self._ranges: dict[tuple[Any, ...], Range] = {}
        self._reductions: dict[tuple[Any, ...], Reduction] = {}
        self._constants: dict[tuple[Any, ...], Constant] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and note what it was."""
        kwargs = kwargs or {}
        name = base_name(func)
        if name.startswith("_foreach_copy"):
            self.weight_copies |= {_memory(tensor) for tensor in tensors_in(args[0])}
        self.last = place = self._places.here()[0]
        held = self._meet_constants(name.rstrip("_"), place, args, kwargs)
        result = func(*args, **kwargs)
        made = [tensor for tensor in tensors_in(result) if tensor.is_floating_point()]
        if not made or name in ALLOCATIONS:
            return result
        self._hand_on(name, args, made[0], held)
        if kind_of(func) is not Kind.VIEW:
            self._measure(name, place, args, made[0])
        return result

    # ---------------------------------------------------------------- what was seen

    def products(self) -> tuple[Product, ...]:
        """Every matrix product, those of one place, dtype and size together."""
        return tuple(self._products.values())

    def ranges(self) -> tuple[Range, ...]:
        """How large results in 16 bits were, by place and operation."""
        return tuple(self._ranges.values())

    def reductions(self) -> tuple[Reduction, ...]:
        """The largest reductions, by place and operation."""
        return tuple(self._reductions.values())

    def constants(self) -> tuple[Constant, ...]:
        """The numbers in the code, by place, operation and value."""
        return tuple(self._constants.values())

    # ---------------------------------------------------------------- looking

    def _measure(self, name: str, place: Place, args: Sequence[Any], result: Tensor) -> None:
        at = path_of(place)
        product = product_of(name, args, at)
        if product is not None:
            key = (at, product.operation, product.dtype, product.sizes)
            before = self._products.get(key)
            self._products[key] = (
                product
                if before is None
                else replace(
                    before, flops=before.flops + product.flops, rows=before.rows + product.rows
                )
            )
        if result.dtype in LOW:
            self._measure_low(name, place, args, result)

    def _measure_low(self, name: str, place: Place, args: Sequence[Any], result: Tensor) -> None:
        at, operation, dtype = path_of(place), plain(name), dtype_name(result)
        finite_in, largest_in = _magnitude(tensors_in(list(args)))
        finite, largest = _magnitude([result])
        lost = 0
        if finite_in and not finite and name.rstrip("_") not in _PUTS_IN:
            lost = int((~torch.isfinite(result)).sum())
        self._widen(
            self._ranges,
            (at, operation, dtype, place.source),
            Range(at, operation, dtype, largest, largest_in, lost, place.source),
        )
        if name in REDUCTIONS:
            count = reduced(name, args, result)
            self._widen(
                self._reductions,
                (at, operation, dtype, place.source),
                Reduction(at, operation, dtype, count, largest_in, place.source),
            )

    def _widen(self, known: dict[tuple[Any, ...], Any], key: tuple[Any, ...], new: Any) -> None:
        """Keep the largest of what was seen at one place."""
        before = known.get(key)
        if before is None:
            known[key] = new
            return
        grown = {
            name: max(getattr(before, name), getattr(new, name))
            for name in ("largest", "largest_in", "count")
            if hasattr(new, name)
        }
        if isinstance(new, Range):
            grown["lost"] = before.lost + new.lost
        known[key] = replace(before, **grown)

    # ---------------------------------------------------------------- constants

    def _meet_constants(
        self, name: str, place: Place, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> list[tuple[Any, ...]]:
        """Note the numbers among the arguments; return the keys of those that stay in the result.

        It runs before the operation, which may refuse a number that does not fit.
        """
        self._feed(name, args)
        dtype = _meets(args, kwargs)
        if dtype is None or dtype not in LOW:
            return []
        keys = []
        for value, role in numbers_in(name, args, dict(kwargs)):
            if math.isinf(value) or math.isnan(value):
                continue
            key = (path_of(place), name, str(dtype), value, place.source)
            short = str(dtype).removeprefix("torch.")
            self._constants.setdefault(
                key, Constant(key[0], plain(name), short, value, role, place.source)
            )
            if role in ("added", "bound"):
                keys.append(key)
        return keys

    def _feed(self, name: str, args: Sequence[Any]) -> None:
        # only what it is divided by can break a division
        takes = args[1:2] if name == "div" else args[:1]
        if name in _PASSES_ON:
            return
        for tensor in tensors_in(list(takes)):
            for key in getattr(tensor, _HOLDS, ()):
                constant = self._constants[key]
                if not constant.feeds:
                    self._constants[key] = replace(constant, feeds=plain(name))

    def _hand_on(
        self, name: str, args: Sequence[Any], result: Tensor, held: list[tuple[Any, ...]]
    ) -> None:
        sources = list(tensors_in(list(args)))
        if name in _PASSES_ON and sources:
            held = held + list(getattr(sources[0], _HOLDS, ()))
        if held:
            setattr(result, _HOLDS, tuple(held))
        before = getattr(sources[0], _MADE, None) if sources else None
        carries = name in _PASSES_ON or name in ("_to_copy", "clone", "reshape")
        if carries and before is not None:
            setattr(result, _MADE, before)
            return
        narrow = [tensor for tensor in (*sources, result) if tensor.dtype in LOW]
        made = Made(plain(name), dtype_name(narrow[0] if narrow else result))
        setattr(result, _MADE, made)


def path_of(place: Place) -> str:
    """Return a place as the rules call it."""
    return place.path if place.kind else LOSS


def made_by(tensor: Tensor) -> Made | None:
    """Return what made a tensor while a :class:`Watch` was on, as far as it is known."""
    made: Made | None = getattr(tensor, _MADE, None)
    return made


def _meets(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a number among the arguments will have."""
    asked = kwargs.get("dtype")
    if isinstance(asked, torch.dtype):
        return asked
    floats = [t for t in tensors_in(list(args)) if t.is_floating_point()]
    # a tensor with dimensions decides over one without
    floats.sort(key=lambda tensor: tensor.dim() == 0)
    return floats[0].dtype if floats else None


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _magnitude(tensors: Sequence[Tensor] | Iterator[Tensor]) -> tuple[bool, float]:
    """Whether all values are finite, and the largest finite magnitude."""
    finite, largest = True, 0.0
    for tensor in tensors:
        values = values_of(tensor)
        if values is None or values.numel() == 0 or values.is_complex():
            continue
        magnitude = values.detach().abs()
        top = float(magnitude.amax())
        if not math.isfinite(top):
            finite = False
            top = float(torch.where(torch.isfinite(magnitude), magnitude, 0).amax())
        largest = max(largest, top)
    return finite, largest


class KeptBytes:
    """Counts what a forward pass keeps for the backward pass.

    Memory that is kept twice counts once; that of parameters, buffers and copies of weights, which
    do not grow with the batch, not at all.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        fixed = [*model.parameters(), *model.buffers()]
        self._fixed = {_memory(tensor) for tensor in fixed if _has_memory(tensor)}
        self._sizes: dict[int, int] = {}
        # what is kept must live, or the next tensor may get its memory
        self._alive: list[Tensor] = []

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Return the context in which it counts."""
        return torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        if _has_memory(tensor):
            self._sizes[_memory(tensor)] = tensor.untyped_storage().nbytes()
            self._alive.append(tensor)
        return tensor

    def total(self, also_fixed: set[int]) -> int:
        """Return the bytes, without those at the addresses given."""
        return sum(
            size
            for memory, size in self._sizes.items()
            if memory not in self._fixed and memory not in also_fixed
        )


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and type(tensor) in PLAIN
