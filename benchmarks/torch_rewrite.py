"""Casts, gradients and time of rewritten graphs beside ``torch.autocast``.

``python -m benchmarks.torch_rewrite`` prints the table and writes it as JSON. Casts are those of
autocast with the lists of CUDA; times are those of ``torch.compile`` with autocast as it is on this
machine, both compiled by Inductor, in turns.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from halfstep.errors import PolicyError
from halfstep.torch import autocast, explain

from .machine import describe, slug
from .measures import Observer, Timing, start, time_together
from .styles import CudaLists, Style
from .tables import Table
from .workloads import SMALL, Batch, LlamaBlock, Workload, workloads_for

RESULTS = Path(__file__).parent / "results"
DTYPE = torch.bfloat16
TIMED = ("gpt-fused", "mlp", "llama")
SECONDS = 6.0


class WithLoss(nn.Module):
    """A model and its loss, so that one graph holds both."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.model, self.loss = workload.build("cpu"), workload.loss

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(self.model(inputs), targets)


class WrittenNorm(nn.Module):
    """RMSNorm written with power, mean and square root, as Llama's own code has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Llama(nn.Module):
    """Three Llama blocks between an embedding and a head."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(LlamaBlock(width, 4, 4, 2 * width) for _ in range(3)))
        for block in self.blocks:
            block.norm1, block.norm2 = WrittenNorm(width), WrittenNorm(width)
        self.norm, self.head = WrittenNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens))))
        return logits


def llama_as_written() -> Workload:
    """A language model with every norm written out."""
    language = next(each for each in workloads_for("cpu") if each.name == "lm-fused")
    return dataclasses.replace(
        language,
        name="lm-llama",
        about="Llama with an embedding, a head and norms written out: 3 layers, width 64, 4 heads",
        model=lambda: Llama(SMALL.vocabulary, SMALL.width),
    )


@dataclass(frozen=True)
class Row:
    """What one model needs.

    Attributes:
        model: its name.
        about: sizes, in words.
        autocast_casts, rewritten_casts: of forward and backward pass; None where it does not run.
        autocast_bytes, rewritten_bytes: that the casts write.
        autocast_error, rewritten_error: distance of the gradient from float32's, relative.
        low_products, products: matrix products in 16 bits, and all, in the rewritten graph.
        uncaptured: modules that are in no graph and stay in float32.
        why: what torch.autocast said, where it does not run.
        refused: what halfstep's autocast said, where it does not run.
        time: of a step compiled by Inductor, beside torch.compile with torch.autocast.
    """

    model: str
    about: str
    autocast_casts: int | None
    rewritten_casts: int | None
    autocast_bytes: int | None
    rewritten_bytes: int | None
    autocast_error: float | None
    rewritten_error: float | None
    low_products: int = 0
    products: int = 0
    uncaptured: tuple[str, ...] = ()
    why: str = ""
    refused: str = ""
    time: Timing | None = None


def measure(workload: Workload) -> Row:
    """Count and compare one model."""
    model, batch = WithLoss(workload), workload.data("cpu")
    exact = _float32(model, batch)
    casts: int | None = None
    written: int | None = None
    error: float | None = None
    why = ""
    try:
        casts, written, theirs = _autocast(model, batch)
        error = _distance(theirs, exact)
    except RuntimeError as failed:
        why = str(failed).splitlines()[0].split(". ")[0]
    theirs_only = Row(
        workload.name, workload.about, casts, None, written, None, error, None, why=why
    )  # fmt: skip
    torch._dynamo.reset()
    try:
        explanation = explain(model, backend="aot_eager")(*batch)
    except PolicyError as failed:
        return dataclasses.replace(theirs_only, refused=str(failed))
    low, products = explanation.low_products
    return dataclasses.replace(
        theirs_only,
        rewritten_casts=explanation.casts,
        rewritten_bytes=explanation.cast_bytes,
        rewritten_error=_distance(_rewritten(model, batch), exact),
        low_products=low,
        products=products,
        uncaptured=explanation.uncaptured,
        time=_time(workload) if workload.name in TIMED else None,
    )


def _time(workload: Workload) -> Timing:
    styles = [Style("float32", backend="inductor")]
    styles += [Style(kind, DTYPE, backend="inductor") for kind in ("torch.amp", "halfstep rewrite")]
    torch._dynamo.reset()
    trainings = [start(workload, style, "cpu") for style in styles]
    return time_together(trainings, seconds=SECONDS, steps=3)[styles[-1].name]


def _float32(model: nn.Module, batch: Batch) -> Tensor:
    mine = copy.deepcopy(model)
    mine(*batch).backward()
    return _gradient(mine)


def _autocast(model: nn.Module, batch: Batch) -> tuple[int, int, Tensor]:
    mine = copy.deepcopy(model)
    with Observer() as observer:
        with torch.autocast("cpu", DTYPE), CudaLists():
            loss = mine(*batch)
        loss.backward()
    # what is moved is read and written, 2 + 4 bytes a number
    sizes = {"float32": 4, "bfloat16": 2}
    written = sum(cast.moved * sizes[cast.after] // 6 for cast in observer.casts)
    return len(observer.casts), written, _gradient(mine)


def _rewritten(model: nn.Module, batch: Batch) -> Tensor:
    mine = copy.deepcopy(model)
    autocast(mine, backend="aot_eager")(*batch).backward()
    return _gradient(mine)


def _gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _distance(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


def table(rows: list[Row]) -> Table:
    """The table of the page."""
    head = (
        "model", "casts: autocast / rewritten", "MB: autocast / rewritten",
        "gradient error: autocast / rewritten", "compiled step / autocast's (quartiles)",
    )  # fmt: skip
    return Table("rewritten graphs beside torch.autocast", head, [_cells(row) for row in rows])


def _cells(row: Row) -> tuple[str, ...]:
    ratio = None if row.time is None else row.time.to_amp
    return (
        row.model,
        "{} / {}".format(
            "fails" if row.autocast_casts is None else row.autocast_casts,
            "refused" if row.rewritten_casts is None else row.rewritten_casts,
        ),
        _pair(row.autocast_bytes, row.rewritten_bytes, 1e6, 2),
        _pair(row.autocast_error, row.rewritten_error, 1, 4),
        "" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f} - {ratio.high:.2f})",
    )


def _pair(theirs: float | None, ours: float | None, unit: float, digits: int) -> str:
    if theirs is None and ours is None:
        return ""
    return " / ".join(
        "none" if value is None else f"{value / unit:.{digits}f}" for value in (theirs, ours)
    )


def notes(rows: list[Row]) -> list[str]:
    """What the table cannot say: what failed, and what was left in float32."""
    found = []
    for row in rows:
        if row.why:
            found.append(f"{row.model}: torch.autocast does not run here: {row.why}.")
        if row.refused:
            found.append(f"{row.model}: {row.refused}")
        if row.uncaptured:
            left = ", ".join(row.uncaptured)
            found.append(
                f"{row.model}: Dynamo does not capture {left}: float32, and {row.low_products} of "
                f"the {row.products} matrix products that it does capture in 16 bits."
            )
    return found


def main() -> None:
    """Measure, show, write."""
    warnings.simplefilter("ignore")  # what is not captured stands in the rows
    workloads = (*workloads_for("cpu"), llama_as_written())
    rows = [measure(workload) for workload in workloads]
    table(rows).show()
    print(table(rows).markdown(), *notes(rows), sep="\n")
    machine = describe("cpu")
    found = {"machine": machine, "rows": [asdict(row) for row in rows]}
    path = RESULTS / f"torch-rewrite-{slug(machine)}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
