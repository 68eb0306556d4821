"""``halfstep doctor``: what this machine has, what it is fast in, which policy pays on it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..core.device import UNIT_FORMATS, Device, Unit
from .survey import Survey, survey
from .verdict import Verdict, measured, ratios, recommendation

if TYPE_CHECKING:
    from ..torch.devices import Timing

_NEEDS_TORCH = (
    "--measure needs torch, which is not installed or could not be imported: "
    "pip install 'halfstep[torch]'"
)


def _memory(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.0f} GiB"


_KINDS = {
    "cpu": "CPU",
    "cuda": "GPU (CUDA)",
    "rocm": "GPU (ROCm)",
    "mps": "GPU (Metal)",
    "xpu": "GPU (XPU)",
    "tpu": "TPU",
}


def _details(device: Device) -> list[str]:
    details = [device.label, *filter(None, [_memory(device.memory)])]
    if device.kind == "cpu":
        sets = ", ".join(device.features)
        details.append(f"instruction sets {sets}" if sets else "instruction sets unknown")
    if not device.usable:
        details.append("no framework loaded here can use it")
    return details


def _machine_table(found: Survey) -> Table:
    table = Table(title="This machine", show_header=False, title_justify="left", expand=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    table.add_row("system", found.system)
    table.add_row("Python", found.python)
    for device in found.devices:
        table.add_row(_KINDS[device.kind], "; ".join(_details(device)))
    if len(found.devices) == 1:
        table.add_row("GPU, TPU", "none found")
    for framework in found.frameworks:
        says = framework.sees or f"could not be used: {framework.error}"
        table.add_row(
            framework.name, f"{framework.version} sees {says}" if framework.sees else says
        )
    return table


def _cell(unit: Unit | None) -> Text:
    if unit is None:
        return Text("no", style="dim")
    return Text(str(unit), style="green" if unit.matrix else "yellow")


def _units_table(machine: Sequence[Device]) -> Table:
    table = Table(title="Fast units by format", title_justify="left")
    table.add_column("device", overflow="fold")
    for name in UNIT_FORMATS:
        table.add_column(name, min_width=len(name))
    for device in machine:
        table.add_row(device.name, *(_cell(device.unit(name)) for name in UNIT_FORMATS))
    return table


def _timings_table(timings: Sequence[Timing]) -> Table:
    table = Table(title="Measured, forward and backward", title_justify="left", expand=True)
    table.add_column("device")
    table.add_column("operation", ratio=1)
    for name in ("dtype", "median", "spread", "x float32"):
        table.add_column(name, justify="left" if name == "dtype" else "right", no_wrap=True)
    previous: tuple[str, str] | None = None
    for timing in timings:
        first = (timing.device, timing.operation) != previous
        if first and previous is not None:
            table.add_section()
        previous = (timing.device, timing.operation)
        named = (timing.device, f"{timing.operation}, {timing.size}") if first else ("", "")
        table.add_row(*named, timing.dtype, *_timing_cells(timing, timings))
    return table


def _timing_cells(timing: Timing, timings: Sequence[Timing]) -> tuple[str, str, str]:
    if not math.isfinite(timing.seconds):
        return "cannot", "", ""
    ratio = ratios([t for t in timings if t.device == timing.device])
    times = ratio.get(timing.dtype, {}).get(timing.operation, 1.0)
    spread = f"{timing.spread * 1e3:.3g} ms"
    return f"{timing.seconds * 1e3:.3g} ms", spread, f"{times:.2f}"


def _print(
    console: Console, found: Survey, timings: Sequence[Timing], verdicts: Sequence[Verdict]
) -> None:
    console.print(_machine_table(found))
    console.print(_units_table(found.devices))
    for check in found.checks:
        mark = ("OK", "bold green") if check.ok else ("WARNING", "bold yellow")
        console.print(Text.assemble((f"{check.policy}: ", "bold"), mark))
        console.print(Text(check.reason))
        console.print()
    if timings:
        console.print(_timings_table(timings))
    for sentence in _sentences(found, verdicts):
        console.print(Text(sentence, style="bold"))


def _sentences(found: Survey, verdicts: Sequence[Verdict]) -> list[str]:
    """What was measured outweighs what the data sheets say."""
    return [verdict.sentence for verdict in verdicts] or [recommendation(found.devices)]


def _measure(found: Survey, console: Console, seconds: float) -> tuple[list[Timing], list[Verdict]]:
    if not any(part.name == "torch" and not part.error for part in found.frameworks):
        raise click.UsageError(_NEEDS_TORCH)
    from ..torch.devices import device_name, measure, torch_devices

    timings: list[Timing] = []
    verdicts: list[Verdict] = []
    for device in torch_devices():
        name = "this CPU" if device.type == "cpu" else device_name(device)
        with console.status(f"measuring {name}, about {seconds * 6:.0f} to {seconds * 20:.0f} s"):
            took = measure(device, seconds=seconds)
        timings += took
        verdicts.append(measured(name, took))
    return timings, verdicts


def _document(
    found: Survey, timings: Sequence[Timing], verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    # JSON has no NaN: what could not be computed took null seconds
    rows = [
        {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(timing).items()
        }
        for timing in timings
    ]
    return {
        **found.get_config(),
        "timings": rows,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "recommendation": " ".join(_sentences(found, verdicts)),
    }


@click.command()
@click.option("--measure", is_flag=True, help="Time a matrix product and a convolution per dtype.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True, max=60),
    default=1.0,
    show_default=True,
    help="Time for each dtype and operation with --measure.",
)
@click.option(
    "--json",
    "path",
    metavar="FILE|-",
    help="Write it all as JSON too; to standard output, instead of the tables, with -.",
)
def doctor(measure: bool, seconds: float, path: str | None) -> None:
    """Say what this machine has, what it is fast in, and which policy pays on it.

    Every installed framework is imported, so that it can say what it sees.
    """
    progress = Console(stderr=True)
    with progress.status("importing the installed frameworks"):
        found = survey()
    timings, verdicts = _measure(found, progress, seconds) if measure else ([], [])
    if path != "-":
        _print(Console(), found, timings, verdicts)
    if path is None:
        return
    text = json.dumps(_document(found, timings, verdicts), indent=2) + "\n"
    if path == "-":
        click.echo(text, nl=False)
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.FileError(path, error.strerror or str(error)) from error
