"""Skipped steps as they happen: which parameters, and whether it matters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.loss_scale import LossScale
from ...core.numerics.record import MOST_NAMES
from ...core.numerics.skips import SkipHistory, SkipRun, StepOutcome
from ..loss_scaling.history import DeviceReader
from .counting import plain_tensor

Write = Callable[[dict[str, Any]], None]


def not_finite(parameters: list[tuple[str, nn.Parameter]]) -> tuple[list[str], int]:
    """Return the names of those whose gradients are not finite, and how many have one.

    It reads the host: for a step that is known to be bad.
    """
    bad, present = [], 0
    for name, parameter in parameters:
        grad = plain_tensor(parameter.grad)
        if grad is None:
            continue
        present += 1
        if not bool(torch.isfinite(grad).all()):
            bad.append(name)
    return bad, present


class SkipWatch:
    """Writes every step that was skipped, and every run of them when it is over.

    On a CPU two numbers are looked at where they lie, and gradients only after a bad step. On an
    accelerator nothing is known in time, so each step measures which gradients are finite, sends
    that on its way, and what has arrived is written, a few steps late.

    Args:
        parameters: by name, in the order of the model.
        rule: gives the rule of the loss scale.
        write: takes the events.
    """

    def __init__(
        self,
        parameters: list[tuple[str, nn.Parameter]],
        rule: Callable[[], LossScale | None],
        write: Write,
    ) -> None:
        self._parameters = parameters
        self._rule = rule
        self._write = write
        self._history = SkipHistory()
        self._reader: DeviceReader | None = None
        self._scale: float | None = None
        self._sees_loss = False
        self._known: dict[tuple[int, ...], Tensor] = {}
        self.skipped = 0

    def begin(self, scale: Tensor | None) -> None:
        """Take the first scale; this waits for the device, once."""
        self._scale = None if scale is None else float(scale)

    @property
    def scale(self) -> float | None:
        """The newest scale that has reached the host."""
        return self._scale

    def see(self, step: int, found: Tensor, scale: Tensor, loss: Tensor | None) -> None:
        """Take what a step found, the scale after it, and its loss."""
        if found.device.type == "cpu":
            skipped, after = found.item() != 0, scale.item()
            if skipped:
                value = None if loss is None else float(loss.detach().double().mean())
                self._took(step, True, after, value, *not_finite(self._parameters))
            else:
                self._took(step, False, after, None, [], 0)
            return
        self._send(step, found, scale, loss)
        self._receive(wait=False)

    def end(self) -> None:
        """Wait for what is on its way, and write the run of skipped steps that is not over."""
        self._receive(wait=True)
        if self._history.run is not None:
            self._write(_run_event(self._history.run))
            self._history = SkipHistory()

    def _send(self, step: int, found: Tensor, scale: Tensor, loss: Tensor | None) -> None:
        device = found.device
        self._sees_loss = loss is not None
        head = [found, scale, torch.zeros((), device=device) if loss is None else loss.detach()]
        packed = torch.cat(
            [torch.stack([each.to(device).float().mean() for each in head]), self._flags(device)]
        )
        if self._reader is None:
            self._reader = DeviceReader.on(device, len(packed))
        self._reader.send(step, packed)

    def _flags(self, device: torch.device) -> Tensor:
        """1 for each parameter whose gradient is not finite, 0 if it is, -1 without one."""
        flags = torch.full((len(self._parameters),), -1.0, device=device)
        grads = {
            place: grad
            for place, (_, parameter) in enumerate(self._parameters)
            if (grad := plain_tensor(parameter.grad)) is not None and grad.device == device
        }
        if grads:
            norms = torch.stack([n.float() for n in _norms(list(grads.values()))])
            flags[self._places(tuple(grads), device)] = 1 - torch.isfinite(norms).float()
        return flags

    def _places(self, places: tuple[int, ...], device: torch.device) -> Tensor:
        if places not in self._known:  # a copy to the device that is made once, not each step
            self._known[places] = torch.tensor(places, device=device)
        return self._known[places]

    def _receive(self, wait: bool) -> None:
        if self._reader is None:
            return
        for step, (found, scale, loss, *flags) in self._reader.arrived(wait):
            named = zip(self._parameters, flags, strict=True)
            bad = [name for (name, _), flag in named if flag == 1]
            present = sum(flag >= 0 for flag in flags)
            self._took(step, found != 0, scale, loss if self._sees_loss else None, bad, present)

    def _took(
        self, step: int, skipped: bool, after: float, loss: float | None, bad: list[str], of: int
    ) -> None:
        before = after if self._scale is None else self._scale
        self._scale = after
        run = self._history.run
        if not skipped and run is None and before == after:
            if not self._history.ever_finite:
                self._history = SkipHistory(None, True)
            return  # nearly all steps
        rule = self._rule()
        if rule is None:
            return
        self._history = self._history.after(StepOutcome(step, skipped, before, after, loss), rule)
        if skipped:
            self.skipped += 1
            self._write(self._skip_event(before, after, loss, bad, of))
            return
        if run is not None:
            self._write(_run_event(run))
        if before != after:
            self._write({"event": "scale", "step": step, "scale": after})

    def _skip_event(
        self, before: float, after: float, loss: float | None, bad: list[str], of: int
    ) -> dict[str, Any]:
        run = self._history.run
        if run is None:  # not after a skipped step; said for the types
            return {}
        return {
            "event": "skip", "step": run.last, "scale": before, "next_scale": after,
            "in_a_row": run.count, "loss": loss, "parameters": bad[:MOST_NAMES],
            "not_finite": len(bad), "of": of,
            "verdict": run.verdict, "reason": run.reason, "text": run.text,
        }  # fmt: skip


def _norms(grads: list[Tensor]) -> list[Tensor]:
    real = [torch.view_as_real(grad) if grad.is_complex() else grad for grad in grads]
    return list(torch._foreach_norm(real, math.inf))


def _run_event(run: SkipRun) -> dict[str, Any]:
    return {
        "event": "skips", "first": run.first, "last": run.last, "count": run.count,
        "verdict": run.verdict, "reason": run.reason, "text": run.text,
    }  # fmt: skip
