"""The devices that torch has, and how fast each one computes in 16 bits, measured.

What a data sheet promises and what a build of torch does with it differ, on CPUs by orders of
magnitude: so the question whether a policy pays is answered with a stopwatch.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

DTYPES = ("float32", "bfloat16", "float16")
"""What is timed: the compute dtypes of the policies."""

_TRIES = 4  # the first call of a dtype compiles or loads kernels, others meet a busy machine
_LONG_ENOUGH = 0.010  # seconds of one float32 call: above clock and launch noise
_GROWN = 1.5  # a size has two to four times the work of the one before it
_MOST_ROUNDS = 200

Call: TypeAlias = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """How long one operation takes in one dtype, forward and backward together.

    Attributes:
        device: torch's name of the device, for instance ``'cuda:0'``.
        operation: ``'product'`` or ``'convolution'``.
        dtype: the dtype of its inputs, weights and gradients.
        size: what was multiplied, in words.
        seconds: the median of the calls; NaN where the device cannot do it.
        spread: the distance between the quartiles of the calls, in seconds.
        calls: how many were timed.
        error: why the device cannot do it, else empty.
    """

    device: str
    operation: str
    dtype: str
    size: str
    seconds: float
    spread: float
    calls: int
    error: str = ""


@dataclass(frozen=True)
class Operation:
    """An operation in growing sizes.

    Attributes:
        name: its name.
        sizes: from small to large, each two to four times the work of the one before; the first
            is small enough for 16 bits emulated on a slow CPU, and large enough to tell.
        make: returns a call that computes the operation and its gradients once.
        describe: says a size in words.
    """

    name: str
    sizes: Sequence[tuple[int, ...]]
    make: Callable[[tuple[int, ...], torch.dtype, torch.device], Call]
    describe: Callable[[tuple[int, ...]], str]


def _product(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Call:
    a, b, grad = (torch.randn(size, device=device).to(dtype) for _ in range(3))
    a.requires_grad_()
    b.requires_grad_()
    return lambda: torch.autograd.grad(a @ b, (a, b), grad)


def _convolution(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Call:
    batch, channels, side = size
    x = torch.randn(batch, channels, side, side, device=device).to(dtype).requires_grad_()
    w = torch.randn(channels, channels, 3, 3, device=device).to(dtype).requires_grad_()
    grad = torch.ones_like(x)
    return lambda: torch.autograd.grad(torch.nn.functional.conv2d(x, w, padding=1), (x, w), grad)


OPERATIONS = (
    Operation(
        "product",
        [(n, n) for k in range(8, 13) for n in (2**k, 3 * 2 ** (k - 1))],
        _product,
        lambda size: f"{size[0]} x {size[0]} x {size[1]}",
    ),
    Operation(
        "convolution",
        [(b, c, 32) for c in (32, 64, 128, 256, 512) for b in (c // 8, c // 4)],
        _convolution,
        lambda size: f"3 x 3, {size[1]} channels, {size[0]} images of {size[2]} x {size[2]}",
    ),
)
"""What is timed; matrix sides and channels are multiples of 8, as tensor cores want them."""


def torch_devices() -> tuple[torch.device, ...]:
    """Return the CPU and one accelerator of each name that torch has.

    >>> torch_devices()[0]
    device(type='cpu')
    """
    found = {"cpu": torch.device("cpu")}
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is not None:
        for index in range(torch.accelerator.device_count()):
            device = torch.device(kind.type, index)
            found.setdefault(device_name(device), device)
    return tuple(found.values())


def device_name(device: torch.device) -> str:
    """Return the maker's name of an accelerator, or torch's own for what has none."""
    module: Any = getattr(torch, device.type, None)
    name = getattr(module, "get_device_name", None)
    return str(name(device)) if name is not None else device.type


def _synchronizer(device: torch.device) -> Callable[[], None]:
    """A launch returns before the work is done, so the clock waits for the device."""
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)


def _timed(call: Call, synchronize: Callable[[], None]) -> float:
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begin


def _fastest(call: Call, synchronize: Callable[[], None], seconds: float) -> float:
    """The shortest of a few calls; fewer where they take longer than ``seconds`` together."""
    took: list[float] = []
    while len(took) < _TRIES and sum(took) < seconds:
        took.append(_timed(call, synchronize))
    return min(took)


def time_operation(
    operation: Operation,
    device: torch.device,
    *,
    dtypes: Sequence[str] = DTYPES,
    seconds: float = 1.0,
) -> tuple[Timing, ...]:
    """Time an operation, forward and backward, in several dtypes side by side.

    ::

        grow the size until one float32 call takes 10 ms, and clearly longer than at the size
        before (then the work sets the time, not its overhead), or a call in any dtype takes a
        quarter of the dtype's time; each dtype is warm by then
        repeat: one call in each dtype, the order turned by one each round
        until each dtype had its time, and three rounds at least; never past three times that

    The rounds interleave the dtypes, so that a machine that is busy for a while slows all of them
    alike; so ratios hold where times do not.

    Args:
        operation: one of :data:`OPERATIONS`.
        device: where to compute.
        dtypes: what to compare; the first one decides the size.
        seconds: the time to spend on each dtype.

    Returns:
        A timing for each dtype, in their order.
    """
    synchronize = _synchronizer(device)
    errors: dict[str, str] = {}
    size, calls = _grown(operation, device, dtypes, seconds, synchronize, errors)
    samples: dict[str, list[float]] = {dtype: [] for dtype in calls}
    for dtype in _rounds(list(calls), seconds):
        samples[dtype].append(_timed(calls[dtype], synchronize))
    words = operation.describe(size)
    return tuple(
        _timing(
            str(device), operation.name, dtype, words, samples.get(dtype, []), errors.get(dtype, "")
        )
        for dtype in dtypes
    )


def _grown(
    operation: Operation,
    device: torch.device,
    dtypes: Sequence[str],
    seconds: float,
    synchronize: Callable[[], None],
    errors: dict[str, str],
) -> tuple[tuple[int, ...], dict[str, Call]]:
    """The size to time, and a warm call for every dtype that works; the rest goes to ``errors``."""
    size, calls, before = operation.sizes[0], dict[str, Call](), math.inf
    for size in operation.sizes:
        calls, took = {}, {}
        for dtype in dtypes:
            if dtype in errors:
                continue
            try:
                call = operation.make(size, getattr(torch, dtype), device)
                took[dtype] = _fastest(call, synchronize, seconds)
                calls[dtype] = call
            except (RuntimeError, TypeError, NotImplementedError) as error:
                errors[dtype] = str(error).strip().partition("\n")[0]
        if not calls or max(took.values()) >= seconds / 4:
            break
        now = took.get(dtypes[0], math.inf)
        if now >= min(_LONG_ENOUGH, seconds) and now >= _GROWN * before:
            break
        before = now
    return size, calls


def _rounds(dtypes: list[str], seconds: float) -> Iterator[str]:
    """The dtypes in the order to time them, until the time is up."""
    budget = seconds * len(dtypes)
    begin = time.perf_counter()
    for number in range(_MOST_ROUNDS):
        spent = time.perf_counter() - begin
        if (spent >= budget and number >= 3) or (spent >= 3 * budget and number >= 1):
            return
        turn = number % max(len(dtypes), 1)
        yield from dtypes[turn:] + dtypes[:turn]


def _timing(
    device: str, operation: str, dtype: str, size: str, samples: list[float], error: str
) -> Timing:
    if not samples:
        return Timing(device, operation, dtype, size, math.nan, math.nan, 0, error)
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (median,) * 3
    return Timing(device, operation, dtype, size, median, high - low, len(samples))


def measure(
    device: torch.device, *, dtypes: Sequence[str] = DTYPES, seconds: float = 1.0
) -> tuple[Timing, ...]:
    """Time one matrix product and one convolution in each dtype on a device.

    Float32 is timed as torch is set: on NVIDIA GPUs from compute capability 8.0 its convolutions
    use tensorfloat32 unless ``torch.backends.cudnn.allow_tf32`` is off, and so set the ratio.

    Args:
        device: where to compute.
        dtypes: what to compare; the first one decides the sizes.
        seconds: the time to spend on each dtype and operation.

    >>> timings = measure(torch.device("cpu"), dtypes=["float32"], seconds=0.001)
    >>> [(timing.operation, timing.dtype) for timing in timings]
    [('product', 'float32'), ('convolution', 'float32')]
    """
    return tuple(
        timing
        for operation in OPERATIONS
        for timing in time_operation(operation, device, dtypes=dtypes, seconds=seconds)
    )
