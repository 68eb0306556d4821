"""Casts and gradients of rewritten graphs beside ``torch.autocast`` with the lists of CUDA.

``python -m benchmarks.torch_rewrite`` prints the table and writes it as JSON.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from halfstep.torch import autocast, explain

from .machine import describe, slug
from .measures import Observer
from .styles import CudaLists
from .tables import Table
from .workloads import Batch, Workload, workloads_for

RESULTS = Path(__file__).parent / "results"
DTYPE = torch.bfloat16


class WithLoss(nn.Module):
    """A model and its loss, so that one graph holds both."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.model, self.loss = workload.build("cpu"), workload.loss

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(self.model(inputs), targets)


@dataclass(frozen=True)
class Row:
    """What one model needs.

    Attributes:
        model: its name.
        about: sizes, in words.
        autocast_casts, rewritten_casts: of forward and backward pass.
        autocast_bytes, rewritten_bytes: that the casts write.
        autocast_error, rewritten_error: distance of the gradient from float32's, relative.
        low_products, products: matrix products in 16 bits, and all, in the rewritten graph.
    """

    model: str
    about: str
    autocast_casts: int
    rewritten_casts: int
    autocast_bytes: int
    rewritten_bytes: int
    autocast_error: float
    rewritten_error: float
    low_products: int
    products: int


def measure(workload: Workload) -> Row:
    """Count and compare one model."""
    model, batch = WithLoss(workload), workload.data("cpu")
    exact = _float32(model, batch)
    casts, written, theirs = _autocast(model, batch)
    torch._dynamo.reset()
    explanation = explain(model, backend="aot_eager")(*batch)
    low, products = explanation.low_products
    return Row(
        workload.name, workload.about, casts, explanation.casts, written, explanation.cast_bytes,
        _distance(theirs, exact), _distance(_rewritten(model, batch), exact), low, products,
    )  # fmt: skip


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
        "model", "casts, autocast", "casts, rewritten", "MB written, autocast",
        "MB written, rewritten", "gradient, autocast", "gradient, rewritten",
    )  # fmt: skip
    cells = [
        (
            row.model, str(row.autocast_casts), str(row.rewritten_casts),
            f"{row.autocast_bytes / 1e6:.2f}", f"{row.rewritten_bytes / 1e6:.2f}",
            f"{row.autocast_error:.4f}", f"{row.rewritten_error:.4f}",
        )
        for row in rows
    ]  # fmt: skip
    return Table("rewritten graphs beside torch.autocast with the lists of CUDA", head, cells)


def main() -> None:
    """Measure, show, write."""
    rows = []
    for workload in workloads_for("cpu"):
        try:
            rows.append(measure(workload))
        except Exception as error:  # noqa: BLE001 - a model that cannot be rewritten is a result
            print(f"{workload.name}: {type(error).__name__}: {error}")
    table(rows).show()
    print(table(rows).markdown())
    machine = describe("cpu")
    found = {"machine": machine, "rows": [asdict(row) for row in rows]}
    path = RESULTS / f"torch-rewrite-{slug(machine)}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
