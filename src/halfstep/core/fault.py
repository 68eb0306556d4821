"""A numerical fault of one training step: where an infinity or a NaN was made, why, and what helps.

Framework-free: a door fills it in, this says what it looks like.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import Literal

Kind = Literal["infinity", "NaN", "zero"]
Direction = Literal["forward", "backward"]

_MADE = {
    "infinity": "made an infinity",
    "NaN": "made a NaN",
    "zero": "rounded every value to zero",
}
_MOST_REACHED = 3
GRADIENT = "the gradient of "
"""How a gradient is named in `Fault.reached`."""

_WIDTH = 92


@dataclass(frozen=True)
class TensorFacts:
    """What a tensor held.

    Attributes:
        name: what the operation calls it, or the name of the parameter.
        shape: its shape.
        dtype: its dtype's name.
        low: its smallest finite value; NaN if it has none.
        high: its largest finite value; NaN if it has none.
        nearest_zero: its smallest finite magnitude above zero; NaN if it has none.
        zeros: how many values are zero.
        infinities: how many are infinite.
        nans: how many are NaN.

    >>> print(TensorFacts("mat2", (2, 3), "float16", -2.5, 4.0, 0.5, 0, 1, 0))
    mat2 (2, 3) float16, from -2.5 to 4, 1 of 6 infinite
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float
    nearest_zero: float
    zeros: int
    infinities: int
    nans: int

    @property
    def numel(self) -> int:
        """How many values there are."""
        return math.prod(self.shape)

    @property
    def largest(self) -> float:
        """The largest finite magnitude; 0 if there is none."""
        return 0.0 if math.isnan(self.high) else max(abs(self.low), abs(self.high))

    @property
    def finite(self) -> bool:
        """Whether every value is finite."""
        return not self.infinities and not self.nans

    def __str__(self) -> str:
        parts = [f"{self.name} {self.shape} {self.dtype}".strip()]
        if self.numel == 0:
            parts.append("empty")
        elif self.low == self.high:
            parts.append(f"all {self.high:.4g}" if self.finite else f"else {self.high:.4g}")
        elif not math.isnan(self.high):
            parts.append(f"from {self.low:.4g} to {self.high:.4g}")
        for count, word in ((self.infinities, "infinite"), (self.nans, "NaN")):
            if count:
                parts.append(f"{count} of {self.numel} {word}")
        if 0 < self.zeros < self.numel:
            parts.append(f"{self.zeros} of {self.numel} zero")
        return ", ".join(parts)


@dataclass(frozen=True)
class Fault:
    """Where the first value that is not finite was made in a step; it prints as a short report.

    Attributes:
        path: the module that ran the operation; ``""`` is the model itself, or the loss function.
        operation: the operation; in the backward pass with the node that it belongs to. For what
            came in broken already, ``"batch"`` or ``"parameter"``.
        direction: ``"forward"`` or ``"backward"``.
        kind: ``"infinity"``, ``"NaN"``, or ``"zero"`` where gradients vanished whole.
        cause: why, in one sentence.
        cure: the smallest change that helps.
        proof: what was replayed to know that the cure helps; ``""`` if nothing was.
        place: the module in words, with its class.
        dtype: what the operation computed in.
        limit: the largest number of that dtype.
        inputs: what went in.
        output: what came out, None where nothing was computed.
        source: file, line, function and text of the code that ran it; ``""`` if unknown.
        reached: what it spoilt: the loss, gradients, buffers. Nothing, if something later turned
            it into an ordinary number: the step went on with a wrong value.
        layers: the modules that ``cure`` would run in float32.
    """

    path: str
    operation: str
    direction: Direction
    kind: Kind
    cause: str
    cure: str
    proof: str = ""
    place: str = ""
    dtype: str = ""
    limit: float = math.inf
    inputs: tuple[TensorFacts, ...] = ()
    output: TensorFacts | None = None
    source: str = ""
    reached: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"{self._headline()}.", *self._lines()])

    def _headline(self) -> str:
        if self.operation in ("batch", "parameter"):
            return f"{self.place} was not finite before the step began"
        return f"{self.place} {_MADE[self.kind]} in the {self.direction} pass"

    def _lines(self) -> list[str]:
        rows: list[tuple[str, str]] = []
        if self.dtype:
            limit = f"{self.dtype}, largest number {self.limit:.6g}"
            rows.append(("operation", f"{self.operation} in {limit}"))
        if self.source:
            rows.append(("line", self.source))
        rows += [("input", str(each)) for each in self.inputs]
        if self.output is not None:
            rows.append(("output", str(self.output)))
        rows += [("cause", self.cause), ("cure", self.cure)]
        if self.proof:
            rows.append(("replayed", self.proof))
        rows.append(("reached", self._reached()))
        return [line for label, text in rows for line in _hang(label, text)]

    def _reached(self) -> str:
        if not self.reached:
            return "nothing: a later operation made ordinary, and wrong, numbers of it"
        gradients = [name for name in self.reached if name.startswith(GRADIENT)]
        if len(gradients) <= _MOST_REACHED:
            return ", ".join(self.reached)
        others = [name for name in self.reached if not name.startswith(GRADIENT)]
        first = gradients[0].removeprefix(GRADIENT)
        return ", ".join([*others, f"{len(gradients)} gradients ({first} and others)"])


def _hang(label: str, text: str) -> list[str]:
    """Wrap ``text`` behind a label; what cannot be broken stays whole."""
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"  {label:<10} ",
        subsequent_indent=" " * 13,
        break_long_words=False,
        break_on_hyphens=False,
    )
