"""What is measured in a step: casts, bytes kept for backward, host reads, time."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from halfstep.torch import LossScaleOptimizer

from .styles import COMPARED, Optimizing, Style
from .workloads import Batch, Workload

aten = torch.ops.aten


@dataclass(frozen=True)
class Cast:
    """One cast that was launched.

    Attributes:
        phase: "forward", "backward" or "optimizer".
        before, after: dtypes, in words.
        shape: of the tensor; of the first one of a group.
        moved: bytes read and written.
        tensors: how many tensors it casts: more than one in a grouped copy.
        module: the innermost module it happened in, as far as it is known.
    """

    phase: str
    before: str
    after: str
    shape: tuple[int, ...]
    moved: int
    tensors: int
    module: str


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation below autograd and autocast, as it reaches the device."""

    def __init__(self, where: Callable[[], str] = lambda: "") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.where = where
        self.phase = "forward"
        self.casts: list[Cast] = []
        self.groups: list[Cast] = []
        self.host_reads = 0
        self.counter_reads = 0
        self.counters: frozenset[int] = frozenset()  # the storages of counters on the CPU
        self.copied_bytes = 0
        self.launches = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run as compiled: what it launches is seen here too."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        operation = func.overloadpacket
        self.launches += _launches(func, operation)
        if operation in _CASTS:
            self._cast([(args[0], result)], self.casts)
        elif operation is aten.copy_:
            self._cast([(args[1], args[0])], self.casts)
        elif operation is aten._foreach_copy_:
            self._cast(list(zip(args[1], args[0], strict=True)), self.groups)
        elif operation is aten._local_scalar_dense:
            waits = args[0].untyped_storage()._cdata not in self.counters
            self.host_reads += waits
            self.counter_reads += not waits
        elif operation is aten._foreach_clone:
            self.copied_bytes += _bytes(*result)
        return result

    def _cast(self, pairs: list[tuple[Tensor, Tensor]], seen: list[Cast]) -> None:
        changed = [
            (old, new)
            for old, new in pairs
            if old.dtype is not new.dtype and old.is_floating_point() and new.is_floating_point()
        ]
        if not changed:
            return
        (old, new), moved = changed[0], sum(_bytes(*pair) for pair in changed)
        before, after = (str(tensor.dtype).removeprefix("torch.") for tensor in (old, new))
        shape = tuple(new.shape)
        cast = Cast(self.phase, before, after, shape, moved, len(changed), self.where())
        seen.append(cast)


_CASTS = (aten._to_copy, torch.ops.prims.convert_element_type)
_NO_LAUNCH = frozenset(
    (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
     aten.detach, aten._local_scalar_dense, aten.sym_size, aten.is_same_size)
)  # fmt: skip


def _launches(func: Any, operation: Any) -> bool:
    """Whether an operation runs something on the device; a view or an allocation does not."""
    return not func.is_view and operation not in _NO_LAUNCH


class Saved:
    """Bytes that a forward pass keeps for the backward pass, each storage counted once.

    Storages of the model's own parameters and buffers do not count; 16-bit copies of them do.
    """

    def __init__(self, model: nn.Module) -> None:
        own = [*model.parameters(), *model.buffers()]
        self._known = {tensor.untyped_storage()._cdata for tensor in own}
        self._kept: list[torch.UntypedStorage] = []  # alive, so that no address is used twice
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._kept.append(storage)
            self.bytes += storage.nbytes()
        return tensor


