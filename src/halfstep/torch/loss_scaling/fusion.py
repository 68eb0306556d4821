"""The fused kernels of torch.optim, which unscale and skip on the device.

Adam, AdamW, SGD and Adagrad with ``fused=True`` take the scale and the skip flag as tensors, so
that a scaled step needs no value on the host. Most optimizers are made without it; a
`FusedSwitch` turns it on for the time that an optimizer is wrapped, and knows what was there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

DEVICES = ("cpu", "cuda", "xpu")
"""Where the fused kernels take a scale and a skip flag."""

_STEPS = (Adam.step, AdamW.step, SGD.step, Adagrad.step)
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


class FusedSwitch:
    """Turns ``fused=True`` on in an optimizer's groups, and off again.

    Attributes:
        on: whether every group runs the fused kernels now.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._before: list[dict[str, Any] | None] = []
        self.on = False

    @property
    def known(self) -> bool:
        """Whether the optimizer is one of those with fused kernels, with its own ``step``."""
        return type(self._optimizer).step in _STEPS

    @property
    def before(self) -> list[dict[str, Any] | None]:
        """The settings that were changed, by group; None where none were."""
        return self._before

    def turn_on(self, before: list[dict[str, Any] | None] | None = None) -> None:
        """Turn the fused kernels on if all groups allow it; else leave all groups as they were.

        All or none: the other kernels refuse to run beside a skip flag.

        Args:
            before: what was changed already, in a copy of another optimizer.
        """
        if before is not None:
            self._before = list(before)
        groups = self._optimizer.param_groups
        if not self.known or not all(_allows(group) for group in groups):
            self.turn_off()
            return
        self._before += [None] * (len(groups) - len(self._before))
        for place, group in enumerate(groups):
            if not group.get("fused"):
                self._before[place] = {key: group.get(key) for key in ("fused", "foreach")}
                group.update(fused=True, foreach=False)
                self._move_steps(group)
        self.on = True

    def turn_off(self) -> None:
        """Give the groups that were changed their own settings back."""
        for group, before in zip(self._optimizer.param_groups, self._before, strict=False):
            if before is not None:
                group.update(before)
                if not group.get("capturable"):
                    self._move_steps(group, torch.device("cpu"))
        self._before = []
        self.on = False

    def forget(self) -> None:
        """The groups were replaced by others (a loaded state): nothing was changed in these."""
        self._before = []
        self.on = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run the kernels that are not fused inside a ``with`` block (SGD: it has no counter)."""
        groups = self._optimizer.param_groups
        settings = [{key: group.get(key) for key in ("fused", "foreach")} for group in groups]
        for group in groups:
            group.update(fused=False, foreach=None)
        try:
            yield
        finally:
            for group, setting in zip(groups, settings, strict=True):
                group.update(setting)

    def honest(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict of the optimizer as it was before anything was turned on."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        state = dict(state_dict["state"])
        for group, before in zip(groups, self._before, strict=False):
            if before is None:
                continue
            group.update(before)
            if not group.get("capturable"):
                _steps_to_cpu(state, group["params"])
        return {**state_dict, "state": state, "param_groups": groups}

    def _move_steps(self, group: dict[str, Any], device: torch.device | None = None) -> None:
        for parameter in group["params"]:
            state = self._optimizer.state.get(parameter)
            if state and isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(device or parameter.device, torch.float32)


def _allows(group: dict[str, Any]) -> bool:
    return not group.get("differentiable") and all(
        type(parameter) in _PLAIN_TENSORS
        and parameter.device.type in DEVICES
        and parameter.is_floating_point()
        for parameter in group["params"]
    )


def _steps_to_cpu(state: dict[Any, Any], keys: list[Any]) -> None:
    # one copy for all counters of a device, not one for each
    moving = [key for key in keys if _on_device(state.get(key))]
    by_device: dict[torch.device, list[Any]] = {}
    for key in moving:
        by_device.setdefault(state[key]["step"].device, []).append(key)
    for owners in by_device.values():
        steps = torch.stack([state[key]["step"] for key in owners]).cpu()
        for key, step in zip(owners, steps.unbind(), strict=True):
            state[key] = {**state[key], "step": step.clone()}


def _on_device(entry: dict[str, Any] | None) -> bool:
    step = entry.get("step") if entry else None
    return isinstance(step, Tensor) and step.device.type != "cpu"


def late_momentum(optimizer: Optimizer) -> bool:
    """Give SGD's parameters the momentum buffers they lack; say whether some must wait.

    Fused SGD allocates a buffer with ``empty_like`` on the first step, and leaves that memory as
    it is where the step is skipped: the next step would start from garbage. Zeros are what the
    first step amounts to without dampening. With dampening the first buffer is the whole
    gradient, which no starting value gives: such a step reads the flag instead.
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
