"""What torch's operations say of themselves in their schemas, and the few facts that they omit."""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .looking import tensors_in

ALLOCATIONS = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
"""Give memory whose contents mean nothing yet."""

OVERWRITES = frozenset(
    {
        "copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "normal_", "uniform_",
        "bernoulli_", "random_", "exponential_", "geometric_", "cauchy_", "log_normal_",
        "resize_", "set_",
    }
)  # fmt: skip
"""Write to ``self`` without reading it."""

_UNANNOTATED = {"running_mean", "running_var"}
"""Arguments that batch norms write to, though their schemas do not say so."""


class Kind(enum.Enum):
    """How an operation treats memory."""

    VIEW = enum.auto()
    PURE = enum.auto()
    WRITING = enum.auto()

    def written(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the floating tensors that a call writes to."""
        if self is not Kind.WRITING:
            return []
        given = dict(zip(_argument_names(func), args, strict=False)) | dict(kwargs)
        return [
            tensor
            for name in _written_names(func)
            for tensor in tensors_in(given.get(name))
            if tensor.is_floating_point()
        ]


@functools.cache
def kind_of(func: Any) -> Kind:
    """Return how an operation treats memory.

    >>> import torch
    >>> kind_of(torch.ops.aten.view.default).name, kind_of(torch.ops.aten.add_.Tensor).name
    ('VIEW', 'WRITING')
    >>> kind_of(torch.ops.aten.native_batch_norm.default).name
    'WRITING'
    """
    if _written_names(func):
        return Kind.WRITING
    aliases = [given.alias_info for given in func._schema.returns]
    return Kind.VIEW if any(alias is not None for alias in aliases) else Kind.PURE


@functools.cache
def base_name(func: Any) -> str:
    """Return an operation's name without namespace and overload.

    >>> import torch
    >>> base_name(torch.ops.aten.add.Tensor)
    'add'
    """
    return str(func._schema.name).split("::")[-1]


@functools.cache
def _argument_names(func: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in func._schema.arguments)


@functools.cache
def _written_names(func: Any) -> tuple[str, ...]:
    return tuple(
        argument.name
        for argument in func._schema.arguments
        if (argument.alias_info is not None and argument.alias_info.is_write)
        or argument.name in _UNANNOTATED
    )


def numbers_in(args: Any, kwargs: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the numbers among the arguments of a call, not the shapes and dimensions in lists."""
    given = (*args, *kwargs.values())
    return tuple(
        float(value)
        for value in given
        if isinstance(value, int | float) and not isinstance(value, bool)
    )