def _unpack(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Counts:
    """What one optimizer step does.

    Attributes:
        casts: casts that change a float's dtype, one tensor each, by phase.
        cast_bytes: bytes that these read and write.
        groups: casts of many tensors in one call.
        group_bytes: bytes that those read and write.
        saved_bytes: bytes kept for backward; of the last micro-batch.
        host_reads: reads of a value on the host that are visible to the dispatcher.
        counter_reads: reads of counters that the optimizer keeps on the CPU wherever its
            parameters are, which wait for nothing; they are no part of the reads above.
        copied_bytes: bytes of grouped copies, which halfstep makes to take a step back.
        launches: operations that run something on the device, the optimizer's too; a grouped one
            is one.
    """

    casts: Mapping[str, int]
    cast_bytes: int
    groups: int
    group_bytes: int
    saved_bytes: int
    host_reads: int
    counter_reads: int
    copied_bytes: int
    launches: int


@dataclass
class Training:
    """A model on its way through training in one style."""

    workload: Workload
    style: Style
    device: str
    model: nn.Module
    batch: Batch
    optimizing: Optimizing
    micro_batches: int = 1
    around: Callable[[], Any] = nullcontext

    def step(self, observer: Observer | None = None) -> None:
        """Take one optimizer step."""
        with self.around():
            for _ in range(self.micro_batches):
                _enter(observer, "forward")
                with self.style.forward(self.device):
                    loss = self.workload.loss(self.model(self.batch[0]), self.batch[1])
                _enter(observer, "backward")
                self.optimizing.backward(loss)
        _enter(observer, "optimizer")
        self.optimizing.step()


def _enter(observer: Observer | None, phase: str) -> None:
    if observer is not None:
        observer.phase = phase


MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def fused_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of every measurement that is not about optimizers."""
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def start(
    workload: Workload,
    style: Style,
    device: str = "cpu",
    optimizer: MakeOptimizer = fused_adamw,
    max_norm: float | None = None,
) -> Training:
    """Return a training that is ready for its first step."""
    model = style.prepare(workload.build(device))
    optimizing = style.optimize(optimizer(list(model.parameters())), device, max_norm)
    return Training(workload, style, device, model, workload.data(device), optimizing)


def observe(training: Training) -> Observer:
    """Take one step under the eyes of an observer who knows the modules; not for timing."""
    tracker = ModuleTracker()

    def where() -> str:
        inside = tracker.parents - {"Global"}
        return max(inside, key=len, default="")

    observer = Observer(where)
    with tracker, observer:
        training.step(observer)
    return observer


def kept_on_cpu(optimizer: MakeOptimizer) -> frozenset[str]:
    """Return the names of the state that an optimizer keeps on the CPU, wherever parameters are.

    Asked on the meta device, which is neither the CPU nor has to be there. A step that reads a
    value of that fails, but has made its state by then.
    """
    parameter = nn.Parameter(torch.empty(2, 2, device="meta"))
    parameter.grad = torch.empty_like(parameter)
    state: dict[str, Any] = {}
    with suppress(RuntimeError):  # fused kernels, which read nothing, are not for this device
        asked = optimizer([parameter])
        state = asked.state[parameter]
        asked.step()
    return frozenset(
        name
        for name, value in state.items()
        if isinstance(value, Tensor) and value.device.type == "cpu"
    )


def _counters(training: Training, names: Collection[str]) -> frozenset[int]:
    optimizer = training.optimizing.optimizer
    bare = optimizer.inner_optimizer if isinstance(optimizer, LossScaleOptimizer) else optimizer
    return frozenset(
        state[name].untyped_storage()._cdata
        for state in bare.state.values()
        for name in set(names) & state.keys()
    )


def count(training: Training, counters: Collection[str] = ()) -> Counts:
    """Take a step to warm up and one to count in; ``counters`` is of `kept_on_cpu`."""
    training.step()
    saved, observer = Saved(training.model), Observer()
    observer.counters = _counters(training, counters)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, _unpack), observer:
        training.step(observer)
    phases = ("forward", "backward", "optimizer")
    return Counts(
        casts={phase: sum(c.phase == phase for c in observer.casts) for phase in phases},
        cast_bytes=sum(cast.moved for cast in observer.casts),
        groups=len(observer.groups),
        group_bytes=sum(cast.moved for cast in observer.groups),
        saved_bytes=saved.bytes // training.micro_batches,
        host_reads=observer.host_reads,
        counter_reads=observer.counter_reads,
        copied_bytes=observer.copied_bytes,
        launches=observer.launches,
    )


@dataclass(frozen=True)
class Ratio:
    """The median of a ratio and its quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """How long a step takes, next to the same step in another style in the same round.

    Attributes:
        seconds: the median of a step.
        to_float32: over the rounds, time / float32's time: median and quartiles.
        to_amp: the same of time / the time of torch.amp in this dtype; None for what is no rival.
        rounds: how many there were.
    """

    seconds: float
    to_float32: Ratio
    to_amp: Ratio | None
    rounds: int


def time_together(
    trainings: Sequence[Training], *, seconds: float, steps: int = 1, fewest: int = 5
) -> dict[str, Timing]:
    """Time trainings in turns, the first one in float32.

    Every round times each training once, in an order that rotates, so that what else the
    machine does meets all of them.

    Args:
        seconds: how long to go on, all trainings together.
        steps: steps of one measurement.
        fewest: rounds at least.
    """
    contenders = {training.style.name: training.step for training in trainings}
    device = trainings[0].device
    took = in_turns(contenders, device, seconds=seconds, steps=steps, fewest=fewest)
    base = took[trainings[0].style.name]
    return {
        training.style.name: Timing(
            statistics.median(took[training.style.name]),
            ratio(took[training.style.name], base),
            _to_amp(training.style, trainings, took),
            len(base),
        )
        for training in trainings
    }


def in_turns(
    contenders: Mapping[str, Callable[[], None]],
    device: str,
    *,
    seconds: float,
    steps: int,
    fewest: int,
) -> dict[str, list[float]]:
    """Return how long a step of each took, in seconds, once a round; as `time_together` does."""
    for step in contenders.values():
        step()
    took: dict[str, list[float]] = {name: [] for name in contenders}
    begin = time.perf_counter()
    order = list(contenders)
    gc.collect()
    gc.disable()
    try:
        while len(took[order[0]]) < fewest or time.perf_counter() - begin < seconds:
            for name in order:
                took[name].append(_time(contenders[name], device, steps))
            order.append(order.pop(0))
    finally:
        gc.enable()
    return took


def _to_amp(
    style: Style, trainings: Sequence[Training], took: Mapping[str, list[float]]
) -> Ratio | None:
    if style.kind not in COMPARED:
        return None
    styles = (training.style for training in trainings)
    rivals = [s.name for s in styles if s.kind == "torch.amp" and s.dtype is style.dtype]
    return ratio(took[style.name], took[rivals[0]]) if rivals else None


def _time(step: Callable[[], None], device: str, steps: int) -> float:
    # processor time on a CPU: what else runs on the machine does not count in it
    clock = time.process_time if device == "cpu" else time.perf_counter
    synchronize(device)
    begin = clock()
    for _ in range(steps):
        step()
    synchronize(device)
    return (clock() - begin) / steps


def synchronize(device: str) -> None:
    """Wait for the device: a launch returns before the work is done."""
    if device != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def ratio(times: list[float], others: list[float]) -> Ratio:
    """Return the median and the quartiles of one series over another, round by round."""
    ratios = [mine / other for mine, other in zip(times, others, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Ratio(middle, low, high)
