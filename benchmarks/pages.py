"""Results as tables, and as ``docs/benchmarks.md``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import whole_steps, worse
from .machine import sentence
from .styles import RIVALS
from .tables import Table

Row = dict[str, Any]


RATIOS = ("time / float32 (quartiles)", "time / torch.amp (quartiles)")
CASTS = ("casts", "KB cast", "groups", "KB grouped")


def step_tables(results: Row) -> Iterator[tuple[Table, Table, str]]:
    """Yield for each workload what is counted, what is timed, and what it is."""
    rows = results["steps"]
    head = (
        "style", "casts fwd", "casts bwd", *CASTS[1:], "KB saved", "launches",
        "host reads",
    )  # fmt: skip
    for workload in dict.fromkeys(row["workload"] for row in rows):
        mine = [row for row in rows if row["workload"] == workload]
        ran = [row for row in mine if row["why"] is None]
        timed = [
            [short(row["style"]), *_ratios(row["time"])] for row in ran if row["time"] is not None
        ]
        yield (
            Table(workload, head, [_step_cells(row) for row in ran]),
            Table(f"{workload}: time", ("style", *RATIOS), timed),
            mine[0]["about"] + _cannot(mine),
        )


def short(style: str) -> str:
    """Return a style's name as the tables have it, which are wide enough with that."""
    return style.replace(", CUDA's lists", " CUDA").replace("weights_unchanged", "unchanged")


def _cannot(rows: list[Row]) -> str:
    """Name the styles that cannot train this, and what torch says."""
    able = {row["why"]: [] for row in rows if row["why"] is not None}
    for row in rows:
        if row["why"] is not None:
            able[row["why"]].append(row["style"])
    said = (f"{', '.join(styles)}: {why}" for why, styles in able.items())
    return "".join(f". Cannot run here: {words}" for words in said)


def _step_cells(row: Row) -> list[str]:
    return [
        short(row["style"]),
        str(row["casts"]["forward"]),
        str(row["casts"]["backward"]),
        _kb(row["cast_bytes"]),
        str(row["groups"]),
        _kb(row["group_bytes"]),
        _kb(row["saved_bytes"]),
        str(row["launches"]),
        str(row["host_reads"]),
    ]


def _cast_cells(row: Row) -> list[str]:
    casts = sum(row["casts"].values())
    return [str(casts), _kb(row["cast_bytes"]), str(row["groups"]), _kb(row["group_bytes"])]


def _kb(number: int) -> str:
    return f"{number / 1000:,.0f}"


def _ratios(time: Row | None) -> Iterator[str]:
    for key in ("to_float32", "to_amp"):
        ratio = None if time is None else time[key]
        yield "" if ratio is None else spread(ratio)


