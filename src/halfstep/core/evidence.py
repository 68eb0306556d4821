"""What is known of an operation that broke a step, and what can be said of it."""

from __future__ import annotations

from dataclasses import dataclass

from .fault import Direction, Kind, TensorFacts
from .formats import FORMATS, Format

_LEAST = 1e-8  # of the wide formats the smallest number is no help: 8 / 1e-38 is infinite


@dataclass(frozen=True)
class Evidence:
    """What is known about an operation that made something that is not finite, or only zeros.

    Attributes:
        operation: its name without a namespace, for instance ``"div"``.
        node: in a backward pass, the forward operation that it differentiates, for instance
            ``"sqrt"``; else empty.
        direction: of the pass.
        kind: what it made.
        dtype: what it computed in: its narrowest floating dtype, inputs and output.
        inputs: what went in.
        output: what came out.
        wider: what comes out of the same inputs in the next wider format, None if unknown.
        constants: the numbers that the operation was called with.
        epsilon: a number, added or clamped to shortly before, which is zero in ``dtype``.
        constant: whether nothing that went in can be learnt, as in a mask.
    """

    operation: str
    node: str
    direction: Direction
    kind: Kind
    dtype: str
    inputs: tuple[TensorFacts, ...]
    output: TensorFacts
    wider: TensorFacts | None = None
    constants: tuple[float, ...] = ()
    epsilon: float | None = None
    constant: bool = False

    @property
    def format(self) -> Format:
        """The format of ``dtype``."""
        return FORMATS.get(self.dtype, FORMATS["float32"])

    @property
    def least(self) -> float:
        """A number that a divisor may be: its reciprocal is finite, with room for a numerator."""
        return max(self.format.smallest_normal, _LEAST)

    @property
    def wider_helps(self) -> bool:
        """Whether the operation alone is finite (or not all zero) in the wider format."""
        if self.wider is None:
            return False
        if self.kind == "zero":
            return self.wider.zeros < self.wider.numel
        return self.wider.finite

    @property
    def zeros_in(self) -> bool:
        """Whether a zero went in."""
        return any(each.zeros for each in self.inputs)


@dataclass(frozen=True)
class Reason:
    """A cause, and the cure as far as it follows from the cause alone.

    Attributes:
        cause: one sentence.
        cure: a change to the code; empty where only another precision can help.
        rounding: whether narrow numbers are the cause, so that float32 cures it.
    """

    cause: str
    cure: str = ""
    rounding: bool = False
