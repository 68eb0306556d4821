"""Sums that the painter keeps in float32: streams, long rows of additions, and no biases."""

from __future__ import annotations

import pytest

from halfstep import format_of
from halfstep.core.paint import Graph, Kind, Node, Painting, Rule, paint

BF16, F16 = format_of("bfloat16"), format_of("float16")
KINDS = {
    "dot": Kind.ALLOW, "add": Kind.INFER, "mul": Kind.INFER, "move": Kind.CLEAR,
    "grid": Kind.OPAQUE, "output": Kind.OPAQUE,
}  # fmt: skip


class Sketch:
    """A graph of named values; ``add`` adds, and what is opaque takes and makes float32."""

    def __init__(self, **inputs: int) -> None:
        self.graph, self.values, self.made = Graph(), {}, {}
        for name, elements in inputs.items():
            value = self.values[name] = self.graph.value(elements)
            self.graph.add(Node("input", Kind.OPAQUE, fixed_results=(value,)))

    def op(self, name: str, *args: str, to: str = "", elements: int = 8) -> str:
        kind = KINDS[name]
        taken, made = tuple(self.values[arg] for arg in args), ()
        if to:
            self.values[to] = self.graph.value(elements)
            made = (self.values[to],)
        if kind is Kind.OPAQUE:
            node = Node(name, kind, fixed_args=taken, fixed_results=made)
        else:
            node = Node(name, kind, taken, made, accumulates=name == "add")
        self.made[to] = self.graph.add(node)
        return to

    def paint(self, fmt=BF16) -> Painting:
        self.painting = paint(self.graph, fmt)
        return self.painting

    def low(self, name: str) -> bool:
        return self.painting.low[self.made[name]]

    def rule(self, name: str) -> Rule:
        return self.painting.verdicts[self.made[name]].rule


def stream(sketch: Sketch, start: str, steps: int) -> list[str]:
    """``x = x + (x @ w)`` a few times, and a product at the end."""
    sums = []
    for step in range(steps):
        sketch.op("dot", start, "w", to=f"dot{step}")
        start = sketch.op("add", start, f"dot{step}", to=f"sum{step}")
        sums.append(start)
    sketch.op("dot", start, "w", to="head")
    sketch.op("output", "head")
    return sums


def test_a_stream_that_starts_in_float32_stays_there():
    sketch = Sketch(x=8, w=8)
    sums = stream(sketch, "x", 3)
    sketch.paint()
    assert [sketch.rule(name) for name in sums] == [Rule.ADDS] * 3
    assert sketch.low("dot1")


def test_a_stream_of_products_alone_is_painted():
    sketch = Sketch(x=8, w=8)
    sketch.op("dot", "x", "w", to="start")
    sums = stream(sketch, "start", 3)
    sketch.paint()
    assert all(sketch.low(name) for name in sums)


def test_what_leads_to_a_sum_in_float32_alone_is_float32_too():
    sketch = Sketch(x=8, w=8)
    sketch.op("dot", "x", "w", to="step")
    sketch.op("mul", "step", to="scaled")
    sketch.op("add", "x", "scaled", to="sum")
    sketch.op("mul", "sum", to="after")
    sketch.op("dot", "after", "w", to="y")
    sketch.paint()
    assert sketch.rule("sum") is Rule.ADDS
    assert sketch.rule("scaled") is sketch.rule("after") is Rule.NOT_BETWEEN


def biased() -> Sketch:
    sketch = Sketch(x=8, w=8, bias=2)
    sketch.op("move", "bias", to="wide")
    sketch.op("dot", "x", "w", to="product")
    sketch.op("add", "product", "wide", to="sum")
    return sketch


def test_a_bias_goes_with_its_product():
    sketch = biased()
    sketch.op("mul", "sum", "sum", to="squared")
    sketch.op("add", "sum", "squared", to="activation")
    sketch.op("dot", "activation", "w", to="y")
    sketch.op("output", "y")
    sketch.paint()
    assert sketch.low("sum")
    assert sketch.low("activation")
    assert sketch.low("wide")


def test_biased_products_that_are_added_are_painted():
    sketch = biased()
    sketch.op("dot", "x", "w", to="other")
    sketch.op("add", "other", "wide", to="sum2")
    sketch.op("add", "sum", "sum2", to="gate")
    sketch.op("dot", "gate", "w", to="y")
    sketch.paint()
    assert all(sketch.low(name) for name in ("sum", "sum2", "gate"))


def test_a_smaller_summand_that_starts_a_stream_is_no_bias():
    sketch = biased()
    sums = stream(sketch, "sum", 2)
    sketch.paint()
    assert {sketch.rule(name) for name in ("sum", *sums)} == {Rule.ADDS}


def test_a_summand_that_is_taken_away_again_is_no_bias():
    sketch = biased()
    sketch.op("add", "sum", "wide", to="difference")
    sketch.op("dot", "difference", "w", to="y")
    sketch.paint()
    assert sketch.rule("sum") is sketch.rule("difference") is Rule.ADDS


def test_a_sum_that_is_looked_at_in_float32_has_no_bias():
    for looked_at in (False, True):
        sketch = biased()
        if looked_at:
            sketch.op("grid", "sum", to="sampled")
        sketch.op("dot", "sum", "w", to="y")
        sketch.paint()
        assert sketch.low("sum") is not looked_at


@pytest.mark.parametrize(("fmt", "bears"), [(BF16, 64), (F16, 512)])
def test_a_row_of_many_additions_is_float32_whatever_it_adds(fmt, bears):
    for many in (bears, bears + 1):
        sketch = Sketch(x=8, w=8)
        state = sketch.op("dot", "x", "w", to="start")
        for step in range(many):
            sketch.op("dot", "x", "w", to=f"dot{step}")
            sketch.op("move", state, to=f"moved{step}")
            state = sketch.op("add", f"moved{step}", f"dot{step}", to=f"sum{step}")
        sketch.op("dot", state, "w", to="y")
        sketch.paint(fmt)
        assert sketch.low("sum0") is sketch.low(state) is (many == bears)
    assert str(sketch.painting.verdicts[sketch.made["sum0"]]) == (
        f"one of many additions in a row: {bears + 1}"
    )


@pytest.mark.parametrize("streams", [False, True])
def test_the_gradient_of_a_float32_stream_is_summed_in_float32(streams):
    sketch = Sketch(x=8, w=8, y=8)
    if streams:
        stream(sketch, "x", 2)
    gradient = sketch.op("dot", "y", "w", to="gradient")
    for step in range(2):
        sketch.op("dot", gradient, "w", to=f"back{step}")
        gradient = sketch.op("add", gradient, f"back{step}", to=f"gradient{step}")
    sketch.op("dot", gradient, "w", to="last")
    sketch.op("output", "last")
    sketch.paint()
    expected = Rule.GRADIENT if streams else Rule.BETWEEN
    assert sketch.rule("gradient0") is sketch.rule("gradient1") is expected
