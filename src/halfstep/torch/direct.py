"""The short way through torch's own layers, for the call that nearly every call is.

``layer.py`` and ``running.py`` get every case right, and each of their steps costs the host time;
on a small model that is more than the arithmetic. Here are the classes whose forward is one
operation of an input and of their own parameters. Called with one plain tensor in the midst of a
model, with fresh copies of their weights at hand, they run that operation at once. Whatever is
otherwise (a first call, another argument, a changed weight, ``torch.compile``, a transform) takes
the long way, which does the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from .copies import calls
from .plan import ATTRIBUTE
from .region import leave
from .running import Forward, copied, explain

Operation = Callable[..., Any]


def _linear(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    return F.linear(x, weight, bias)


def _convolution(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    return layer._conv_forward(x, weight, bias)


def _layer_norm(layer: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Any:
    return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)


_OPERATIONS: dict[type, tuple[Forward, Operation]] = {
    nn.Linear: (nn.Linear.forward, _linear),
    nn.Conv1d: (nn.Conv1d.forward, _convolution),
    nn.Conv2d: (nn.Conv2d.forward, _convolution),
    nn.Conv3d: (nn.Conv3d.forward, _convolution),
    nn.LayerNorm: (nn.LayerNorm.forward, _layer_norm),
}
"""Classes with the forward that torch gave them, and what it computes."""

# looked up once: these are asked in every call
_watching_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack


def has_short_way(base: type) -> bool:
    """Whether this very class is one of those.

    >>> has_short_way(nn.Linear), has_short_way(nn.Bilinear)
    (True, False)
    """
    return base in _OPERATIONS


def short_way(base: type, long_way: Forward) -> Forward:
    """Return a forward of a policied ``base`` that takes the short way where it can."""
    torchs, operation = _OPERATIONS[base]

    @functools.wraps(torchs)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Dynamo makes the first question a constant; what follows is not for it
        if is_dynamo_compiling() or kwargs or len(args) != 1 or type(args[0]) is not Tensor:
            return long_way(self, *args, **kwargs)
        copies, plan, x = calls.copies, self.__dict__.get(ATTRIBUTE), args[0]
        parameters = self._parameters
        if (
            copies is None
            or plan is None
            or plan.result is not None
            or "weight" not in parameters  # a hook computes it
            or "bias" not in parameters
            or base.forward is not torchs  # type: ignore[attr-defined]  # as profilers do
            or _watching_modes()
            or _transform() is not None
        ):
            return long_way(self, x)
        saved = None if plan.region is None else plan.region.enter(calls.devices)
        try:
            if x.dtype is not plan.compute and plan.inputs is not None:
                x = plan.inputs(x)
            weight: Tensor | None = parameters["weight"]
            bias: Tensor | None = parameters["bias"]
            if weight is not None and not plan.leaves(weight):
                weight = copied(self, plan, copies, weight)
                bias = None if bias is None else copied(self, plan, copies, bias)
            return operation(self, x, weight, bias)
        except RuntimeError as error:
            explain(error, plan)
            raise
        finally:
            if saved is not None:
                leave(saved)

    return forward
