"""The passes: from a graph to the colour of every node, with the rule that decided.

After TensorFlow's ``auto_mixed_precision`` optimizer
(``tensorflow/core/grappler/optimizers/auto_mixed_precision.cc``), with these differences: a
constant that does not fit the format denies, a sum over a loop denies, written out or not, what
is added to a float32 value stays float32 unless that is a bias, operations without arithmetic
follow only where rounding cannot be noticed, the pass that rounds the residual stream is off, and
every decision has its reason.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..formats import Format
from .graph import Edges, Graph, Kind, Node
from .streams import Streams, gradients, long_sums, longest_sum

_PASSIVE = (Kind.INFER, Kind.CLEAR)


class Rule(enum.Enum):
    """The rule that gave a node its colour."""

    ALLOWED = "on the allow list"
    BETWEEN = "between 16-bit operations"
    FOLLOWS_INPUTS = "moves 16-bit inputs"
    FOLLOWS_USES = "every use of it is in 16 bits"
    FOLLOWS_ALLOW = "follows a 16-bit input"
    ALREADY = "in 16 bits already"
    DENIED = "on the deny list"
    CONSTANT = "a constant does not fit"
    ACCUMULATES = "sums up over a loop"
    LONG_SUM = "one of many additions in a row"
    ADDS = "adds to a float32 value"
    GRADIENT = "may add up the gradient of a float32 sum"
    AFTER_DENY = "computes with the result of a denied operation"
    OPAQUE = "left alone"
    NOT_BETWEEN = "not between 16-bit operations"
    NOT_FREE = "has float32 inputs and float32 uses"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a node has its colour.

    Attributes:
        rule: the rule that decided.
        detail: the constant, or the reason that the list gives.
        root: the node that the rule started from, for :attr:`Rule.AFTER_DENY`.
    """

    rule: Rule
    detail: str = ""
    root: int | None = None

    def __str__(self) -> str:
        return f"{self.rule.value}: {self.detail}" if self.detail else self.rule.value


@dataclass(frozen=True)
class Painting:
    """The answer: which nodes run in 16 bits, which values are, and why.

    Attributes:
        low: for every node, whether it runs in 16 bits.
        low_values: for every value, whether its producer makes it in 16 bits.
        verdicts: for every node, why.
        casts: ``(value, to 16 bits)`` for every cast; consumers of a value share it.
    """

    low: tuple[bool, ...]
    low_values: tuple[bool, ...]
    verdicts: tuple[Verdict, ...]
    casts: tuple[tuple[int, bool], ...]


def paint(graph: Graph, fmt: Format, *, follow_allow: bool = False) -> Painting:
    """Decide which nodes of a graph run in a 16-bit format.

    ::

        low  := nodes on the allow list
        deny := nodes on the deny list, with a constant that does not fit, that sum over a loop,
            or of more additions in a row than the format bears
        deny spreads forwards through infer and clear nodes, but not into the clear nodes behind
            the last arithmetic one
        infer and clear nodes on a path from low to low, not denied, become low, but no addition
            to a float32 value other than a bias
        until nothing changes:
            a clear node becomes low when all its inputs are, or when all its uses are and a cast
            in front of it is not larger than one behind it

    Args:
        graph: the graph; it is not changed.
        fmt: the 16-bit format.
        follow_allow: also paint infer nodes that have one low input and none denied. It rounds
            residual streams and, where measured, makes more casts at no better accuracy.

    >>> from halfstep.core.formats import format_of
    >>> graph = Graph()
    >>> x, y, z = (graph.value() for _ in range(3))
    >>> for node in (
    ...     Node("input", Kind.OPAQUE, fixed_results=(x,)),
    ...     Node("dot", Kind.ALLOW, args=(x,), results=(y,)),
    ...     Node("exp", Kind.DENY, args=(y,), results=(z,)),
    ... ):
    ...     number = graph.add(node)
    >>> painting = paint(graph, format_of("bfloat16"))
    >>> painting.low
    (False, True, False)
    >>> painting.casts
    ((0, True), (1, False))
    """
    state = _State(graph, fmt)
    state.fix()
    state.deny()
    state.allow()
    state.paint_between()
    if follow_allow:
        state.follow_allow()
    state.paint_clear()
    return state.painting()


