"""Running a forward under a plan, and what the module reads of its weights meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..errors import PolicyError, PolicyWarning
from . import replicas
from .casting import LOW, cast_nested
from .copies import WeightCopies, calls, copies_for, entry_of, is_selective
from .plan import LayerPlan, plan_of, traced
from .region import leave
from .rules import PARAMETERS
from .sharding import Recasts, is_sharded

Forward = Callable[..., Any]


def read(module: nn.Module, value: Any) -> Any:
    """Return a module's tensor: in the compute dtype inside its own forward, else as it is."""
    plan = plan_of(module)
    stack = calls.stack
    # what is called by itself, and reads its own weight, is nearly all that comes here
    known = stack and stack[-1] is module
    if value is None or plan is None or not (known or inside(module)):
        return value
    region = plan.region
    if region is not None and region.dtype is not None and not _autocasts(value):
        return value  # the module's own forward has switched autocast off around this
    cached = not torch.compiler.is_compiling() and not is_selective()
    copies = calls.copies if cached else None
    if copies is not None:
        return copied(module, plan, copies, value)
    return value.to(plan.compute) if plan.casts(value) else value


def copied(module: nn.Module, plan: LayerPlan, copies: WeightCopies, value: torch.Tensor) -> Any:
    """Return a module's tensor in its compute dtype, once for all its readings in this call."""
    low = copies.made(value, plan.compute)  # first: it answers most readings
    if low is not None:
        return low
    if not plan.casts(value):
        return value
    # what a parametrization or a hook computed is nobody's to free
    gathered = is_sharded(module) and isinstance(value, nn.Parameter)
    return _recast(copies, value, plan) if gathered else copies.make(value, plan.compute)