def spread(ratio: Row) -> str:
    """Return a median and its quartiles in one cell."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} - {ratio['high']:.2f})"


def host_table(results: Row) -> Table:
    """Time of steps that are all host."""
    rows = [
        [
            row["workload"],
            row["style"],
            f"{row['time']['seconds'] * 1e3:.2f}",
            *_ratios(row["time"]),
        ]
        for row in results["host_time"]
    ]
    head = ("model", "style", "ms a step", *RATIOS)
    return Table("host time: models so small that a step is all host", head, rows, words=2)


def accumulation_table(results: Row) -> Table:
    """Casts of one optimizer step over several micro-batches."""
    head = ("model", "style", *CASTS, "bytes / torch.amp", "bytes / torch.amp CUDA")
    rows = results["accumulation"]
    cells = [
        [
            row["workload"],
            short(row["style"]).replace(f" {row['dtype']}", ""),
            *_cast_cells(row),
            *(_moved_against(row, rows, kind) for kind in ("torch.amp", "torch.amp, CUDA's lists")),
        ]
        for row in rows
        if row["kind"] != "float32"
    ]
    title = f"gradient accumulation: {results['micro_batches']} micro-batches a step"
    return Table(title, head, cells, words=2)


def _moved(row: Row) -> int:
    return int(row["cast_bytes"] + row["group_bytes"])


def _moved_against(row: Row, rows: list[Row], kind: str) -> str:
    """The bytes that casts move, over those of torch.amp with the same lists of operations."""
    found = [
        other for other in rows if (other["workload"], other["kind"]) == (row["workload"], kind)
    ]
    # functional="compute" follows no lists, and is compared with both
    fair = RIVALS.get(row["kind"]) == kind or row["functional"] == "compute"
    if not fair or not found:
        return ""
    return f"{_moved(row) / _moved(found[0]):.2f}"


def compiled_table(results: Row) -> Table:
    """What torch.compile makes of each style."""
    head = ("model", "style", "graphs", "breaks", "recompiles", "casts", "KB cast", "KB saved")
    rows = [
        [
            row["workload"],
            row["style"],
            *(str(row[key]) for key in ("graphs", "breaks", "recompiles")),
            str(sum(row["casts"].values()) + row["groups"]),
            _kb(_moved(row)),
            _kb(row["saved_bytes"]),
        ]
        for row in results["compiled"]
    ]
    return Table("compiled, backend aot_eager", head, rows, words=2)


def compiled_times(results: Row) -> Table:
    """The time of each compiled style, and whether a whole step compiles."""
    head = ("model", "style", "whole step in one graph", *RATIOS)
    rows = [
        [row["workload"], row["style"], row.get("whole step") or "", *_ratios(row["time"])]
        for row in results["compiled"]
    ]
    return Table("compiled: time", head, rows, words=3)


TABLES: dict[str, tuple[Callable[[Row], Table], ...]] = {}
"""The tables of the parts that have one, filled below; the steps have one a workload."""


def show(results: Row) -> None:
    """Print the tables of the parts that were measured."""
    if "steps" in results:
        for counts, times, about in step_tables(results):
            counts.show()
            times.show()
            print(about)
        print(EMULATED)
    for part, makers in TABLES.items():
        for make in makers if part in results else ():
            make(results).show()
    if {"steps", "host_time"} <= set(results):
        worse.table(results).show()
        print(worse.reasons())


def reads_table(results: Row) -> Table:
    """Host reads that wait, those that do not, and what none at all costs."""
    kinds = ("float32", "torch.amp", "halfstep", "halfstep, skip='device'")
    found: dict[tuple[str, ...], list[str]] = {}
    for row in results["host_reads"]:
        cells = (
            *(str(row["reads"].get(kind, "")) for kind in kinds),
            " / ".join(str(row["counter_reads"][kind]) for kind in ("float32", "halfstep")),
            str(row["more_launches"]),
            _kb(row["copied_bytes"]),
        )
        clipped = " and clipping" if row["max_norm"] else ""
        found.setdefault((row["optimizer"], *cells), []).append(clipped)
    rows = [
        # clipping makes no difference where both rows are the same
        [cells[0] + (clipped[0] if len(clipped) == 1 else ""), *cells[1:]]
        for cells, clipped in found.items()
    ]
    head = (
        "optimizer", "bare, float32", "torch.amp", "halfstep", "halfstep, 'device'",
        "counters: bare / halfstep", "launches", "copies, KB",
    )  # fmt: skip
    return Table("host reads in one step, as the dispatcher sees them", head, rows)


TABLES |= {
    "host_time": (host_table,),
    "accumulation": (accumulation_table,),
    "compiled": (compiled_table, compiled_times),
    "whole_steps": (whole_steps.table,),
    "host_reads": (reads_table,),
}


EMULATED = (
    "\"CUDA's lists\" are CUDA's lists of operations, emulated on the CPU: counted, not timed. "
    '"Inputs cast" is cast_forward_inputs=True.'
)

INTRODUCTION = """\
# Benchmarks

This page is written by `python -m benchmarks` (`make bench`), which trains the same small models
in float32, with `torch.amp` and with halfstep, side by side in one process, and counts and times
what an optimizer step does. The numbers of this page:
{machine}

How it is measured:

- *Casts* change the dtype of a float tensor. They are counted where they reach the device, below
  autograd and autocast, over a whole step: forward, loss, backward, and an optimizer that makes
  none. *Groups* are casts of many tensors in one call (`_foreach_copy_`), which a GPU runs in a few
  launches. *KB cast* and *KB grouped* (1,000 bytes) are read and written by the two.
- *Launches* are operations that run something on the device, the optimizer's too; a grouped one is
  one, a view or an allocation none.
- *KB saved* is what the forward pass keeps for the backward pass: every storage once, without the
  model's own parameters and buffers, with 16-bit copies of them.
- *Time / float32* is the median, over rounds that time every style once in rotating order, of the
  time of a step over the time of the same step in float32 in the same round, with the quartiles
  of that ratio behind it; *time / torch.amp* is the same over torch.amp in the same dtype. The
  optimizer is `AdamW(fused=True)`. On a CPU the clock counts the processor time of this process,
  so that other work on the machine does not count.
- *CUDA* in a style's name: on a CPU, `torch.autocast` leaves softmax, norms and most losses in 16
  bits; on CUDA it sends them to float32. CUDA's lists are emulated here above autocast
  (`benchmarks/styles.py`), for `torch.amp` and for halfstep's default, which runs the code
  between layers under autocast, and not timed. On CUDA, softmax of float16 needs no cast of its
  own, because one kernel reads float16 and writes float32 and another does the reverse for the
  gradient; such casts do not count here. There is none for bfloat16. `functional="compute"`
  follows no lists. An RMSNorm in 16 bits has one kernel on CUDA; on a CPU it casts to float32 and
  back, with any lists.
- *Inputs cast* is `cast_forward_inputs=True`, for the models whose float32 inputs are the beginning
  of a residual stream: without it the stream stays float32, as under `torch.amp`.
- A cell is empty where nothing was measured, or there is nothing to compare with.

