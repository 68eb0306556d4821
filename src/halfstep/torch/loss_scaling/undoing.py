"""Skipping a step of any optimizer on the device: it steps, and what it did is taken back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from ...errors import LossScaleError, LossScaleWarning
from .changing import Change, Inside
from .choosing import Copies, chosen, is_plain, plain_tensors
from .fusion import is_fused
from .history import DeviceReader

Where = Literal["auto", "device", "host"]
"""Where a step is skipped: see :class:`~halfstep.torch.LossScaleOptimizer`."""


class Undo:
    """Steps an optimizer and takes back on the device what it did, where the step is skipped.

    ::

        copies                = parameters, state           # grouped copies
        optimizer.step()
        parameters, state     = copies where found, what they are elsewhere    # grouped too

    Some things cannot be chosen there: Python numbers, counters in CPU tensors beside parameters
    on a device, sparse state, state that the step made. They are *settled* as the next step
    begins, by the flag of this one, which was sent to the host behind an event. By then the
    device has a whole forward and backward pass to do, so that it waits for nothing; the host
    waits until it is no more than a step ahead.

    Args:
        where: the ``skip`` of a `LossScaleOptimizer`.
    """

    def __init__(self, where: Where) -> None:
        self.where = where
        self._flag = _Flag()
        self._pending: list[Callable[[], None]] = []
        self._refused = False
        self._hooked = False

    @property
    def by_kernels(self) -> bool:
        """Whether the optimizer's own kernels may unscale and skip."""
        return self.where != "host"

    def inside(self, optimizer: Optimizer, found: Tensor) -> Inside | None:
        """Return what a step may change, if it is to be taken back on the device.

        None: the flag is to be read on the host, and the step left out.
        """
        wanted = self.where == "device"
        if self.where == "auto":
            # of the fused ones few get here: SGD's first step with dampening
            wanted = is_fused(optimizer)
        if not wanted and not _captured_on(found.device):
            return None
        if self._refused or any(group.get("differentiable") for group in optimizer.param_groups):
            return None
        inside = Inside(optimizer)
        if inside.unknown is not None:
            self._refuse(optimizer, inside.unknown)
            return None
        # a parameter is read by the next forward pass, before anything is settled
        return inside if all(_reached(p, found) for p in inside.parameters.values()) else None

    def _refuse(self, optimizer: Optimizer, unknown: str) -> None:
        self._refused = True
        warnings.warn(
            f"skip='device': {type(optimizer).__name__} keeps {unknown}, and what a skipped step "
            "does to that cannot be taken back. Every step reads one flag on the host from now "
            "on, as with skip='host'.",
            LossScaleWarning,
            stacklevel=2,
        )

    def step(
        self, optimizer: Optimizer, inside: Inside, found: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Step, and take the step back where ``found`` is 1.0."""
        before = _Before(inside, found)
        try:
            with _hooks_see_the_choice(optimizer, before):
                result = optimizer.step(*args, **kwargs)
        except Exception:
            # linear algebra raises on gradients that are not finite, in a step that is skipped
            if _captured_on(found.device) or not found.item() > 0:
                raise
            for undo in before.choose():
                undo()
            return None
        self._settle_later(optimizer, before.choose(), found)
        if inside.removed():
            self.settled()  # under the keys of this step: see `changing.Made`
        return result

    def _settle_later(
        self, optimizer: Optimizer, left: list[Callable[[], None]], found: Tensor
    ) -> None:
        if not left:
            return
        if _captured_on(found.device):
            raise LossScaleError(
                f"A step of {type(optimizer).__name__} made state, or changed values on the host, "
                "while a CUDA graph was captured: a replay repeats neither. Take a step before, "
                "and give the optimizer capturable=True if it takes that."
            )
        if not self._pending:
            self._flag.send(found)
        self._pending += left
        if not self._hooked:
            optimizer.register_state_dict_pre_hook(self._before_state_dict)
            self._hooked = True

    def _before_state_dict(self, _: Optimizer) -> None:
        self.settled()

    def settled(self) -> Undo:
        """Put back on the host what the last step changed there, if it was skipped; return self.

        Waits until the device has judged that step, and only if there is something to settle.

        Raises:
            LossScaleError: inside ``torch.compile`` or the capture of a CUDA graph.
        """
        if not self._pending:
            return self
        if torch.compiler.is_compiling() or _captured_on(self._flag.device):
            raise LossScaleError(
                "The last step made state, or changed values on the host, and whether it was "
                "skipped cannot be asked inside torch.compile or the capture of a CUDA graph. "
                "Look at optimizer.last_step_skipped once before."
            )
        pending, self._pending = self._pending, []
        if self._flag.read():
            for undo in pending:
                undo()
        return self


class _Before:
    """What there was before a step."""

    def __init__(self, inside: Inside, found: Tensor) -> None:
        self._inside = inside
        self._found = found
        every = [*inside.parameters.values(), *inside.tensors.values()]
        parts = {id(part): part for tensor in every for part in plain_tensors(tensor)}.values()
        far = {id(part) for part in parts if not _reached(part, found)}
        self._copies = Copies(part for part in parts if id(part) not in far)
        self._far = [(part, part.detach().clone()) for part in parts if id(part) in far]

    def choose_tensors(self) -> None:
        """Choose in place, for somebody who looks before the choice is made for good."""
        self._copies.choose(self._found, again=True)

    def choose(self) -> list[Callable[[], None]]:
        """Choose on the device; return what is left to undo on the host if the step is skipped."""
        self._copies.choose(self._found)
        left: list[Callable[[], None]] = []
        replaced: dict[tuple[int, int], Tensor] = {}
        for change in list(self._inside.changes()):
            if self._may_choose(change):
                both = id(change.old), id(change.new)
                if both not in replaced:
                    replaced[both] = chosen(self._found, change.old, change.new)
                change.container[change.key] = replaced[both]
            else:
                left.append(change.undo)
        return left + [partial(_put_back, part, copy, part._version) for part, copy in self._far]

    def _may_choose(self, change: Change) -> bool:
        old, new, own = change.old, change.new, self._inside.parameters
        return (
            isinstance(old, Tensor)
            and isinstance(new, Tensor)
            and is_plain(old)
            and is_plain(new)
            and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
            and _reached(new, self._found)
            and id(old) not in own
            and id(new) not in own
        )


class _Flag:
    """Carries one flag at a time to the host."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._reader: DeviceReader | None = None
        self._value = 0.0

    def send(self, found: Tensor) -> None:
        """Send it on its way."""
        if self.device != found.device:
            self.device = found.device
            self._reader = None if found.device.type == "cpu" else DeviceReader.on(found.device, 1)
        if self._reader is None:
            self._value = float(found.detach().numpy())
        else:
            self._reader.send(0, found)

    def read(self) -> bool:
        """Return it; waits until it is here."""
        for _, (value,) in () if self._reader is None else self._reader.arrived(wait=True):
            self._value = value
        return self._value > 0


def _put_back(tensor: Tensor, value: Tensor, version: int) -> None:
    if tensor._version == version:  # nobody has written to it since
        tensor.copy_(value)


def _reached(tensor: Tensor, found: Tensor) -> bool:
    """Whether a choice by ``found`` can be made where the tensor lies, without waiting.

    Not in the sparse momentum that SGD makes of sparse gradients: it has other indices each step.
    """
    return (not tensor.is_cpu or found.is_cpu) and tensor.layout is torch.strided


def _captured_on(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextmanager
def _hooks_see_the_choice(optimizer: Optimizer, before: _Before) -> Iterator[None]:
    """Let hooks that follow the step (averages of weights) see no value that is taken back."""
    hooks: Any = optimizer._optimizer_step_post_hooks
    if not hooks and not torch_optimizer._global_optimizer_post_hooks:
        yield
        return
    handle = optimizer.register_step_post_hook(lambda *_: before.choose_tensors())
    hooks.move_to_end(handle.id, last=False)
    try:
        yield
    finally:
        handle.remove()
