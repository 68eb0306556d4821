"""The same numbers into TensorBoard, by the methods of a ``SummaryWriter``."""

from __future__ import annotations

from typing import Any, Protocol

from .recording import StepNumbers


class SummaryWriter(Protocol):
    """What is asked of a writer; ``torch.utils.tensorboard.SummaryWriter`` has it."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int | None = None) -> None:
        """Write one number."""

    def add_histogram_raw(
        self, tag: str, min: float, max: float, num: int, sum: float, sum_squares: float,
        bucket_limits: Any, bucket_counts: Any, global_step: int | None = None,
    ) -> None:  # fmt: skip
        """Write a histogram that has been counted."""


class Board:
    """Writes recorded steps as histograms of exponents, and shares lost in float16 as scalars.

    The x axis of a histogram is log2 of the absolute value, so that small gradients do not all
    fall into one bar.
    """

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def add(self, step: int, numbers: StepNumbers, keys: list[tuple[str, str, str]]) -> None:
        """Write a recorded step; ``keys`` are kind, path and name of each id."""
        for row in numbers.rows:
            kind, path, name = keys[row["id"]]
            tag = f"{kind}/{'.'.join(part for part in (path, name) if part)}"
            self._histogram(tag, row, step)
            lost = sum(row.get("float16", [0, 0])[:2])
            counted = sum(row.get("counts", ()))
            self._writer.add_scalar(f"lost in float16/{tag}", lost / max(1, counted), step)
        self._writer.add_scalar("loss scale", numbers.scale, step)
        if numbers.loss is not None:
            self._writer.add_scalar("loss", numbers.loss, step)

    def _histogram(self, tag: str, row: dict[str, Any], step: int) -> None:
        counts = row.get("counts")
        if not counts:
            return
        low = row["low"]
        middles = [low + place + 0.5 for place in range(len(counts))]
        self._writer.add_histogram_raw(
            tag,
            min=low,
            max=low + len(counts),
            num=sum(counts),
            sum=sum(m * c for m, c in zip(middles, counts, strict=True)),
            sum_squares=sum(m * m * c for m, c in zip(middles, counts, strict=True)),
            bucket_limits=[low + place + 1 for place in range(len(counts))],
            bucket_counts=counts,
            global_step=step,
        )

    def event(self, event: dict[str, Any]) -> None:
        """Write what happened to the loss scale."""
        if event["event"] == "skip":
            fault = event["verdict"] == "fault"
            self._writer.add_scalar("skipped step (2: a fault)", 1 + fault, event["step"])
            self._writer.add_scalar("loss scale", event["next_scale"], event["step"])
        elif event["event"] == "scale":
            self._writer.add_scalar("loss scale", event["scale"], event["step"])
