"""From a function to its painted program, and running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax

from ..core.formats import format_of
from ..core.paint import Kind, Node, OperationLists, paint
from ..core.policy import Policy
from . import _internals as internals
from .build import build
from .custom_rules import RUN, Rule
from .errors import NotTraceableError
from .evaluate import Frame, Painted
from .program import Place, Program, Step
from .scopes import split_scope

Wanted = bool | None
"""For an output: in 16 bits, in float32, or as it comes."""


@dataclass(frozen=True)
class Painter:
    """How to paint: the lists, and the policy of each scope.

    Attributes:
        lists: the kind of every primitive.
        low_dtype: the 16-bit dtype.
        float32_reason: for the place of an operation, why it stays in float32, if it does.
    """

    lists: OperationLists
    low_dtype: str
    float32_reason: Callable[[Place], str | None]

    def paint(self, program: Program, wanted: Sequence[Wanted]) -> Painted:
        """Paint a program whose outputs are wanted so."""
        for number, place in program.places.items():
            reason = self.float32_reason(place)
            if reason is not None:
                program.graph.nodes[number] = _kept(program.graph.nodes[number], reason)
        for slot, low in zip(program.region.outs, wanted, strict=True):
            value = program.slots[slot].value
            if value is not None:
                program.graph.add(_output(value, low))
        painting = paint(program.graph, format_of(self.low_dtype))
        return Painted(program, painting, self.low_dtype, self._run_custom)

    def _run_custom(self, painted: Painted, step: Step, frame: Frame) -> list[Any]:
        def rewrite(
            function: Callable[..., Any],
            arrays: Sequence[Any],
            low_inputs: Sequence[bool],
            wanted: Callable[[int], Sequence[Wanted]],
        ) -> list[Any]:
            inner = replace(self, float32_reason=self._inherited(step.place))
            return inner.rewritten(function, arrays, low_inputs, wanted)

        return RUN[step.kind](Rule(frame, step, rewrite))

    def _inherited(self, outer: Place) -> Callable[[Place], str | None]:
        """Rules stand where their function is called; their own scopes have no path."""

        def reason(place: Place) -> str | None:
            _, marked = split_scope(place.names)
            if marked is None:
                return self.float32_reason(outer)
            return None if Policy(marked).is_low else f"policy_scope({marked!r})"

        return reason

    def rewritten(
        self,
        function: Callable[..., Any],
        arrays: Sequence[Any],
        low_inputs: Sequence[bool],
        wanted: Callable[[int], Sequence[Wanted]],
    ) -> list[Any]:
        """Trace a function of flat arrays in float32, paint it, and run it on these arrays.

        Args:
            function: a function of arrays that returns a list of arrays.
            arrays: its arguments, some of them in 16 bits.
            low_inputs: which of them.
            wanted: from the number of outputs to what is wanted of each.
        """
        avals = [
            internals.with_dtype(jax.typeof(array), "float32") if low else jax.typeof(array)
            for array, low in zip(arrays, low_inputs, strict=True)
        ]
        with _naming_captures():
            closed = internals.trace(function, avals)
            program = build(closed, self.lists, low_inputs)
            outputs = wanted(len(program.region.outs))
            return run(self.paint(program, outputs), arrays, outputs)


def run(painted: Painted, arrays: Sequence[Any], wanted: Sequence[Wanted]) -> list[Any]:
    """Run a painted program; outputs in the dtypes that are wanted."""
    frame = Frame(painted)
    region = painted.program.region
    frame.run(region, arrays)
    return [
        frame.read(slot, painted.low(slot) if low is None else low)
        for slot, low in zip(region.outs, wanted, strict=True)
    ]


@contextmanager
def _naming_captures() -> Iterator[None]:
    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        raise NotTraceableError(
            "autocast: the rule of a custom_vjp or custom_jvp function captures an array that "
            "autocast traces, so that it cannot be differentiated afterwards, as under jit. Hand "
            "that array to the function as an argument, or put autocast around the gradient: "
            "autocast(jax.grad(f))."
        ) from error


def _kept(node: Node, reason: str) -> Node:
    return replace(
        node, kind=Kind.OPAQUE, because=reason, args=(), results=(),
        fixed_args=(*node.args, *node.fixed_args),
        fixed_results=(*node.results, *node.fixed_results),
    )  # fmt: skip


def _output(value: int, low: Wanted) -> Node:
    if low is None:
        return Node("output", Kind.CLEAR, args=(value,), because="as it comes")
    if low:
        return Node("output", Kind.LOW, args=(value,))
    return Node("output", Kind.OPAQUE, fixed_args=(value,), because="an output")