def _recast(copies: WeightCopies, value: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    """Return a copy of a weight that FSDP2 has gathered: used once, and kept by nobody."""
    recasts = calls.recasts
    if recasts is None:
        copies.outdate()
        return value.to(plan.compute)
    return recasts.make(value, plan.compute)


def _autocasts(value: torch.Tensor) -> bool:
    device = value.device.type
    known = torch.compiler.is_compiling() or device in calls.devices
    return not known or torch.is_autocast_enabled(device)


def inside(module: nn.Module) -> bool:
    """Whether this thread is in the forward of ``module``, or of the parent that acts for it."""
    stack = calls.stack
    if not stack:
        return _recomputing()
    innermost = stack[-1]
    if innermost is module:
        return True
    acting, own = plan_of(innermost), plan_of(module)
    if acting is None or own is None or not (acting.covers or own.rule == PARAMETERS.name):
        return False
    near = any(child is module for child in innermost._modules.values())
    return near or any(below is module for below in innermost.modules())


def _recomputing() -> bool:
    """Whether activation checkpointing runs a piece of some forward again.

    It does so in the middle of a backward pass with gradients enabled, which hooks on gradients
    do not have; what that piece reads must be what it read the first time.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()


def run(forward: Forward, self: nn.Module, plan: LayerPlan, args: Any, kwargs: Any) -> Any:
    """Call ``forward`` in the midst of a model, with autocast as the plan wants it."""
    saved = plan.region.enter(calls.devices) if plan.region is not None else None
    calls.stack.append(self)
    try:
        return forward(self, *args, **kwargs)
    except RuntimeError as error:
        explain(error, plan)
        raise
    finally:
        calls.stack.pop()
        if saved is not None:
            leave(saved)


def run_outermost(
    forward: Forward, self: nn.Module, plan: LayerPlan, args: Any, kwargs: Any
) -> Any:
    """Call ``forward`` of a module that was called from outside, with copies for that call."""
    entry = entry_of(self)
    ddp = replicas.active()
    if ddp is not None and not traced():
        replicas.settle(ddp)
    watch = self.training not in entry.watched and not traced()
    copies = copies_for(self, entry, watch)
    calls.copies, calls.devices = copies, entry.devices or _devices_among(args, kwargs)
    try:
        way = _call_sharded if entry.sharded else run
        result = way(forward, self, plan, args, kwargs)
    finally:
        calls.copies = None
    if not traced():
        _refuse_writes(self, copies.written_in_place())
    if watch and copies.watches:
        _refuse_writes(self, copies.written_to())
        _check_loss(self, plan, result)
        entry.watched.add(self.training)
    return result


def _devices_among(*arguments: Any) -> tuple[str, ...]:
    """Where the tensors of a call lie: the only sign of a module without weights, or a replica."""
    leaves = tree_leaves(arguments)
    types = dict.fromkeys(leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor))
    return tuple(kind for kind in types if torch.amp.is_autocast_available(kind))


def _call_sharded(
    forward: Forward, self: nn.Module, plan: LayerPlan, args: Any, kwargs: Any
) -> Any:
    calls.recasts = Recasts()
    try:
        with calls.recasts.hooks():
            return run(forward, self, plan, args, kwargs)
    finally:
        calls.recasts = None


def _refuse_writes(model: nn.Module, weights: list[torch.Tensor]) -> None:
    """Raise if a layer changed weights in its forward: the change went to copies."""
    if not weights:
        return
    written = set(map(id, weights))
    names = [name for name, weight in model.named_parameters() if id(weight) in written]
    raise PolicyError(
        f"The forward of this {type(model).__name__} changes {', '.join(names)}, but what it "
        "sees there is a 16-bit copy: the weight itself would stay as it is. Give the layer the "
        "policy 'float32' (overrides={'<path>': 'float32'}), or change the weight outside of "
        "forward."
    )


def _check_loss(model: nn.Module, plan: LayerPlan, result: Any) -> None:
    """Warn of a loss that the model computed itself, in 16 bits: its cast to float32 is late."""
    if plan.path or plan.functional != "compute":
        return
    found: list[torch.Tensor] = []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 and tensor.dtype in LOW and tensor.requires_grad:
            found.append(tensor)
        return tensor

    cast_nested(result, look)
    if found:
        warnings.warn(
            f"This {type(model).__name__} returns a scalar in {found[0].dtype} that requires grad: "
            "a loss, computed in 16 bits. Compute it outside of the model, from outputs in "
            "float32, or use functional='autocast'.",
            PolicyWarning,
            stacklevel=6,
        )


def run_compiling(
    forward: Forward, self: nn.Module, plan: LayerPlan, args: Any, kwargs: Any
) -> Any:
    """Call ``forward`` while Dynamo traces it."""
    quietly = getattr(torch._dynamo.utils, _QUIETLY, _directly)
    quietly(_push, self)
    try:
        if plan.region is None:
            return forward(self, *args, **kwargs)
        # one without weights goes by the model's
        with plan.region.context(self_device(self, calls.stack[0])):
            return forward(self, *args, **kwargs)
    finally:
        quietly(_pop)


# Dynamo refuses side effects inside of a checkpointed function; these two undo each other.
_QUIETLY = "_disable_side_effect_safety_checks_for_current_subtracer"


def _directly(function: Callable[..., None], *args: Any) -> None:
    function(*args)


def _push(module: nn.Module) -> None:
    calls.stack.append(module)


def _pop() -> None:
    calls.stack.pop()


_TWO_DTYPES = (
    "same dtype", "same scalar type", "expected scalar type", "dtypes match", "mixed dtype",
    "to have the same type", "should be the same",
)  # fmt: skip
"""What torch says, here and there, when two dtypes meet in one operation."""


def explain(error: RuntimeError, plan: LayerPlan) -> None:
    """Add to torch's complaint about two dtypes where they met and what helps."""
    mixed = any(words in str(error) for words in _TWO_DTYPES)
    if not mixed or getattr(error, "__notes__", None):
        return
    advice = (
        "keep what this module makes itself in its inputs' dtype, give it a policy of its own, "
        "or use functional='autocast'"
        if plan.functional == "compute"
        else "cast one of them, or give this module a policy of its own"
    )
    error.add_note(
        f"halfstep: two dtypes met in {plan.path or 'the model'!r}, which computes in "
        f"{plan.policy.compute_dtype}: {advice}."
    )


def self_device(*modules: nn.Module) -> str:
    """Return the type of device of the first parameter in these modules, ``"cpu"`` without any."""
    for module in modules:
        for parameter in module.parameters():
            return parameter.device.type
    return "cpu"
