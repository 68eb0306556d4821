"""What ``apply_policy`` decided for one module, kept in the module itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..core.policy import Policy
from .casting import FLOATS, Cast
from .region import Region
from .rules import LEFT_ALONE

ATTRIBUTE = "_halfstep_plan"
"""The name under which a module keeps its plan, in its ``__dict__``."""


_OFF_CPU = ("low off cpu", "low off cpu or transformed")


@dataclass(frozen=True)
class LayerPlan:
    """What one module does with dtypes, decided once.

    Attributes:
        policy: the policy it got.
        path: where it lies in the model that the policy was applied to; ``""`` is that model.
        why: which rule of the policy map, and which rule for its class, made the plan.
        rule: the name of the rule for its class.
        compute: the dtype it computes in.
        inputs: what happens to its arguments, ``None`` for nothing.
        reads: names of its own tensors that it reads in the compute dtype.
        reads_where: the devices where it does so: ``"low"`` is everywhere (see ``rules.Rule``).
        covers: whether it also reads the tensors of its children, without calling them.
        region: how autocast shall be inside of it, ``None`` for "as it is".
        result: what happens to what it returns, ``None`` for nothing.
        stored: its own parameters whose dtype the policy changed, with the dtype they had.
        functional: the argument of ``apply_policy``.
        output_dtype: the argument of ``apply_policy``, for the model itself.
        part: whether the policy was applied to a part of a model that had one.
        cast_forward_inputs: the argument of ``apply_policy``, for the model itself.
    """

    policy: Policy
    path: str
    why: str
    rule: str
    compute: torch.dtype
    inputs: Cast | None
    reads: tuple[str, ...]
    reads_where: str
    covers: bool
    region: Region | None
    result: Cast | None
    stored: tuple[tuple[str, torch.dtype], ...]
    functional: str
    output_dtype: str | None
    part: bool
    cast_forward_inputs: bool | None = None

    def casts(self, weight: torch.Tensor) -> bool:
        """Whether the module reads this tensor of its own as a copy in the compute dtype.

        A weight with no dimension stays float32: next to a tensor that has some, torch computes
        in that tensor's dtype anyway, and a temperature or a logit scale keeps its digits.
        """
        if weight.dtype is self.compute or weight.dtype not in FLOATS:
            return False
        if self.rule == LEFT_ALONE:
            return False
        if isinstance(weight, UninitializedParameter) or weight.dim() == 0:
            return False
        if self.reads_where == "low":
            return True
        if self.reads_where == "low off cpu or transformed" and transformed():
            return True  # torch.func cannot batch the backward of a norm of two dtypes (2.13)
        return (weight.device.type == "cpu") == (self.reads_where == "low on cpu")

    def leaves(self, weight: torch.Tensor) -> bool:
        """Whether `casts` is False for certain, asked quickly: of a norm's weights on a CPU.

        Outside of the transforms of ``torch.func`` only.
        """
        return weight.is_cpu and self.reads_where in _OFF_CPU


def transformed() -> bool:
    """Whether a ``torch.func`` transform, ``grad`` or ``vmap`` say, is under way."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


def plan_of(module: nn.Module) -> LayerPlan | None:
    """Return the plan of a module, ``None`` where no policy was applied to it."""
    return module.__dict__.get(ATTRIBUTE)


def traced() -> bool:
    """Whether ``torch.jit.trace`` is under way, which records even the size of a weight."""
    return torch._C._get_tracing_state() is not None
