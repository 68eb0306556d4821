"""Casting what goes in and out of a layer: nested structures of tensors, floats only."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
"""What is cast. Integers, booleans, complex numbers and float8 (which means nothing without its
scale) pass as they are."""

SPARSE = frozenset(
    (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
)
"""Layouts that are not cast: few of their operations exist in 16 bits."""

LOW = frozenset((torch.float16, torch.bfloat16))

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""The types of tensors that are no subclass with ways of its own, as a DTensor is one."""


def dtype_named(name: str) -> torch.dtype:
    """Return the torch dtype of a policy's dtype name.

    >>> dtype_named("bfloat16")
    torch.bfloat16
    """
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is no dtype of torch")
    return dtype


def _held(source: torch.dtype, target: torch.dtype) -> tuple[float, float]:
    """Return the largest number of ``source`` that ``target`` has too, and a factor.

    The factor is the smallest normal number of ``source``: times it, only infinity is above 4.
    """
    limit = torch.tensor(torch.finfo(target).max, dtype=source)
    if limit.item() > torch.finfo(target).max:  # bfloat16 rounds float16's 65504 up
        limit = torch.nextafter(limit, torch.zeros_like(limit))
    return limit.item(), torch.finfo(source).tiny


_HELD = {
    (source, target): _held(source, target)
    for source in FLOATS
    for target in FLOATS
    if torch.finfo(source).max > torch.finfo(target).max
}
"""What :class:`FiniteCast` needs where a format has finite numbers that another one has not."""

Convert = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Cast:
    """Cast a floating tensor to ``dtype``; leave every other tensor alone."""

    dtype: torch.dtype

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor in ``dtype``, itself where it has it."""
        if tensor.dtype is self.dtype or tensor.dtype not in FLOATS or tensor.layout in SPARSE:
            return tensor
        return tensor.to(self.dtype)


@dataclasses.dataclass(frozen=True)
class FiniteCast(Cast):
    """Cast like :class:`Cast`, and keep finite constants finite.

    An attention mask is often made with ``torch.finfo(torch.float32).min``, which every 16-bit
    format turns into -inf; a row that is masked whole is then NaN. So a tensor that takes no part
    in differentiation is held within the format's range; infinities stay what they are.

    >>> mask = torch.tensor([0.0, torch.finfo(torch.float32).min])
    >>> FiniteCast(torch.float16)(mask)
    tensor([     0., -65504.], dtype=torch.float16)
    """

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor in ``dtype``, finite where it was finite."""
        if tensor.dtype is self.dtype or tensor.dtype not in FLOATS or tensor.layout in SPARSE:
            return tensor
        held = None if tensor.requires_grad else _HELD.get((tensor.dtype, self.dtype))
        if held is None or tensor.is_nested:
            return tensor.to(self.dtype)
        limit, tiny = held
        # the sum changes no finite number, and makes infinite again what was clamped from infinity
        return tensor.clamp(-limit, limit).add_(tensor, alpha=tiny).to(self.dtype)


@dataclasses.dataclass(frozen=True)
class Float32OnCpu(Cast):
    """Cast a floating tensor to ``dtype``, and to float32 on a CPU.

    >>> Float32OnCpu(torch.float16)(torch.ones(1, dtype=torch.float16)).dtype
    torch.float32
    """

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor in the dtype that its device wants, itself where it has it."""
        if tensor.dtype not in FLOATS or tensor.layout in SPARSE:
            return tensor
        return tensor.to(torch.float32 if tensor.device.type == "cpu" else self.dtype)


@dataclasses.dataclass(frozen=True)
class LowCast(Cast):
    """Cast 16-bit floats to ``dtype`` and leave the others alone: float64 stays float64."""

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor in ``dtype`` if it has 16 bits, else itself."""
        return tensor.to(self.dtype) if tensor.dtype in LOW else tensor


def cast_nested(value: Any, cast: Convert) -> Any:
    """Apply ``cast`` to every tensor in tuples, lists, dicts and dataclasses, however deep.

    A structure in which nothing changes is returned itself, not a copy, so that a cache that is
    handed through a model stays the same object. Other objects are returned as they are.

    >>> cast_nested({"x": torch.ones(1), "n": torch.tensor(3)}, Cast(torch.float16))
    {'x': tensor([1.], dtype=torch.float16), 'n': tensor(3)}
    """
    if isinstance(value, torch.Tensor):
        return cast(value)
    kind = type(value)
    rebuild = _REBUILD.get(kind)
    if rebuild is not None:
        return rebuild(value, cast)
    if kind in _LEAVES:
        return value
    for base, rebuild in _REBUILD_SUBCLASSES:
        if isinstance(value, base):
            return rebuild(value, cast)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _dataclass(value, cast)
    return value


def cast_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], cast: Convert
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Cast the positional and the keyword arguments of a call."""
    if args:
        args = tuple(
            [
                cast(value) if isinstance(value, torch.Tensor) else cast_nested(value, cast)
                for value in args
            ]
        )
    if kwargs:
        kwargs = {name: cast_nested(value, cast) for name, value in kwargs.items()}
    return args, kwargs


def _changed(old: list[Any], new: list[Any]) -> bool:
    return any(a is not b for a, b in zip(old, new, strict=True))


def _sequence(value: Any, cast: Convert) -> Any:
    old = list(value)
    new = [cast_nested(item, cast) for item in old]
    if not _changed(old, new):
        return value
    if hasattr(value, "_fields"):  # a named tuple takes its items one by one
        return type(value)(*new)
    if isinstance(value, deque):
        return deque(new, value.maxlen)
    made_otherwise = getattr(type(value).__new__, "__code__", None)  # by a class's own __new__
    if isinstance(value, tuple) and made_otherwise is not None:
        result = tuple.__new__(type(value), new)
        vars(result).update(getattr(value, "__dict__", {}))
        return result
    return type(value)(new)


def _mapping(value: Any, cast: Convert) -> Any:
    old = list(value.values())
    new = [cast_nested(item, cast) for item in old]
    if not _changed(old, new):
        return value
    # A shallow copy keeps the class, its default factory and its own attributes. Items are set
    # one by one because a class like transformers' ModelOutput mirrors them as attributes.
    if type(value) is dict:  # Dynamo does not trace copies of these two
        return dict(zip(value, new, strict=True))
    if type(value) is defaultdict:
        return defaultdict(value.default_factory, zip(value, new, strict=True))
    result = copy.copy(value)
    for key, item in zip(list(value), new, strict=True):
        result[key] = item
    return result


def _dataclass(value: Any, cast: Convert) -> Any:
    names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    old = [getattr(value, name) for name in names]
    new = [cast_nested(item, cast) for item in old]
    if not _changed(old, new):
        return value
    result = copy.copy(value)
    for name, item in zip(names, new, strict=True):
        object.__setattr__(result, name, item)  # frozen ones too
    return result


def _packed(value: PackedSequence, cast: Convert) -> PackedSequence:
    data = cast(value.data)
    return value if data is value.data else value._replace(data=data)


_LEAVES = frozenset((type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype))
_REBUILD: dict[type, Callable[[Any, Convert], Any]] = {
    tuple: _sequence,
    list: _sequence,
    dict: _mapping,
    OrderedDict: _mapping,
    defaultdict: _mapping,
    deque: _sequence,
    PackedSequence: _packed,
}
_REBUILD_SUBCLASSES: tuple[tuple[type, Callable[[Any, Convert], Any]], ...] = (
    (PackedSequence, _packed),
    (tuple, _sequence),
    (list, _sequence),
    (MutableMapping, _mapping),
)
