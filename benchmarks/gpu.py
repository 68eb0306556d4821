"""``python -m benchmarks.gpu``: what a step costs on this GPU, beside the peers, in 8 minutes.

Needs torch, this repository and its two dependencies (NumPy, ml_dtypes). Whatever else is installed
(lightning_fabric, transformer_engine, torchao) is measured too; a row that cannot run here, or not
in its share of the time, says why.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .gpu_tables import page, rows_table
from .gpu_workloads import Sized, only, workloads
from .machine import describe, sentence, slug
from .measures import Counts, Training, count, start, synchronize
from .peaks import peak_flops
from .styles import FAMILIES, Style

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
LONGEST = 3.0
"""A row may take so many times its share before it is stopped."""
COMPILING = 60.0
"""Seconds that a compiled row may take where its share is less: later ones then find none left."""
STEPS = (3, 30)
"""Steps that are timed: at least, at most."""
FAILURES = (
    RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, AssertionError,
    ImportError, OSError, KeyError,
)  # fmt: skip
"""What a peer raises where it does not support a model or a machine."""

F16, BF16 = torch.float16, torch.bfloat16
EAGER = (
    Style("float32"),
    Style("float32", tf32=True),
    Style("torch.amp", F16),
    Style("torch.amp", BF16),
    Style("halfstep", F16, "autocast"),
    Style("halfstep", F16, "compute"),
    Style("halfstep", BF16, "autocast"),
    Style("halfstep", BF16, "compute"),
    Style("halfstep masters", BF16),
    Style("halfstep Kahan", BF16),
    Style("Fabric", F16),
    Style("Fabric", BF16),
    Style("Transformer Engine", BF16),
)

IN_A_STREAM = Style("halfstep", BF16, "autocast", cast_forward_inputs=True)
"""For models whose float32 inputs are the beginning of a residual stream."""


def eager(sized: Sized) -> tuple[Style, ...]:
    """Return the eager styles of a workload."""
    return (*EAGER, IN_A_STREAM) if sized.workload.stream else EAGER


def compiled(backend: str) -> tuple[Style, ...]:
    """Return the compiled styles: last, because only these can take minutes."""
    return (
        Style("torch.amp", BF16, backend=backend),
        Style("halfstep", BF16, "compute", backend=backend),
        Style("halfstep rewrite", BF16, backend=backend),
        Style("torchao float8", BF16, backend=backend),
    )


class Late(Exception):
    """A row has used up its time."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `Late` inside the block once it took so long; between two of Python's instructions."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    """Measure, print, and write the results."""
    options = _options()
    logging.getLogger("halfstep").setLevel(logging.ERROR)
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(
            f"benchmarks.gpu --device {options.device}: torch {torch.__version__} sees no GPU "
            "here. Try --device cpu --tiny to see that it runs."
        )
    begin = time.monotonic()
    machine = describe(options.device)
    print(sentence(machine))
    torch.backends.cudnn.benchmark = True
    peak = peak_flops(machine["device"], options.device, options.tiny)
    rows = measure_all(options, peak.flops, begin + options.seconds)
    results = {
        "machine": machine,
        "tiny": options.tiny,
        "command": _command(options),
        "seconds": time.monotonic() - begin,
        "peak": dataclasses.asdict(peak),
        "rows": rows,
    }
    for sized in dict.fromkeys(row["workload"] for row in rows):
        rows_table(sized, rows).show()
    if options.out is not None:
        out = Path(options.out) / f"gpu-{slug(machine)}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(_rounded(results), indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(page(results), encoding="utf-8")
        print(f"wrote {out.name} and {out.stem}.md")
    print(f"{results['seconds']:.0f} s in all")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, to see that it runs")
    parser.add_argument("--seconds", type=float, default=450.0, help="of everything")
    parser.add_argument("--only", help="names of workloads, separated by commas")
    parser.add_argument("--eager", action="store_true", help="leave out what is compiled")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results"))
    return parser.parse_args()


def _command(options: argparse.Namespace) -> str:
    words = ["python -m benchmarks.gpu"]
    words += [] if options.device == "cuda" else [f"--device {options.device}"]
    words += ["--tiny"] if options.tiny else []
    words += [f"--only {options.only}"] if options.only else []
    words += ["--eager"] if options.eager else []
    return " ".join(words)