class _State:
    """The verdicts so far; a method is a pass."""

    def __init__(self, graph: Graph, fmt: Format) -> None:
        self.nodes = graph.nodes
        self.values = graph.values
        self.edges = Edges(graph)
        self.fmt = fmt
        self.low: dict[int, Verdict] = {}
        self.high: dict[int, Verdict] = {}
        self.flexible = _flexible(self.edges, fmt)

    def _of_kind(self, *kinds: Kind) -> list[int]:
        return [number for number, node in enumerate(self.nodes) if node.kind in kinds]

    def _open(self, number: int, *kinds: Kind) -> bool:
        return (
            self.nodes[number].kind in kinds and number not in self.high and number not in self.low
        )

    def fix(self) -> None:
        """Nodes whose colour is given."""
        for number in self._of_kind(Kind.OPAQUE):
            self.high[number] = Verdict(Rule.OPAQUE, self.nodes[number].because)
        for number in self._of_kind(Kind.LOW):
            self.low[number] = Verdict(Rule.ALREADY, self.nodes[number].because)

    def deny(self) -> None:
        """Deny roots, and what computes with their results."""
        for number in self._of_kind(Kind.DENY):
            self.high[number] = Verdict(Rule.DENIED, self.nodes[number].because)
        for number in self._of_kind(Kind.ALLOW, *_PASSIVE):
            misfit = _misfit(self.nodes[number], self.edges, self.fmt)
            if misfit:
                self.high[number] = Verdict(Rule.CONSTANT, misfit)
        roots = [n for n in self.high if self.nodes[n].kind is not Kind.OPAQUE]
        # only the sum itself: what a residual network computes from its stream may follow
        for number in self._sums_over_loops():
            self.high.setdefault(number, Verdict(Rule.ACCUMULATES))
        for number, many in long_sums(self.edges, longest_sum(self.fmt)).items():
            self.high.setdefault(number, Verdict(Rule.LONG_SUM, f"{many}"))
        tainted = self._before_arithmetic()
        came_from = {root: root for root in roots}
        queue = deque(roots)
        while queue:
            number = queue.popleft()
            for after in self.edges.after[number]:
                if after in tainted and after not in came_from:
                    came_from[after] = came_from[number]
                    queue.append(after)
                    self.high.setdefault(after, Verdict(Rule.AFTER_DENY, root=came_from[after]))

    def _before_arithmetic(self) -> set[int]:
        """Infer and deny nodes, and the clear nodes that lead to one through clear nodes only."""
        starts = self._of_kind(Kind.INFER, Kind.DENY)
        reached = _flood(starts, self.edges.before, lambda n: self.nodes[n].kind is Kind.CLEAR)
        return reached | set(starts)

    def _sums_over_loops(self) -> set[int]:
        """Additions of a loop's carry to something, whose result is that carry again."""
        found: set[int] = set()
        for carry in (n for n, node in enumerate(self.nodes) if node.carries):
            ahead = self._through_clear(carry, self.edges.after)
            behind = self._through_clear(carry, self.edges.before)
            found |= {
                n
                for n in ahead & behind
                if self.nodes[n].accumulates and self.nodes[n].kind is Kind.INFER
            }
        return found

    def _through_clear(self, start: int, step: list[list[int]]) -> set[int]:
        clear = _flood([start], step, lambda n: self.nodes[n].kind is Kind.CLEAR)
        return {after for number in {start, *clear} for after in step[number]}

    def allow(self) -> None:
        """What is on the allow list, unless a constant forbids it."""
        for number in self._of_kind(Kind.ALLOW):
            if number not in self.high:
                self.low[number] = Verdict(Rule.ALLOWED, self.nodes[number].because)

    def paint_between(self) -> None:
        """Infer and clear nodes on a path from low to low, but no addition to a float32 value."""
        streams, between = Streams(self.edges, self.flexible), self._between()
        added: set[int] = set()
        while between:
            rule, found = Rule.ADDS, self._adding(streams, between)
            added |= found
            if not found:
                rule, found = Rule.GRADIENT, gradients(self.edges, added, between)
            if not found:
                break
            self.high.update(dict.fromkeys(found, Verdict(rule)))
            between = self._between()
        self.low.update(dict.fromkeys(between, Verdict(Rule.BETWEEN)))

    def _between(self) -> set[int]:
        ends = list(self.low)
        ahead = _flood(ends, self.edges.after, lambda n: self._open(n, *_PASSIVE))
        return _flood(ends, self.edges.before, lambda n: n in ahead)

    def _adding(self, streams: Streams, between: set[int]) -> set[int]:
        """Additions to a float32 value, and to what is float32 since they are."""
        left, adding = set(between), set[int]()
        low = (self.low.keys(), left)
        queue = deque(sorted(between))
        while queue:
            number = queue.popleft()
            if number not in left:
                continue
            around = (self.edges.before[number], self.edges.after[number])
            adds = streams.adds_to(number, low)
            if adds or not all(any(n in each for n in side for each in low) for side in around):
                left.discard(number)
                queue.extend(n for side in around for n in side)
            if adds:
                adding.add(number)
        return adding

    def follow_allow(self) -> None:
        """Infer nodes with a low input and none that is denied, in one sweep."""
        for number in self._of_kind(Kind.INFER):
            before = self.edges.before[number]
            denied = any(n in self.high and self.nodes[n].kind is not Kind.OPAQUE for n in before)
            if number not in self.high and not denied and any(n in self.low for n in before):
                self.low.setdefault(number, Verdict(Rule.FOLLOWS_ALLOW))

    def paint_clear(self) -> None:
        """Clear nodes whose rounding nobody can notice, until nothing changes."""
        queue = deque(n for n in self._of_kind(Kind.CLEAR) if self._open(n, Kind.CLEAR))
        while queue:
            number = queue.popleft()
            if not self._open(number, Kind.CLEAR):
                continue
            rule = self._free_rule(number)
            if rule is not None:
                self.low[number] = Verdict(rule)
                queue.extend(self.edges.after[number])
                queue.extend(self.edges.before[number])

    def _free_rule(self, number: int) -> Rule | None:
        node = self.nodes[number]
        args = [v for v in node.args if v not in self.flexible]
        others = [v for v in args if self.edges.producer[v] != number]
        if others and all(self._is_low(v) for v in others):
            return Rule.FOLLOWS_INPUTS
        high = sum(self.values[v].elements for v in args if not self._is_low(v))
        uses = [n for v in node.results for n in self.edges.takers[v]]
        fixed = any(self.edges.fixed_takers[v] for v in node.results)
        if uses and not fixed and all(n in self.low or n == number for n in uses):
            cast_behind = sum(self.values[v].elements for v in node.results)
            return Rule.FOLLOWS_USES if high <= cast_behind else None
        return None

    def _is_low(self, value: int) -> bool:
        producer = self.edges.producer[value]
        return producer in self.low and value in self.nodes[producer].results

    def painting(self) -> Painting:
        """Fill in what no pass decided, and list the casts."""
        for number, node in enumerate(self.nodes):
            if number not in self.low and number not in self.high:
                rule = Rule.NOT_BETWEEN if node.kind is Kind.INFER else Rule.NOT_FREE
                self.high[number] = Verdict(rule)
        low_values = tuple(self._is_low(value) for value in range(len(self.values)))
        return Painting(
            low=tuple(number in self.low for number in range(len(self.nodes))),
            low_values=low_values,
            verdicts=tuple(
                self.low.get(number) or self.high[number] for number in range(len(self.nodes))
            ),
            casts=tuple(self._casts(low_values)),
        )

    def _casts(self, low_values: tuple[bool, ...]) -> Iterable[tuple[int, bool]]:
        for value, is_low in enumerate(low_values):
            if self.edges.producer[value] is None:
                continue
            wanted = {taker in self.low for taker in self.edges.takers[value]}
            if self.edges.fixed_takers[value]:
                wanted.add(False)
            if (not is_low) in wanted:
                yield value, not is_low


