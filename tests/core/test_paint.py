"""The painter, on graphs made by hand and at random."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from halfstep import PolicyError, format_of
from halfstep.core.paint import (
    Explanation,
    Graph,
    Kind,
    Node,
    OperationLists,
    Painting,
    Row,
    Rule,
    paint,
)

BF16, F16 = format_of("bfloat16"), format_of("float16")
KINDS = {
    "dot": Kind.ALLOW,
    "exp": Kind.DENY,
    "add": Kind.INFER,
    "mul": Kind.INFER,
    "move": Kind.CLEAR,
    "fft": Kind.OPAQUE,
}


class Sketch:
    """A graph by names: ``sketch.op("dot", "x", "w", to="y")``."""

    def __init__(self, *inputs: str) -> None:
        self.graph = Graph()
        self.values: dict[str, int] = {}
        self.nodes: dict[str, int] = {}
        for name in inputs:
            self.input(name)

    def value(self, name: str, elements: int = 8) -> int:
        if name not in self.values:
            self.values[name] = self.graph.value(elements)
        return self.values[name]

    def input(self, name: str, elements: int = 8, low: bool = False) -> None:
        value = self.value(name, elements)
        node = Node("input", Kind.OPAQUE, fixed_results=(value,))
        if low:
            node = Node("input", Kind.LOW, results=(value,))
        self.graph.add(node)

    def constant(self, name: str, number: float) -> None:
        self.values[name] = self.graph.value(0, np.asarray(number, np.float32))

    def op(self, name: str, *args: str, to: str, elements: int = 8, **fields) -> None:
        kind = KINDS[name]
        node = Node(
            name,
            kind,
            tuple(self.value(arg) for arg in args),
            (self.value(to, elements),),
            accumulates=name == "add",
            **fields,
        )
        if kind is Kind.OPAQUE:
            node = replace(
                node, args=(), results=(), fixed_args=node.args, fixed_results=node.results
            )
        self.nodes[to] = self.graph.add(node)

    def carry(self, start: str, back: str, inner: str, final: str) -> None:
        node = Node(
            "carry",
            Kind.CLEAR,
            (self.value(start), self.value(back)),
            (self.value(inner), self.value(final)),
            carries=True,
        )
        self.nodes[inner] = self.nodes[final] = self.graph.add(node)

    def output(self, name: str, low: bool = False) -> None:
        value = (self.value(name),)
        node = Node("output", Kind.OPAQUE, fixed_args=value)
        self.graph.add(Node("output", Kind.LOW, args=value) if low else node)

    def paint(self, fmt=BF16, **options) -> Painting:
        self.painting = paint(self.graph, fmt, **options)
        return self.painting

    def low(self) -> set[str]:
        return {name for name, node in self.nodes.items() if self.painting.low[node]}

    def rule(self, name: str) -> Rule:
        return self.painting.verdicts[self.nodes[name]].rule

    def casts(self) -> set[tuple[str, bool]]:
        names = {value: name for name, value in self.values.items()}
        return {(names[value], low) for value, low in self.painting.casts}


def chain(*operations: str) -> Sketch:
    """``x`` through operations one after the other; their results are ``v0``, ``v1``, ..."""
    sketch = Sketch("x")
    before = "x"
    for place, name in enumerate(operations):
        sketch.op(name, before, to=f"v{place}")
        before = f"v{place}"
    sketch.output(before)
    sketch.paint()
    return sketch


def test_what_is_on_the_allow_list_is_painted_and_cast_on_both_sides():
    sketch = chain("dot")
    assert sketch.low() == {"v0"}
    assert sketch.rule("v0") is Rule.ALLOWED
    assert sketch.casts() == {("x", True), ("v0", False)}


def test_consumers_share_a_cast():
    sketch = Sketch("x")
    for to in ("a", "b", "c"):
        sketch.op("dot", "x", to=to)
        sketch.output(to)
    sketch.paint()
    assert sketch.casts() == {("x", True), ("a", False), ("b", False), ("c", False)}


def test_deny_spreads_to_arithmetic_but_not_to_the_moves_behind_it():
    sketch = chain("exp", "mul", "move", "mul", "move", "dot")
    assert sketch.low() == {"v5", "v4"}
    assert [sketch.rule(f"v{n}") for n in range(4)] == [Rule.DENIED, *[Rule.AFTER_DENY] * 3]
    assert sketch.painting.verdicts[sketch.nodes["v3"]].root == sketch.nodes["v0"]


def test_products_stop_what_deny_spreads():
    assert chain("exp", "mul", "dot", "mul", "dot").low() == {"v2", "v3", "v4"}


def test_what_lies_between_products_is_painted():
    sketch = chain("dot", "add", "move", "mul", "dot", "add")
    assert sketch.low() == {"v0", "v1", "v2", "v3", "v4"}
    assert sketch.rule("v1") is Rule.BETWEEN
    assert sketch.rule("v5") is Rule.NOT_BETWEEN


def test_what_is_on_no_list_stops_everything():
    assert chain("dot", "add", "fft", "add", "dot").low() == {"v0", "v4"}


def test_arithmetic_before_and_after_the_only_product_stays():
    assert chain("add", "dot", "add").low() == {"v1"}


def test_the_residual_stream_stays_in_float32():
    sketch = Sketch("x", "w")
    sketch.op("exp", "x", to="norm")
    sketch.op("dot", "norm", to="hidden")
    sketch.op("add", "x", "hidden", to="stream")
    sketch.op("exp", "stream", to="norm2")
    sketch.op("dot", "norm2", to="y")
    sketch.output("y")
    sketch.paint()
    assert sketch.low() == {"hidden", "y"}
    sketch.paint(follow_allow=True)
    assert sketch.low() == {"hidden", "y", "stream"}
    assert sketch.rule("stream") is Rule.FOLLOWS_ALLOW


def test_moves_follow_when_nobody_can_notice():
    behind, front = chain("dot", "move", "exp"), chain("exp", "move", "dot")
    assert behind.rule("v1") is Rule.FOLLOWS_INPUTS
    assert front.rule("v1") is Rule.FOLLOWS_USES


def test_a_move_with_a_float32_use_is_not_rounded_for_the_product_beside_it():
    sketch = Sketch("x")
    sketch.op("move", "x", to="moved")
    sketch.op("dot", "moved", to="y")
    sketch.op("exp", "moved", to="z")
    sketch.output("y")
    sketch.output("z")
    sketch.paint()
    assert sketch.low() == {"y"}
    assert sketch.rule("moved") is Rule.NOT_FREE


@pytest.mark.parametrize(("rows", "painted"), [(4, False), (64, True)])
def test_a_table_is_not_cast_for_a_few_of_its_rows(rows, painted):
    sketch = Sketch()
    sketch.input("table", elements=64)
    sketch.op("move", "table", to="rows", elements=rows)
    sketch.op("dot", "rows", to="y")
    sketch.output("y")
    sketch.paint()
    assert ("rows" in sketch.low()) == painted
    assert ("table", True) in sketch.casts() or ("rows", True) in sketch.casts()


# constants


@pytest.mark.parametrize(
    ("number", "fmt", "denied"),
    [
        (np.finfo(np.float32).min, BF16, True),
        (-1e9, BF16, False),
        (-1e9, F16, True),
        (1e-8, F16, True),
        (1e-8, BF16, False),
        (-np.inf, F16, False),
        (0.0, F16, False),
        (0.5, F16, False),
        (65504.0, F16, False),
    ],
)
def test_a_constant_that_does_not_fit_denies(number, fmt, denied):
    sketch = Sketch("x")
    sketch.constant("c", number)
    sketch.op("dot", "x", to="scores")
    sketch.op("move", "scores", "c", to="masked")
    sketch.op("mul", "masked", to="scaled")
    sketch.op("dot", "scaled", to="y")
    sketch.output("y")
    sketch.paint(fmt)
    assert sketch.low() == ({"scores", "y"} if denied else {"scores", "masked", "scaled", "y"})
    if denied:
        assert sketch.rule("masked") is Rule.CONSTANT
        assert sketch.rule("scaled") is Rule.AFTER_DENY
        assert fmt.name in sketch.painting.verdicts[sketch.nodes["masked"]].detail


def test_a_product_with_a_constant_that_does_not_fit_stays():
    sketch = Sketch("x")
    sketch.constant("c", 1e30)
    sketch.op("dot", "x", "c", to="y")
    sketch.output("y")
    assert not any(sketch.paint(F16).low)


def test_tiny_numbers_in_an_array_are_data_but_huge_ones_are_not():
    for numbers, expected in (([1e-9, 1.0], True), ([1e9, 1.0], False)):
        sketch = Sketch("x")
        sketch.values["c"] = sketch.graph.value(2, np.asarray(numbers, np.float32))
        sketch.op("dot", "x", "c", to="y")
        sketch.output("y")
        assert sketch.paint(F16).low[sketch.nodes["y"]] is expected


def test_exact_constants_do_not_keep_a_move_in_float32():
    for number, rule in ((0.0, Rule.FOLLOWS_INPUTS), (0.1, Rule.NOT_FREE)):
        sketch = Sketch("x")
        sketch.constant("c", number)
        sketch.op("move", "c", to="filled")
        sketch.op("dot", "x", to="y")
        sketch.op("move", "y", "filled", to="chosen")
        sketch.op("exp", "chosen", to="z")
        sketch.output("z")
        sketch.paint()
        assert sketch.rule("chosen") is rule


# loops


def loop(*, start_low: bool, body: list[tuple[str, ...]], final_to: str) -> Sketch:
    sketch = Sketch("w")
    sketch.input("start", low=start_low)
    sketch.carry("start", "back", "inner", "final")
    for name, *args, to in body:
        sketch.op(name, *args, to=to)
    sketch.op(final_to, "final", to="y")
    sketch.output("y")
    sketch.paint()
    return sketch


def test_a_carry_between_products_is_painted():
    sketch = loop(
        start_low=False,
        body=[("dot", "inner", "w", "h"), ("mul", "h", "back")],
        final_to="move",
    )
    assert {"inner", "h", "back"} <= sketch.low()


def test_a_carry_that_starts_in_float32_and_ends_there_is_cast_in_the_loop():
    sketch = loop(start_low=False, body=[("dot", "inner", "w", "back")], final_to="exp")
    sketch2 = loop(
        start_low=False, body=[("exp", "inner", "e"), ("dot", "e", "w", "back")], final_to="exp"
    )
    assert "inner" in sketch.low()  # its only use inside is the product, and it leads there
    assert "inner" not in sketch2.low()
    assert ("back", False) in sketch2.casts()


def test_a_carry_low_at_both_ends_is_painted():
    sketch = loop(
        start_low=True, body=[("exp", "inner", "e"), ("dot", "e", "back")], final_to="exp"
    )
    assert "inner" in sketch.low()
    assert sketch.rule("inner") is Rule.FOLLOWS_INPUTS


def test_a_denied_carry_keeps_the_body_in_float32():
    sketch = loop(start_low=False, body=[("exp", "inner", "back")], final_to="mul")
    assert not sketch.low()


def test_a_sum_over_a_loop_stays_in_float32_and_the_rest_of_the_body_does_not():
    sketch = loop(
        start_low=False,
        body=[("mul", "inner", "m"), ("dot", "m", "h"), ("mul", "h", "g"), ("dot", "g", "u"),
              ("add", "inner", "u", "back")],
        final_to="dot",
    )  # fmt: skip
    assert sketch.rule("back") is Rule.ACCUMULATES
    assert {"h", "g", "u", "y"} <= sketch.low()
    assert "inner" not in sketch.low()


def test_a_carry_that_the_body_hands_back_unchanged_takes_the_dtype_of_its_start():
    sketch = Sketch()
    sketch.input("start", low=True)
    sketch.carry("start", "inner", "inner", "final")
    sketch.op("exp", "final", to="y")
    sketch.output("y")
    sketch.paint()
    assert "final" in sketch.low()


# boundaries


def test_inputs_and_outputs_that_are_low_already_need_no_cast():
    sketch = Sketch()
    sketch.input("x", low=True)
    sketch.op("mul", "x", to="y")
    sketch.output("y", low=True)
    sketch.paint()
    assert sketch.low() == {"y"}
    assert sketch.painting.casts == ()


def test_fixed_arguments_and_results_stay_in_float32():
    graph = Graph()
    x, stats, y, seen = (graph.value() for _ in range(4))
    graph.add(Node("input", Kind.OPAQUE, fixed_results=(x, stats)))
    norm = graph.add(
        Node("norm", Kind.ALLOW, (x,), (y,), fixed_args=(stats,), fixed_results=(seen,))
    )
    graph.add(Node("output", Kind.OPAQUE, fixed_args=(y, seen)))
    painting = paint(graph, BF16)
    assert painting.low[norm]
    assert painting.low_values == (False, False, True, False)
    assert set(painting.casts) == {(x, True), (y, False)}


# any graph


@st.composite
def graphs(draw) -> Graph:
    graph = Graph()
    values = [graph.value(draw(st.integers(1, 4))) for _ in range(draw(st.integers(1, 3)))]
    for value in values:
        if draw(st.booleans()):
            graph.add(Node("input", Kind.LOW, results=(value,)))
        else:
            graph.add(Node("input", Kind.OPAQUE, fixed_results=(value,)))
    numbers = st.sampled_from([0.0, 0.1, 1e-8, 1e9, float("inf")])
    loops = []
    for _ in range(draw(st.integers(1, 14))):
        args = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
        if draw(st.integers(0, 4)) == 0:
            args.append(graph.value(0, np.asarray(draw(numbers), np.float32)))
        results = [graph.value(draw(st.integers(1, 4))) for _ in range(draw(st.integers(1, 2)))]
        if draw(st.integers(0, 5)) == 0:
            loops.append(
                graph.add(Node("carry", Kind.CLEAR, (args[0],), (*results,), carries=True))
            )
        else:
            kind = draw(st.sampled_from([*Kind]))
            fixed = kind is Kind.OPAQUE
            graph.add(
                Node(
                    "op", kind if kind is not Kind.LOW else Kind.ALLOW,
                    () if fixed else (*args,), () if fixed else (*results,),
                    (*args,) if fixed else (), (*results,) if fixed else (),
                    accumulates=draw(st.booleans()),
                )
            )  # fmt: skip
        values += results
    for number in loops:  # close the loops with any value that comes later
        node = graph.nodes[number]
        back = draw(st.sampled_from([v for v in values if v >= node.results[0]]))
        graph.nodes[number] = replace(node, args=(*node.args, back))
    for value in draw(st.lists(st.sampled_from(values), max_size=3)):
        graph.add(Node("output", Kind.OPAQUE, fixed_args=(value,)))
    return graph


def rewritten(graph: Graph, painting: Painting) -> Graph:
    """What a framework holds once it has applied a painting: casts are operations, and what is
    in 16 bits is float32 no more."""
    low = set(painting.casts)
    after = Graph(values=list(graph.values))
    cast_to: dict[tuple[int, bool], int] = {}
    for value, is_low in enumerate(painting.low_values):
        if (value, not is_low) in low:
            cast_to[value, not is_low] = after.value(graph.values[value].elements)
    other = dict(enumerate(painting.low_values))

    def read(value: int, want_low: bool) -> int:
        return value if other[value] == want_low else cast_to.get((value, want_low), value)

    for node, is_low in zip(graph.nodes, painting.low, strict=True):
        fixed = tuple(read(value, False) for value in node.fixed_args)
        if not is_low:
            args = tuple(read(value, False) for value in node.args)
            after.add(replace(node, args=args, fixed_args=fixed))
        elif fixed or node.fixed_results:
            after.add(
                Node(node.name, Kind.OPAQUE, fixed_args=fixed, fixed_results=node.fixed_results)
            )
    for (value, to_low), made in cast_to.items():
        if to_low:
            after.add(Node("cast", Kind.CLEAR, args=(value,)))
        else:
            after.add(Node("cast", Kind.CLEAR, results=(made,)))
    return after


@settings(max_examples=100, deadline=None)
@given(graphs(), st.sampled_from([BF16, F16]), st.booleans())
def test_no_graph_breaks_the_rules(graph, fmt, follow):
    before = list(graph.nodes)
    painting = paint(graph, fmt, follow_allow=follow)
    assert graph.nodes == before
    for node, low in zip(graph.nodes, painting.low, strict=True):
        if node.kind in (Kind.DENY, Kind.OPAQUE):
            assert not low
        if node.kind is Kind.LOW:
            assert low
    # wherever two dtypes meet there is a cast, and nowhere else
    produced = {v: n for n, node in enumerate(graph.nodes) for v in node.results}
    fixed = {v for node in graph.nodes for v in node.fixed_results}
    needed = set()
    for number, node in enumerate(graph.nodes):
        wanted = [(v, painting.low[number]) for v in node.args] + [
            (v, False) for v in node.fixed_args
        ]
        for value, want in wanted:
            made = painting.low[produced[value]] if value in produced else False
            if made != want and (value in produced or value in fixed):
                needed.add((value, want))
    assert set(painting.casts) == needed
    assert len(painting.casts) == len(needed)


@settings(max_examples=100, deadline=None)
@given(graphs(), st.sampled_from([BF16, F16]))
def test_painting_twice_changes_nothing(graph, fmt):
    first = paint(graph, fmt)
    again = paint(rewritten(graph, first), fmt)
    assert not any(again.low)
    assert again.casts == ()


@settings(max_examples=60, deadline=None)
@given(graphs(), st.sampled_from([BF16, F16]))
def test_every_verdict_says_what_was_done(graph, fmt):
    low = {
        Rule.ALLOWED, Rule.BETWEEN, Rule.FOLLOWS_INPUTS, Rule.FOLLOWS_USES, Rule.FOLLOWS_ALLOW,
        Rule.ALREADY,
    }  # fmt: skip
    painting = paint(graph, fmt)
    for is_low, verdict in zip(painting.low, painting.verdicts, strict=True):
        assert (verdict.rule in low) == is_low
        if verdict.rule is Rule.AFTER_DENY:
            assert painting.verdicts[verdict.root].rule in (Rule.DENIED, Rule.CONSTANT)


# lists and the table


def test_an_operation_is_on_one_list_only():
    with pytest.raises(PolicyError, match="'exp' is on two lists, allow and deny"):
        OperationLists(allow={"exp": ""}, deny={"exp": ""})


def test_lists_can_be_changed_and_narrowed():
    lists = OperationLists({"dot": "fast"}, {"exp": "grows"}, {"add": "plain"}, {"move": "moves"})
    changed = lists.changed(allow=["exp"], deny=["add"])
    assert changed.kind("exp")[0] is Kind.ALLOW
    assert changed.kind("add")[0] is Kind.DENY
    assert lists.kind("exp")[0] is Kind.DENY
    only = lists.matrix_products_only()
    assert [only.kind(n)[0] for n in ("dot", "exp", "add", "move")] == [
        Kind.ALLOW,
        *[Kind.OPAQUE] * 3,
    ]


def test_an_unknown_operation_is_named_with_the_nearest():
    lists = OperationLists({"dot_general": ""}, {})
    with pytest.raises(PolicyError, match=r"'dot_genral'.*Did you mean 'dot_general'"):
        lists.check_known("allow", ["dot_genral"])
    lists.check_known("allow", ["my_kernel"], others=["my_kernel"])


def test_the_table_counts_work_and_not_lines():
    rows = (
        Row("a.py:1", "", "dot", "4x4", "bfloat16", "", flops=300),
        Row("a.py:2", "", "dot", "4x4", "float32", "", flops=100),
        Row("a.py:3", "", "exp", "4", "float32", ""),
    )
    explanation = Explanation(rows, "bfloat16", casts=3, cast_bytes=4096)
    assert explanation.low_products == (1, 2)
    assert explanation.low_flops_share == 0.75
    assert explanation.count()["dot", "float32"] == 1
    assert "1 of 2, 75.0 %" in str(explanation)
    assert "4.0 KiB" in str(explanation)


def test_a_table_without_products_has_no_share():
    assert Explanation((), "float16", 0, 0).low_flops_share == 0.0