Step times on a CPU without 16-bit arithmetic say what 16 bits cost there, and nothing about a
GPU: `halfstep doctor --measure` says what they cost on yours.
"""


def page(results: Row, gpus: Sequence[str] = ()) -> str:
    """Return ``docs/benchmarks.md``; ``gpus`` are the pages of ``python -m benchmarks.gpu``."""
    parts = [
        INTRODUCTION.format(machine=sentence(results["machine"])),
        "## One optimizer step",
        STEPS,
    ]
    for counts, times, about in step_tables(results):
        parts += [f"### {counts.title}", about[0].upper() + about[1:] + "."]
        parts += [counts.markdown(), times.markdown()]
    for heading, text, tables in (
        ("Host time", HOST_TIME, [host_table]),
        ("Gradient accumulation", ACCUMULATION, [accumulation_table]),
        ("Compiled", COMPILED, [compiled_table, compiled_times]),
        ("A whole step in one graph", whole_steps.ABOUT, [whole_steps.table]),
        ("Host reads", HOST_READS, [reads_table]),
        ("Where halfstep is worse", worse.ABOUT, [worse.table]),
    ):
        parts += [f"## {heading}", text, *(make(results).markdown() for make in tables)]
    parts += [worse.reasons(), "## On a GPU", ON_A_GPU, *(gpus or [NO_GPU])]
    return "\n\n".join(part.strip() for part in parts) + "\n"


STEPS = """
Each row is compared with float32 and with `torch.amp` in its own dtype, in the same table. Made by
`python -m benchmarks --part steps`; one table by `--only NAME`. The LSTM in float32 is one kernel
of oneDNN, which has a 16-bit one for AVX-512 only: without it `torch.amp` fails, and halfstep's
LSTM runs as the small operations that it is made of."""

HOST_TIME = """
Models so small that a step is what the host does: Python, dispatch and launches. A GPU that waits
for its host waits this long. *16 bits throughout* is no mixed precision: weights, gradients and
optimizer in 16 bits, no policy, no loss scale, and two casts, of the inputs and of the outputs. No
mixed precision of these layers can take less. What else the host can save it saves in
[one graph](#a-whole-step-in-one-graph). Made by `python -m benchmarks --part host_time`."""

ACCUMULATION = """
All in bfloat16. Between the micro-batches of a step no weight changes; `weights_unchanged` says
so, and their copies are made once a step. `torch.autocast` keeps its copies only inside one
`with` block, here one a micro-batch, as its documentation advises. *Unchanged* rows have
`weights_unchanged`. Of the last two columns, one divides by torch.amp with this device's lists,
one by torch.amp with CUDA's; halfstep's default is compared with the same lists. Made by
`python -m benchmarks --part accumulation`."""

COMPILED = """
`torch.compile(backend="aot_eager")` runs the compiled graph operation by operation: its graphs,
casts and bytes are those of any backend, its time says only what the host does. Compared with
torch.amp and float32 compiled the same way. `halfstep rewrite` is `halfstep.torch.autocast`,
which has no eager form. *Breaks* are the places where Dynamo leaves the graph and begins
another, *recompiles* graphs made after the second step; a group counts as one of the casts. The
second table's third column compiles the whole step (forward, backward, loss scale, optimizer,
clearing the gradients) with `fullgraph=True`, in float16 where the style has 16 bits, and says
at which line torch leaves it. Made by `python -m benchmarks --part compiled`."""

ON_A_GPU = """
`make bench-gpu` (`python -m benchmarks.gpu`) measures GPT-2 124M, a 1B-parameter stack of Llama
blocks, ResNet-50, the article's three convolutions and an MLP of width 8192: time, peak memory,
share of the matrix units' peak, and the counts of this page, beside float32 with and without TF32,
`torch.amp` in both formats, Fabric's precision plugin, and Transformer Engine and torchao where
they are installed. It takes at most 8 minutes, and needs torch, this repository and its two
dependencies (NumPy, ml_dtypes). A row that cannot run, or not in its share of the time, says
why."""

NO_GPU = "No results are committed yet: none was at hand."

HOST_READS = """
A read of a value on the device makes a GPU wait until the host has seen it: the first four columns,
for the bare optimizer, with `GradScaler`, and with `LossScaleOptimizer` by itself and with
`skip='device'`. ASGD and Adafactor read values of their own there, which is no matter of the loss
scale. *Counters* are reads of what an optimizer keeps on the CPU wherever the parameters are, its
step counters above all: they wait for nothing. `LossScaleOptimizer` turns the fused kernel on where
there is one, which needs none of them. On a CPU the host looks at a flag where it lies, for
nothing; so that the reads of an accelerator show, that way is closed here. With `skip='device'` no
optimizer needs a read for the loss scale: where there is no fused kernel it is the *launches* of
the last columns more, and the *copies*, which exist until the step is over. Clipping changes none
of these numbers. Made by `python -m benchmarks --part host_reads`."""