def _flood(starts: Iterable[int], step: list[list[int]], enter: Callable[[int], bool]) -> set[int]:
    """The nodes reached from ``starts`` over nodes that may be entered; the starts not counted."""
    reached: set[int] = set()
    queue = deque(starts)
    while queue:
        for number in step[queue.popleft()]:
            if number not in reached and enter(number):
                reached.add(number)
                queue.append(number)
    return reached


def _flexible(edges: Edges, fmt: Format) -> set[int]:
    """Constants that the format holds exactly, and what clear nodes make of them alone."""
    flexible = {
        number
        for number, value in enumerate(edges.graph.values)
        if value.constant is not None
        and value.constant.size == 1
        and np.array_equal(fmt.round(value.constant), value.constant, equal_nan=True)
    }
    queue = deque(taker for value in flexible for taker in edges.takers[value])
    while queue:
        node = edges.graph.nodes[queue.popleft()]
        if node.kind is Kind.CLEAR and not node.carries and set(node.args) <= flexible:
            new = set(node.results) - flexible
            flexible |= new
            queue.extend(taker for value in new for taker in edges.takers[value])
    return flexible


def _misfit(node: Node, edges: Edges, fmt: Format) -> str:
    """What is wrong with the constants among a node's arguments, or an empty string."""
    for value in node.args:
        constant = edges.graph.values[value].constant
        if constant is not None:
            wrong = misfit(constant, fmt)
            if wrong:
                return wrong
    return ""


def misfit(constant: NDArray[np.float32], fmt: Format) -> str:
    """Say why a constant does not fit a format: an empty string when it does.

    A finite number must stay finite. A lone number that is not zero must stay a normal number: as
    ``eps`` in ``x / (|x| + eps)`` it would be gone. In an array small numbers are data.

    >>> from halfstep.core.formats import format_of
    >>> misfit(np.array(1e-8, np.float32), format_of("float16"))
    '1e-08 is below 6.1e-05, the smallest normal float16'
    >>> misfit(np.array(1e-8, np.float32), format_of("bfloat16"))
    ''
    """
    magnitudes = np.abs(constant[np.isfinite(constant)])
    if magnitudes.size == 0:
        return ""
    largest = magnitudes.max()
    if not np.isfinite(fmt.round(largest)):
        return f"{largest:.3g} is above {fmt.max:.3g}, the largest {fmt.name}"
    if constant.size == 1 and 0 < largest < fmt.smallest_normal:
        return f"{largest:.3g} is below {fmt.smallest_normal:.2g}, the smallest normal {fmt.name}"
    return ""
