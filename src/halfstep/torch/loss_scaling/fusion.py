"""The fused kernels of torch.optim, which unscale and skip on the device.

Adam, AdamW, SGD and Adagrad with ``fused=True`` take the scale and the skip flag as tensors, so
that a scaled step needs no value on the host. Most optimizers are made without it; a
`FusedSwitch` turns it on for the time that an optimizer is wrapped, and knows what was there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from ..casting import PLAIN
from ..shards import is_dtensor

DEVICES = ("cpu", "cuda", "xpu")
"""Where the fused kernels take a scale and a skip flag."""

_KINDS = (Adam, AdamW, SGD, Adagrad)
_SGD_STEP = inspect.unwrap(SGD.step)
_STEPS = {inspect.unwrap(kind.step) for kind in _KINDS}

Settings = dict[str, Any]


@functools.cache
def _unwrapped(step: Any) -> Any:
    return inspect.unwrap(step)


def own_step(optimizer: Optimizer) -> Any:
    """Return the function that the optimizer's class steps with.

    Unwrapped: torch wraps ``step`` anew in each class, when the first instance of it is made.
    """
    step = type(optimizer).step
    return inspect.unwrap(step) if torch.compiler.is_compiling() else _unwrapped(step)


def is_sgd(optimizer: Optimizer) -> bool:
    """Whether this is SGD with its own ``step``."""
    return own_step(optimizer) is _SGD_STEP


def has_fused_kernels(optimizer: Optimizer) -> bool:
    """Whether this is one of the four, with its own ``step``: a subclass may have replaced it."""
    if torch.compiler.is_compiling():  # Dynamo does not compare functions
        return isinstance(optimizer, _KINDS)
    return own_step(optimizer) in _STEPS


def is_fused(optimizer: Optimizer) -> bool:
    """Whether every group of one of the four runs the fused kernels now."""
    return has_fused_kernels(optimizer) and all(g.get("fused") for g in optimizer.param_groups)


_checked: WeakKeyDictionary[Optimizer, list[tuple[int, tuple[int, ...]]]] = WeakKeyDictionary()
"""The parameters, by identity and strides, whose state was seen to lie in memory as they do."""


def layouts_fit(optimizer: Optimizer) -> bool:
    """Whether every parameter that has a gradient lies in memory as its gradient and state do.

    The fused kernels walk them all as flat memory, whatever their strides: a contiguous state
    beside a channels-last weight has the wrong elements updated on a CPU, without a word, and is an
    error on a GPU (torch 2.13). The other kernels of torch.optim take any layout.
    """
    parameters = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    strides = [parameter.stride() for parameter in parameters]
    if strides != [parameter.grad.stride() for parameter in parameters] and not all(
        _lie_alike(parameter, parameter.grad) for parameter in parameters
    ):
        return False
    now = list(zip(map(id, parameters), strides, strict=True))
    known = _checked.get(optimizer)
    if known != now:
        if not all(_fits_its_state(optimizer, parameter) for parameter in parameters):
            return False
        if known is None:
            optimizer.register_load_state_dict_post_hook(_forget_layouts)
        _checked[optimizer] = now
    return True


def _forget_layouts(optimizer: Optimizer) -> None:
    _checked[optimizer] = []  # what was loaded has the layout that it was saved in


def _fits_its_state(optimizer: Optimizer, parameter: Tensor) -> bool:
    # only of a tensor without gaps and overlaps is the copy laid out as it is
    dense = torch.empty_like(parameter, device="meta")
    kept = [
        value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor)
    ]
    return all(
        _lie_alike(parameter, value) for value in (dense, *kept) if value.shape == parameter.shape
    )


def _lie_alike(one: Tensor, other: Tensor) -> bool:
    # where a dimension has one element, its stride says nothing
    pairs = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(a == b for size, a, b in pairs if size > 1)


@contextmanager
def unfused(optimizer: Optimizer) -> Iterator[None]:
    """Run the plain kernels inside a ``with`` block; counters stay where they are."""
    groups = optimizer.param_groups
    settings = [_settings(group) for group in groups]
    for group in groups:
        group.update(fused=False, foreach=None)
    try:
        yield
    finally:
        for group, setting in zip(groups, settings, strict=True):
            group.update(setting)


class FusedSwitch:
    """Turns ``fused=True`` on in an optimizer's groups, and off again.

    Args:
        optimizer: any; one without fused kernels is left alone.
        before: the settings that were changed already, in the optimizer that this is a copy of.
        wanted: whether anything is to be turned on at all.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before: list[Settings | None] | None = None,
        wanted: bool = True,
    ) -> None:
        self._optimizer = optimizer
        self._wanted = wanted
        self.before: list[Settings | None] = list(before or [])
        self._sparse = False
        self._seen: tuple[torch.device, type] | None = None

    def turn_on(self) -> None:
        """Turn the fused kernels on if all groups allow it; else leave all groups as they were.

        All or none: the other kernels refuse to run beside a skip flag.
        """
        groups = self._optimizer.param_groups
        self._seen = self._first()
        if self._sparse or not self._wanted or not _allows_fused(self._optimizer):
            self.turn_off()
            return
        self.before += [None] * (len(groups) - len(self.before))
        for place, group in enumerate(groups):
            if not group.get("fused"):
                self.before[place] = _settings(group)
                group.update(fused=True, foreach=False)
                self._move_steps(group, None)

    def turn_off(self) -> None:
        """Give the groups that were changed their own settings back."""
        for group, before in zip(self._optimizer.param_groups, self.before, strict=False):
            if before is not None:
                group.update(before)
                if not group.get("capturable"):
                    self._move_steps(group, torch.device("cpu"))
        self.before = []

    def follow(self, sparse: bool) -> None:
        """Look again: parameters may have moved or been filled in, gradients may be sparse."""
        if sparse and not self._sparse:
            self._sparse = True
            self.turn_off()
        elif self._seen != self._first():
            self.turn_on()

    def forget(self) -> None:
        """The groups were replaced by others (a loaded state): nothing was changed in these."""
        self.before = []

    def honest(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict of the optimizer as it was before anything was turned on."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        state = dict(state_dict["state"])
        for group, before in zip(groups, self.before, strict=False):
            if before is None:
                continue
            group.update(before)
            if not group.get("capturable"):
                _steps_to_cpu(state, group["params"])
        return {**state_dict, "state": state, "param_groups": groups}

    def _first(self) -> tuple[torch.device, type] | None:
        groups = self._optimizer.param_groups
        return next(((p.device, type(p)) for group in groups for p in group["params"]), None)

    def _move_steps(self, group: dict[str, Any], device: torch.device | None) -> None:
        for parameter in group["params"]:
            state = self._optimizer.state.get(parameter)
            if state and isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(device or parameter.device, torch.float32)


def _settings(group: dict[str, Any]) -> Settings:
    return {key: group.get(key) for key in ("fused", "foreach")}


def _allows_fused(optimizer: Optimizer) -> bool:
    groups = optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    kinds = {parameter.device.type for parameter in parameters}
    return (
        has_fused_kernels(optimizer)
        and not any(group.get("differentiable") for group in groups)
        # one kind: a flag that travels to the CPU would have to be waited for
        and len(kinds) == 1
        and kinds <= set(DEVICES)
        # a step of DTensors is one of their shards: see `shard_lending`
        and all((type(p) in PLAIN or is_dtensor(p)) and p.is_floating_point() for p in parameters)
    )


def _steps_to_cpu(state: dict[Any, Any], keys: list[Any]) -> None:
    # one copy for all counters of a device, not one for each
    by_device: dict[torch.device, list[Any]] = {}
    for key in keys:
        step = state.get(key, {}).get("step")
        if isinstance(step, Tensor) and step.device.type != "cpu":
            by_device.setdefault(step.device, []).append(key)
    for owners in by_device.values():
        steps = torch.stack([state[key]["step"] for key in owners]).cpu()
        for key, step in zip(owners, steps.unbind(), strict=True):
            state[key] = {**state[key], "step": step.clone()}


def late_momentum(optimizer: Optimizer) -> bool:
    """Give SGD's parameters the momentum buffers they lack; say whether some must wait.

    Fused SGD allocates a buffer with ``empty_like`` on the first step, and leaves that memory as
    it is where the step is skipped: the next step would start from garbage. Zeros are what the
    first step amounts to without dampening. With dampening the first buffer is the whole
    gradient, which no starting value gives: such a step is taken without the fused kernels.
    """
    waiting = False
    for group in optimizer.param_groups:
        if not group.get("momentum"):
            continue
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is not None:
                continue
            if group["dampening"]:
                waiting = True
            else:
                state["momentum_buffer"] = torch.zeros_like(parameter)
    return waiting
