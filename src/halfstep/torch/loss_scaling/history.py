"""What the loss scale did, read from the device without ever waiting for it.

A CPU tensor is read where it lies. From any other device the state is copied into pinned memory
behind an event, and looked at once the event has passed: a few steps later, for free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.loss_scale import LossScale, LossScaleState

KEPT_EVENTS = 4096
"""The newest events that a history keeps: a run that skips for ever must not fill the memory."""

_SLOTS = 64


class ScaleEvent(NamedTuple):
    """A step that was skipped, or that changed the scale, or both.

    Attributes:
        step: which call of ``step()``, counted from 1.
        scale: the scale after it.
        skipped: whether the parameters stayed as they were.
    """

    step: int
    scale: float
    skipped: bool


Row = list[float]


class _HostReader:
    """Reads a CPU tensor where it lies: no copy, no dispatch, no `item()`."""

    def send(self, step: int, packed: Tensor) -> None:
        self._arrived: tuple[int, Row] = (step, packed.tolist())

    def arrived(self, wait: bool) -> Iterator[tuple[int, Row]]:
        yield self._arrived


class DeviceReader:
    """Copies the state into pinned memory behind an event and looks when the event has passed.

    Args:
        slots: pinned memory of shape (n, width), a row for each state that is on its way.
        mark: makes an event that passes when what was asked of the device so far is done.
    """

    def __init__(self, slots: Tensor, mark: Callable[[], Any]) -> None:
        self._slots = slots
        self._mark = mark
        self._free = deque(range(len(slots)))
        self._sent: deque[tuple[int, int, Any]] = deque()

    @classmethod
    def on(cls, device: torch.device, width: int = 4) -> DeviceReader:
        """Return a reader of float32 tensors of shape (width,) on ``device``."""
        module = torch.get_device_module(device)

        def mark() -> Any:
            event = module.Event()
            event.record(module.current_stream(device))
            return event

        return cls(torch.empty(_SLOTS, width, pin_memory=True), mark)

    def send(self, step: int, packed: Tensor) -> None:
        """Send a tensor of shape (width,) on its way, unless all slots are."""
        if not self._free:
            return  # that far behind: leave this one out rather than wait; counts are cumulative
        slot = self._free.popleft()
        self._slots[slot].copy_(packed, non_blocking=True)
        self._sent.append((step, slot, self._mark()))

    def arrived(self, wait: bool) -> Iterator[tuple[int, Row]]:
        """Yield the steps and values that are here; ``wait`` for all of them."""
        while self._sent and (wait or self._sent[0][2].query()):
            step, slot, event = self._sent.popleft()
            event.synchronize()
            row: Row = self._slots[slot].numpy().tolist()
            self._free.append(slot)
            yield step, row


class GraphLog:
    """What is written down of steps that the host does not take part in, on the device.

    A compiled step and one that a CUDA graph replays write here, and the host looks when it is
    asked to: nothing is read, no number of the host takes part, and so nothing is compiled anew.

    Args:
        device: where the state of the scale lies.
    """

    def __init__(self, device: torch.device) -> None:
        self.used = False
        self._replayed = False
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # steps, events
        self.steps = torch.zeros(KEPT_EVENTS, dtype=torch.int64, device=device)
        self.rows = torch.zeros(KEPT_EVENTS, 2, device=device)  # scale, skipped

    def write(self, before: Tensor, after: Tensor) -> None:
        """Count a step, and write it down if it was skipped or changed the scale.

        Args:
            before: the packed state before the step.
            after: the packed state after it.
        """
        self.used = True
        if not torch.compiler.is_compiling():
            self._replayed = True  # by a CUDA graph from now on, and the host is not told when
        skipped = after[3] > before[3]
        happened = skipped | (after[0] != before[0])
        place = (self.counts[1] % KEPT_EVENTS).reshape(1)
        self.counts.add_(torch.stack([torch.ones_like(happened), happened]))
        row = torch.stack([after[0], skipped.to(after.dtype)])
        for kept, new in ((self.steps, self.counts[0]), (self.rows, row)):
            kept.index_copy_(0, place, torch.where(happened, new, kept.index_select(0, place)))

    def take(self) -> tuple[int, list[ScaleEvent]]:
        """Return how many steps were taken and their events, and begin anew. It reads the host."""
        steps, events = self.counts.tolist()
        kept = min(events, KEPT_EVENTS)
        places = [place % KEPT_EVENTS for place in range(events - kept, events)]
        numbers, rows = self.steps[places].tolist(), self.rows[places].tolist()
        self.counts.zero_()
        self.used = self._replayed
        found = [
            ScaleEvent(number, scale, bool(skipped))
            for number, (scale, skipped) in zip(numbers, rows, strict=True)
        ]
        return steps, found


class History:
    """The events of a run, and the newest state that has reached the host."""

    def __init__(self, first: LossScaleState, events: Iterable[ScaleEvent] = ()) -> None:
        self.events: deque[ScaleEvent] = deque(events, maxlen=KEPT_EVENTS)
        self._last = first
        self._reader: _HostReader | DeviceReader | None = None
        self._device: torch.device | None = None
        self._log: GraphLog | None = None

    def record_in_graph(self, before: Tensor, after: Tensor) -> None:
        """Write down on the device what a step did to the state; nothing is read."""
        if self._log is None:
            self._log = GraphLog(after.device)
        self._log.write(before, after)

    def catch_up(self, steps: int, packed: Tensor | None) -> int:
        """Take over what happened in graphs; return the count of steps after it.

        It reads the host, if there ever was such a step.

        Args:
            steps: how many steps there were before them.
            packed: the state as it is now.
        """
        if self._log is None or not self._log.used or packed is None:
            return steps
        self.drain()
        taken, events = self._log.take()
        self.events.extend(event._replace(step=steps + event.step) for event in events)
        if taken:
            self._last = LossScaleState(*packed.tolist())
        return steps + taken

    def record(self, step: int, packed: Tensor) -> list[LossScaleState]:
        """Send the state after ``step`` on its way; return the states that have arrived."""
        if self._reader is None or packed.device != self._device:
            self._device = packed.device
            on_host = packed.device.type == "cpu"
            self._reader = _HostReader() if on_host else DeviceReader.on(packed.device)
            if not on_host:  # memory that is made while a CUDA graph is captured is the graph's
                self._log = GraphLog(packed.device)
        self._reader.send(step, packed)
        return self._receive(wait=False)

    def drain(self) -> None:
        """Wait for every state that is on its way."""
        if isinstance(self._reader, DeviceReader):
            self._receive(wait=True)

    def _receive(self, wait: bool) -> list[LossScaleState]:
        if self._reader is None:
            return []
        rows = []
        for step, values in self._reader.arrived(wait):
            row = LossScaleState(*values)
            skipped = row.skipped_steps > self._last.skipped_steps
            if skipped or row.scale != self._last.scale:
                self.events.append(ScaleEvent(step, row.scale, skipped))
            self._last = row
            rows.append(row)
        return rows


def exhausted_message(rule: LossScale, row: LossScaleState, blamed: str) -> str:
    """Return what `LossScaleExhausted` says: what is known, and what it means."""
    floor = getattr(rule, "min_scale", rule.first_scale)
    return (
        f"The loss scale is {row.scale:g}, its floor is {floor:g}, and the gradients of the last "
        f"{int(row.bad_steps)} steps in a row were not finite. A smaller scale cannot help: this "
        "is not a scaling problem. Look at the data, the learning rate and the loss itself. "
        f"Not finite last: {blamed}."
    )