def measure_all(options: argparse.Namespace, peak: float | None, end: float) -> list[Row]:
    """Measure every row, the compiled ones last; each has an equal share of the time left."""
    sized = only(workloads(options.tiny), options.only)
    backend = "aot_eager" if options.tiny else "inductor"
    todo = [(each, style) for each in sized for style in eager(each)]
    # the last workloads compile fastest
    todo += [] if options.eager else [(e, s) for e in sized[::-1] for s in compiled(backend)]
    rows: list[Row] = []
    for place, (each, style) in enumerate(todo):
        left = end - time.monotonic()
        time_box = _time_box(left, left / (len(todo) - place), style)
        rows.append(_row(each, style) | measure(each, style, options.device, time_box, peak))
        print(f"{each.name:12} {_label(style):36} {_said(rows[-1])}", flush=True)
    order = {each.name: place for place, each in enumerate(sized)}
    return sorted(rows, key=lambda row: order[row["workload"]])


@dataclasses.dataclass(frozen=True)
class TimeBox:
    """Seconds that a row shall take, and after which it is stopped."""

    share: float
    limit: float


def _time_box(left: float, share: float, style: Style) -> TimeBox:
    limit = LONGEST * share if style.backend is None else max(LONGEST * share, COMPILING)
    return TimeBox(share, min(limit, left))


def measure(sized: Sized, style: Style, device: str, box: TimeBox, peak: float | None) -> Row:
    """Return what a row holds, or ``{"why": ...}`` where there is nothing to hold."""
    why = style.missing() or _unfit(style, device)
    if why is None and box.limit <= 0:
        why = "no time was left"
    if why is not None:
        return {"why": why}
    begin = time.monotonic()
    try:
        with at_most(box.limit), _products(style.tf32):
            return _measure(sized, style, device, begin + box.share, peak)
    except Late:
        return {"why": f"not done within {box.limit:.1f} s"}
    except FAILURES as error:
        if time.monotonic() - begin >= box.limit:  # torch.compile wraps what it is stopped by
            return {"why": f"not done within {box.limit:.1f} s"}
        return {"why": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    finally:
        _clear(device)


def _measure(sized: Sized, style: Style, device: str, end: float, peak: float | None) -> Row:
    training = start(sized.workload, style, device)
    for _ in range(2):  # it compiles, chooses algorithms, and fills the optimizer's state
        training.step()
    counts = count(training)
    _reset_peak(device)
    times = _times(training, end)
    low, middle, high = statistics.quantiles(times, n=4)
    done = sized.flops / middle
    return {
        "why": None,
        "seconds": middle,
        "quartiles": [low, high],
        "steps": len(times),
        "memory": _peak(device),
        "flops_per_second": done,
        "share_of_peak": None if peak is None else done / peak,
        **_plain(counts),
    }


def _times(training: Training, end: float) -> list[float]:
    times: list[float] = []
    fewest, most = STEPS
    while len(times) < fewest or (len(times) < most and time.monotonic() < end):
        synchronize(training.device)
        begin = time.perf_counter()
        training.step()
        synchronize(training.device)
        times.append(time.perf_counter() - begin)
    return times


def _plain(counts: Counts) -> Row:
    return dataclasses.asdict(counts)


def _unfit(style: Style, device: str) -> str | None:
    if device == "cpu" and style.tf32:
        return "a CPU has no TF32"
    if device == "cpu" and style.kind in ("Transformer Engine", "torchao float8"):
        return "wants a GPU"
    return None


@contextmanager
def _products(tf32: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _on_gpu(device: str, act: Callable[[], Any]) -> Any:
    return None if device == "cpu" else act()


def _reset_peak(device: str) -> None:
    _on_gpu(device, torch.cuda.reset_peak_memory_stats)


def _peak(device: str) -> int | None:
    value: int | None = _on_gpu(device, torch.cuda.max_memory_allocated)
    return value


def _clear(device: str) -> None:
    torch.compiler.reset()
    gc.collect()
    _on_gpu(device, torch.cuda.empty_cache)


def _label(style: Style) -> str:
    return style.name + ("" if style.backend is None else ", compiled")


def _row(sized: Sized, style: Style) -> Row:
    return {
        "workload": sized.name,
        "about": sized.workload.about,
        "flops": sized.flops,
        "style": _label(style),
        "kind": style.kind,
        "dtype": style.word,
        "compiled": style.backend is not None,
        "needs": FAMILIES[style.kind].needs,
    }


def _said(row: Row) -> str:
    if row["why"] is not None:
        return f"- {row['why']}"
    return f"{row['seconds'] * 1e3:9.2f} ms, {row['steps']} steps"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
