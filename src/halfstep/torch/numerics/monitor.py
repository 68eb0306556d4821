"""Watching the numbers of a training run."""

from __future__ import annotations

import contextlib
import os
import time
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...core.loss_scale import LossScale
from ...core.numerics.advice import LossScaleAdvice, advise_loss_scale
from ...core.numerics.bins import is_power_of_two
from ...core.numerics.histogram import ExponentHistogram
from ...core.numerics.record import KIND
from ...core.record import RecordWriter
from ...errors import PolicyError
from ..eager import eagerly
from . import describe
from .hooks import StepHooks
from .recording import Recording, StepNumbers
from .skipping import SkipWatch, not_finite
from .steps import only_powers_of_two, steps_of
from .targets import Choice, choose, parameter_names, unwrapped
from .tensorboard import Board, SummaryWriter

_GRADIENTS = ("activation_gradient", "weight_gradient")


class NumericsMonitor:
    r"""Record what the numbers of a training run look like, and what its loss scale does.

    ::

        steps 1, 1 + every, 1 + 2 * every, ...:
            before it    install hooks
            during it    count activations, their gradients, weights, their gradients and updates,
                         by exponent, on the device
            after it     remove the hooks, read the counts once, write them
        every step:
            if it was skipped: write the parameters whose gradients were not finite,
                               and whether that was a probe of the loss scale or a fault

    Between two recorded steps nothing is installed but what tells where a step ends. What is
    counted is exact; nothing is sampled, and the run's own numbers stay as they are.

    Use it as a context manager, or with `attach` and `detach`. The record is JSON Lines, one event
    a line, flushed as it happens (:mod:`halfstep.core.numerics.record`).

    Args:
        model: any ``nn.Module``, with or without a policy, in DDP or compiled. In a recorded step a
            compiled model runs eagerly, since hooks that come later are not in its program.
        optimizer: what ends a step: an optimizer, a :class:`~halfstep.torch.LossScaleOptimizer`,
            or the ``GradScaler`` (of torch or of this library) whose ``update`` does. Without one
            each forward of the model with gradients enabled begins a step.
        every: how many steps from one recorded step to the next.
        record: the file to write, or None for none. Of several ranks (``torch.distributed``) only
            the first one watches, unless ``"{rank}"`` is in the path.
        modules: which modules to watch: paths or regular expressions, which cover what lies below
            them, or a function of path and module. Left out, all that own parameters, and
            softmax, normalisation and attention modules.
        writer: a TensorBoard ``SummaryWriter`` that gets the same, or None.

    Raises:
        PolicyError: arguments that do not fit, or modules that are not there.
        RecordError: a path that cannot be written (in `attach`).

    >>> import tempfile
    >>> from halfstep.core.record import read_record
    >>> from halfstep.torch import LossScaleOptimizer
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    >>> optimizer = LossScaleOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    >>> path = tempfile.mkdtemp() + "/run.jsonl"
    >>> with NumericsMonitor(model, optimizer, every=2, record=path):
    ...     for step in range(3):
    ...         optimizer.zero_grad()
    ...         optimizer.backward(model(torch.randn(2, 4)).square().mean())
    ...         optimizer.step()
    >>> [event["step"] for event in read_record(path).events if event["event"] == "numerics"]
    [1, 3]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | torch.amp.GradScaler | None = None,
        every: int = 100,
        record: str | os.PathLike[str] | None = "run.jsonl",
        *,
        modules: Choice = None,
        writer: SummaryWriter | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise PolicyError(
                f"NumericsMonitor: the model must be an nn.Module, not {type(model)}."
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise PolicyError(f"NumericsMonitor(every={every!r}): it must be a whole number >= 1.")
        self.every = every
        self._called = model
        self._model = unwrapped(model)
        self._targets = choose(self._model, modules)
        self._source = steps_of(model, optimizer)
        self._path = None if record is None else os.fspath(record)
        self._board = None if writer is None else Board(writer)
        self._attached = False
        self._reset()

    def _reset(self) -> None:
        self._file: RecordWriter | None = None
        self._hooks: StepHooks | None = None
        self._stance: contextlib.AbstractContextManager[Any] | None = None
        self._loss: Tensor | None = None
        self._began = time.monotonic()
        self._tensors: dict[tuple[str, str, str], int] = {}
        self._recorded = 0
        self._divides = False
        self._parameters = parameter_names(self._model)
        self._skips = SkipWatch(self._parameters, lambda: self._source.rule, self._write)
        self.step = 0
        self.gradients: dict[str, ExponentHistogram] = {}

    # ------------------------------------------------------------------ attaching

    def attach(self) -> NumericsMonitor:
        """Begin to watch; returns this object.

        Raises:
            PolicyError: it is attached already.
            RecordError: the record cannot be written.
        """
        if self._attached:
            raise PolicyError("NumericsMonitor.attach(): it is attached already.")
        self._reset()
        if not self._is_mine():
            return self
        if self._path is not None:
            path = self._path.replace("{rank}", str(_rank()))
            self._file = RecordWriter(path, KIND, **self._header())
        self._attached = True
        self._source.attach(self)
        self._divides = not only_powers_of_two(self._source.rule)
        self._skips.begin(self._source.scale())
        self._begin_step()
        return self

    def detach(self, error: BaseException | None = None) -> None:
        """End watching: remove every hook, write the last line, close the record.

        Args:
            error: what ended the run, for the last line.
        """
        if not self._attached:
            return
        self._attached = False
        if error is None:
            self._source.finish()
        self._source.detach()
        self._end_hooks()
        self._loss = None
        try:
            self._skips.end()
            self._write(self._end_event(error))
        finally:
            if self._file is not None:
                self._file.close()

    def __enter__(self) -> NumericsMonitor:
        return self.attach()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach(error)

    def advice(self) -> LossScaleAdvice | None:
        """Return what the gradients recorded so far ask of a loss scale (``print`` it).

        In float16 what was too small is a zero already: record in float32 or bfloat16 to know.
        None where no gradient was recorded.
        """
        return advise_loss_scale(self.gradients) if self.gradients else None

    def _is_mine(self) -> bool:
        return _rank() == 0 or (self._path is not None and "{rank}" in self._path)

    # ------------------------------------------------------------------ what the source tells

    def saw_loss(self, loss: Tensor) -> None:
        """Take a loss, unscaled; of several in a step the last one is recorded."""
        self._loss = loss.detach()

    def gradients_ready(self, optimizer: Optimizer | None, scale: Tensor | None) -> None:
        """Count the weights and gradients of a recorded step before they change."""
        if self._hooks is not None:
            self._hooks.before_step(optimizer, scale)

    def step_done(self, found: Tensor | None, scale: Tensor | None) -> None:
        """End a step; ``found`` is 1.0 if it was skipped, ``scale`` the next step's."""
        self.step += 1
        try:
            if self._hooks is not None:
                self._finish(self._hooks, found)
            if found is not None and scale is not None:
                self._skips.see(self.step, found, scale, self._loss)
        finally:
            self._begin_step()

    # ------------------------------------------------------------------ a recorded step

    def _begin_step(self) -> None:
        self._end_hooks()
        if self.step % self.every:
            return
        self._stance = eagerly()
        recording = Recording(self._identify, self._source.scale, divide=self._divides)
        alone = not self._source.announces_gradients
        self._hooks = StepHooks(self._model, self._targets, recording, self.saw_loss, alone)
        self._source.watch_gradients(self)

    def _end_hooks(self) -> None:
        hooks, self._hooks = self._hooks, None
        stance, self._stance = self._stance, None
        self._source.ignore_gradients()
        if hooks is not None:
            hooks.remove()
        if stance is not None:
            stance.__exit__(None, None, None)

    def _finish(self, hooks: StepHooks, found: Tensor | None) -> None:
        hooks.after_step()
        numbers = hooks.recording.read(self._loss, found)
        self._recorded += 1
        self._divides |= not is_power_of_two(numbers.scale)
        for kind, histogram in numbers.merged.items():
            self.gradients[kind] = self.gradients.get(kind, ExponentHistogram()) + histogram
        self._write(self._numbers_event(numbers))
        if found is None:
            self._report_not_finite(numbers)
        if self._board is not None:
            self._board.add(self.step, numbers, list(self._tensors))

    def _report_not_finite(self, numbers: StepNumbers) -> None:
        merged = numbers.merged.get("weight_gradient")
        if merged is None or not merged.infinities + merged.nans:
            return
        bad, present = not_finite(self._parameters)
        self._write(describe.not_finite_event(self.step, numbers.loss, bad, present))

    # ------------------------------------------------------------------ the record

    def _write(self, event: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(event)
        if self._board is not None:
            self._board.event(event)

    def _identify(self, kind: str, path: str, name: str, tensor: Tensor) -> int:
        key = (kind, path, name)
        if key not in self._tensors:
            self._tensors[key] = len(self._tensors)
            title = next(t.title for t in self._targets if t.path == path)
            self._write(describe.tensor_event(len(self._tensors) - 1, key, title, tensor))
        return self._tensors[key]

    def _header(self) -> dict[str, Any]:
        rule: LossScale | None = self._source.rule
        return describe.header(self._model, self.every, rule)

    def _numbers_event(self, numbers: StepNumbers) -> dict[str, Any]:
        merged = {kind: found.to_plain() for kind, found in numbers.merged.items()}
        return {
            "event": "numerics",
            "step": self.step,
            "seconds": time.monotonic() - self._began,
            "loss": numbers.loss,
            "scale": numbers.scale,
            "skipped": numbers.skipped,
            "rows": numbers.rows,
            **{f"{kind}s": merged.get(kind) for kind in _GRADIENTS},
        }

    def _end_event(self, error: BaseException | None) -> dict[str, Any]:
        advice = self.advice()
        return {
            "event": "end",
            "steps": self.step,
            "recorded": self._recorded,
            "skipped": self._skips.skipped,
            "seconds": time.monotonic() - self._began,
            "scale": self._skips.scale,
            "error": None if error is None else f"{type(error).__name__}: {error}",
            "advice": None if advice is None else advice.to_plain(),
        }


def _rank() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0
