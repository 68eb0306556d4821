"""Watching every operation of a step, and remembering who made what.

A `Watch` is a ``TorchDispatchMode``: it sees each operation of the forward and of the backward pass
below autograd and autocast, in the dtype in which it runs. It keeps a light graph of `Record`, no
tensors, in which `trace` later walks from what is broken back to what broke it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ...core.fault import TensorFacts
from .looking import Badness, facts, in_wider, narrowest, not_finite, tensors_in
from .operations import ALLOCATIONS, OVERWRITES, Kind, base_name, kind_of, numbers_in
from .places import Place, Places

_MOST_DETAILS = 256
"""Past this many operations that made something, the later ones are not looked at closely: what is
blamed is the first."""


@dataclass(frozen=True)
class Detail:
    """What an operation that made something bad got and gave; looked at while it was there."""

    inputs: tuple[TensorFacts, ...]
    output: TensorFacts
    wider: TensorFacts | None
    dtype: torch.dtype


@dataclass(eq=False, slots=True)
class Record:
    """One operation, or one tensor from outside of the step.

    Attributes:
        index: its turn in the step.
        operation: its name; ``"batch"``, ``"parameter"`` or ``"constant"`` for what came in.
        name: of a parameter or a part of the batch.
        node: the autograd node that ran it, in a backward pass; else empty.
        place: where its forward is.
        parents: the records of its inputs.
        bad_parents: those whose values were bad when they went in.
        bad: whether what it gave is bad.
        nan: whether there is NaN in it.
        nan_before: whether NaN went in.
        numbers: the numbers that it was called with.
        learns: whether anything that went in requires a gradient.
        dtype: of what it gave.
        detail: more, if it made something bad.
    """

    index: int
    operation: str
    place: Place
    node: str = ""
    name: str = ""
    parents: tuple[Record, ...] = ()
    bad_parents: tuple[Record, ...] = ()
    bad: bool = False
    nan: bool = False
    nan_before: bool = False
    numbers: tuple[float, ...] = ()
    learns: bool = False
    dtype: torch.dtype | None = None
    detail: Detail | None = None

    @property
    def outside(self) -> bool:
        """Whether it is no operation but a tensor that was there before."""
        return self.operation in ("batch", "parameter", "constant")

    @property
    def makes(self) -> bool:
        """Whether it made something bad of good inputs, or a NaN of infinities."""
        return self.bad and not self.outside and (not self.bad_parents or self.makes_nan)

    @property
    def makes_nan(self) -> bool:
        """Whether it made the first NaN on its way."""
        return self.nan and not self.nan_before

    @property
    def on_purpose(self) -> bool:
        """Whether an infinity was asked for, as in ``masked_fill(mask, -inf)``."""
        infinite = any(number in (float("inf"), float("-inf")) for number in self.numbers)
        return (infinite or self.operation == "constant") and not self.nan


class Watch(TorchDispatchMode):
    """Sees every operation of a step.

    Args:
        places: knows where operations run.
        names: parameters, buffers and the batch's tensors, by their memory: which of
            ``"parameter"`` and ``"batch"`` they are, their names, and the tensors themselves.
        badness: what to look for.
    """

    def __init__(
        self,
        places: Places,
        names: Mapping[int, tuple[str, str, Tensor]],
        badness: Badness = not_finite,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.makers: list[Record] = []
        self.low = False
        self.written: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
        self._places = places
        self._names = names
        self._badness = badness
        self._last: dict[int, Record] = {}
        self._addresses: list[StorageWeakRef] = []
        self._index = 0
        self._details = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in a replay; to say so would import Dynamo for seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = kind_of(func)
        if kind is Kind.VIEW:
            return func(*args, **kwargs)
        place, node = self._places.here()
        written = kind.written(func, args, kwargs)
        before = self._before(func, written, args, kwargs)
        result = func(*args, **kwargs)
        call = _Call(func, before[0], before[1], node, place)
        with torch.no_grad():
            self._look(call, list(tensors_in(result)), written)
        return result

    def record_of(self, tensor: Tensor) -> Record | None:
        """Return what last wrote to a tensor's memory in this step, if anything did."""
        return self._last.get(storage_of(tensor))

    def look_again(self, record: Record) -> Iterator[Record]:
        """Yield ``record`` and everything bad that went into it, however far back."""
        seen, todo = {id(record)}, [record]
        while todo:
            here = todo.pop()
            yield here
            for parent in here.bad_parents:
                if id(parent) not in seen:
                    seen.add(id(parent))
                    todo.append(parent)

    # ------------------------------------------------------------------ one operation

    def _before(
        self, func: Any, written: list[Tensor], args: Any, kwargs: Any
    ) -> tuple[Any, Mapping[str, Any]]:
        """Keep what an operation in place is about to overwrite; return its arguments as copies."""
        if not written:
            return args, kwargs
        reads = base_name(func) not in OVERWRITES
        copies: dict[int, Tensor] = {}
        for tensor in written:
            parent = self._parent(tensor)
            if parent.outside:  # not made in this step: to be put back
                self._keep(tensor)
            if reads:
                copies[id(tensor)] = copy = tensor.detach().clone()
                self._wrote(copy, parent)
        return _swapped(args, copies), {k: _swapped(v, copies) for k, v in kwargs.items()}

    def _keep(self, tensor: Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return
        self.written.append((storage, _copied(storage)))

    def _look(self, call: _Call, results: list[Tensor], written: list[Tensor]) -> None:
        if base_name(call.func) == "_foreach_copy_":
            self._look_at_pairs(call)
            return
        if base_name(call.func) in ALLOCATIONS:  # what is in there means nothing
            for tensor in results:
                self._wrote(tensor, Record(self._index, "empty", call.place))
            return
        fresh = {id(tensor) for tensor in results} - {id(tensor) for tensor in written}
        outputs = [tensor for tensor in (*results, *written) if tensor.is_floating_point()]
        if outputs:
            self._note(call, call.inputs(), outputs, fresh)

    def _look_at_pairs(self, call: _Call) -> None:
        """A grouped copy is as many copies: each weight answers for itself."""
        for source, copy in zip(call.args[1], call.args[0], strict=True):
            alone = call.of(torch.ops.aten._to_copy.default, (source,), {"dtype": copy.dtype})
            self._note(alone, [("self", source)], [copy], {id(copy)})

    def _note(
        self, call: _Call, inputs: list[tuple[str, Tensor]], outputs: list[Tensor], fresh: set[int]
    ) -> None:
        self._index += 1
        self.low = self.low or any(t.dtype in (torch.float16, torch.bfloat16) for t in outputs)
        parents = [(self._parent(tensor), tensor) for _, tensor in inputs]
        flags = [self._badness(tensor) for tensor in outputs]
        record = Record(self._index, base_name(call.func), call.place, call.node)
        record.parents = tuple(parent for parent, _ in parents)
        record.bad = any(bad for bad, _ in flags)
        record.nan = any(nan for _, nan in flags)
        record.dtype = outputs[0].dtype
        record.numbers = numbers_in(call.args, call.kwargs)
        record.learns = any(tensor.requires_grad for _, tensor in inputs)
        if record.bad:
            self._fill_in(record, parents)
            if record.makes and inputs and not record.on_purpose:
                self._make_detail(record, call, inputs, outputs, flags)
        for tensor in outputs:
            self._remember(tensor, record, id(tensor) in fresh)

    def _fill_in(self, record: Record, parents: list[tuple[Record, Tensor]]) -> None:
        bad = []
        for parent, tensor in parents:
            if not parent.bad:
                continue
            here, nan = self._badness(tensor)
            if here:
                bad.append(parent)
                record.nan_before = record.nan_before or nan
        record.bad_parents = tuple(bad)

    def _make_detail(
        self,
        record: Record,
        call: _Call,
        inputs: list[tuple[str, Tensor]],
        outputs: list[Tensor],
        flags: list[tuple[bool, bool]],
    ) -> None:
        self.makers.append(record)
        self._details += 1
        if self._details > _MOST_DETAILS:
            return
        place = next(i for i, (bad, _) in enumerate(flags) if bad)
        low = narrowest([tensor for _, tensor in inputs] + [outputs[place]])
        again = list(tensors_in(in_wider(call.func, call.args, call.kwargs, low))) if low else []
        again = [tensor for tensor in again if tensor.is_floating_point()]
        wider = facts(again[min(place, len(again) - 1)]) if again else None
        shown = [*inputs, *call.divisors()]
        record.detail = Detail(
            tuple(facts(tensor, self._named(name, tensor)) for name, tensor in shown),
            facts(outputs[place]),
            wider,
            low or outputs[place].dtype,
        )

    # ------------------------------------------------------------------ who wrote what

    def _parent(self, tensor: Tensor) -> Record:
        known = self._last.get(storage_of(tensor))
        if known is not None:
            return known
        kind, name, whole = self._names.get(storage_of(tensor), ("constant", "", tensor))
        bad, nan = self._badness(tensor)
        record = Record(self._index, kind, Place(), name=name, bad=bad, nan=nan)
        record.learns = tensor.requires_grad
        record.dtype = tensor.dtype
        if bad:
            described = facts(whole, name)
            record.detail = Detail((described,), described, None, tensor.dtype)
        self._wrote(tensor, record)
        return record

    def _wrote(self, tensor: Tensor, record: Record) -> None:
        place = storage_of(tensor)
        if place not in self._last:
            # A weak reference keeps the address, not the memory: tensors that come into being
            # unseen, as torch.tensor(-inf), would else be taken for one that was here before.
            self._addresses += _address(tensor)
        self._last[place] = record

    def _remember(self, tensor: Tensor, record: Record, fresh: bool) -> None:
        place = storage_of(tensor)
        before = self._last.get(place)
        if not fresh and before is not None and before.bad and not record.bad:
            record.bad = True  # what it did not write to is still there
            record.nan = record.nan or before.nan
            record.nan_before = record.nan_before or before.nan
            record.bad_parents = (*record.bad_parents, before)
        self._wrote(tensor, record)

    def _named(self, name: str, tensor: Tensor) -> str:
        known = self._last.get(storage_of(tensor))
        if known is not None and known.outside and known.name:
            return f"{name} = {known.name}"
        return name


@dataclass(frozen=True)
class _Call:
    """An operation with its arguments as they were before it ran."""

    func: Any
    args: Any
    kwargs: Mapping[str, Any]
    node: str
    place: Place

    def of(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> _Call:
        return _Call(func, args, kwargs, self.node, self.place)

    def divisors(self) -> list[tuple[str, Tensor]]:
        """Second operands of whole numbers, as the count that a loss is divided by."""
        other = self._given().get("other")
        if not isinstance(other, Tensor) or other.is_floating_point() or other.is_complex():
            return []
        return [("other", other)]

    def _given(self) -> dict[str, Any]:
        names = [argument.name for argument in self.func._schema.arguments]
        return dict(zip(names, self.args, strict=False)) | dict(self.kwargs)

    def inputs(self) -> list[tuple[str, Tensor]]:
        """The floating tensors that went in, with their names in the operation's schema."""
        given = self._given()
        if base_name(self.func) in OVERWRITES:
            given.pop("self", None)
        given.pop("out", None)
        return [
            (name, tensor)
            for name, value in given.items()
            for tensor in tensors_in(value)
            if tensor.is_floating_point()
        ]


def _swapped(value: Any, copies: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return copies.get(id(value), value)
    if isinstance(value, tuple | list):
        return type(value)(_swapped(item, copies) for item in value)
    return value


def _copied(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    copied: torch.UntypedStorage = storage.clone()  # type: ignore[no-untyped-call]
    return copied


def _address(tensor: Tensor) -> list[StorageWeakRef]:
    try:
        return [StorageWeakRef(tensor.untyped_storage())]  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):
        return []


def storage_of(tensor: Tensor) -> int:
    """What identifies the memory of a tensor while it lives."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)  # sparse and wrapped tensors have no memory of their own
