"""Sums that must not be rounded at every addition: long ones, and those that start in float32."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Container, Iterator

from ..formats import Format
from .graph import Edges, Kind

_ELEMENTWISE = (Kind.INFER, Kind.CLEAR)
_BITS_LEFT = 2


def longest_sum(fmt: Format) -> int:
    """Return how many additions in a row a format bears.

    In a sum of equal parts the last ones lose as many bits as the sum is longer than they are;
    two have to be left.

    >>> from halfstep.core.formats import format_of
    >>> longest_sum(format_of("bfloat16")), longest_sum(format_of("float16"))
    (64, 512)
    """
    return int(2 ** (fmt.mantissa_bits + 1 - _BITS_LEFT))


def long_sums(edges: Edges, limit: int) -> dict[int, int]:
    """Return the additions in a row of more than ``limit``, each with how many it has.

    Between two additions of a row there is nothing but moves. A loop that was written out, as
    ``for x in xs: state = state + x``, is one.
    """
    order = _in_order(edges)
    above = _rows(edges, order, edges.before)
    below = _rows(edges, order[::-1], edges.after)
    return {
        number: above[number] + below[number] - 1
        for number, node in enumerate(edges.graph.nodes)
        if node.accumulates
        and node.kind is Kind.INFER
        and above[number] + below[number] - 1 > limit
    }


def gradients(edges: Edges, streams: Collection[int], low: Collection[int]) -> set[int]:
    """Return the additions in a row that may add up the gradient of a float32 sum.

    The gradient of a sum in a row is a sum in a row of the same size. It begins in 16 bits where
    a product takes the last sum, although its parts are float32 as much as what it derives.

    Args:
        edges: of the graph.
        streams: the additions that are float32 since a summand is.
        low: where to look for their gradients.
    """
    rows = long_sums(edges, 1)
    sizes = {_size(edges, number) for number in streams if number in rows}
    return {number for number in low if number in rows and _size(edges, number) in sizes}


def _size(edges: Edges, number: int) -> int:
    graph = edges.graph
    return sum(graph.values[result].elements for result in graph.nodes[number].results)


def _rows(edges: Edges, order: list[int], step: list[list[int]]) -> list[int]:
    """For each node, the most additions in a row that end in it."""
    found = [0] * len(edges.graph.nodes)
    for number in order:
        node = edges.graph.nodes[number]
        adds = node.kind is Kind.INFER and node.accumulates
        if adds or (node.kind is Kind.CLEAR and not node.carries):
            found[number] = max((found[other] for other in step[number]), default=0) + adds
    return found


def _in_order(edges: Edges) -> list[int]:
    """The nodes, each behind what it takes; loops are cut at what they carry."""
    nodes = edges.graph.nodes
    waits = [0 if node.carries else len(edges.before[n]) for n, node in enumerate(nodes)]
    queue = deque(number for number, count in enumerate(waits) if count == 0)
    order: list[int] = []
    while queue:
        order.append(queue.popleft())
        for after in edges.after[order[-1]]:
            if not nodes[after].carries:
                waits[after] -= 1
                if waits[after] == 0:
                    queue.append(after)
    return order


class Streams:
    """Which additions go on with something that is more than 16 bits exact.

    An addition in float32 whose result is rounded at once loses what float32 was for when it is
    repeated: a stream, ``x = x + f(x)``. A bias is a float32 summand too, but one that is smaller
    than the result, and rounding it is what 16 bits mean; it goes with the product that it is
    added to, unless the sum is itself the start of a stream: added to what is computed from it,
    compared with the summand again, or taken in float32 by what the painter leaves alone.

    Args:
        edges: of the graph.
        flexible: constants, which have no dtype of their own.
    """

    def __init__(self, edges: Edges, flexible: set[int]) -> None:
        self._edges, self._flexible = edges, flexible
        self._sources = {n: set(self._small_summands(n)) for n in self._additions()}
        self._starts: set[int] | None = None

    def adds_to(self, number: int, low: Collection[Container[int]]) -> bool:
        """Whether a node adds to a float32 value that is no bias.

        Args:
            number: of the node.
            low: collections of nodes that run in 16 bits.
        """
        if number not in self._sources:
            return False
        float32 = [v for v in self._edges.graph.nodes[number].args if self._is_float32(v, low)]
        if all(self._is_small(value, number) for value in float32):
            return bool(float32) and number in self._started()
        return True

    def _additions(self) -> list[int]:
        nodes = enumerate(self._edges.graph.nodes)
        return [n for n, node in nodes if node.accumulates and node.kind is Kind.INFER]

    def _is_float32(self, value: int, low: Collection[Container[int]]) -> bool:
        maker = self._edges.producer[value]
        if maker is None or value in self._flexible:
            return False
        made_low = any(maker in each for each in low)
        return not (made_low and value in self._edges.graph.nodes[maker].results)

    def _is_small(self, value: int, number: int) -> bool:
        return self._source(value, number) is not None

    def _small_summands(self, number: int) -> Iterator[int]:
        for value in self._edges.graph.nodes[number].args:
            source = self._source(value, number)
            if source is not None:
                yield source

    def _source(self, value: int, number: int) -> int | None:
        """What has fewer elements than the sum and was only moved to become this summand."""
        graph, wanted = self._edges.graph, _size(self._edges, number)
        while graph.values[value].elements >= wanted:
            maker = self._edges.producer[value]
            if maker is None or graph.nodes[maker].kind is not Kind.CLEAR:
                return None
            args = [v for v in graph.nodes[maker].args if v not in self._flexible]
            if len(args) != 1 or graph.nodes[maker].carries:
                return None
            value = args[0]
        return value if value not in self._flexible else None

    def _started(self) -> set[int]:
        if self._starts is None:
            self._starts = _Reach(self._edges, self._sources).streams()
        return self._starts


class _Reach:
    """What becomes of the sums with a small summand; a set of sums is the bits of a number.

    For each node, the sums that
        carried: it moves or adds to;
        seen: it is computed from in any way;
        through: it is computed from by more than element by element;
        sources: have a small summand that it moves.
    """

    def __init__(self, edges: Edges, summands: dict[int, set[int]]) -> None:
        self._edges, count = edges, len(edges.graph.nodes)
        self._sums = [number for number, sources in summands.items() if sources]
        self._own = {number: 1 << place for place, number in enumerate(self._sums)}
        self._source_of = [0] * count
        for number in self._sums:
            for value in summands[number]:
                maker = edges.producer[value]
                if maker is not None:
                    self._source_of[maker] |= self._own[number]
        self._carried, self._seen = [0] * count, [0] * count
        self._through, self._moved = [0] * count, [0] * count

    def streams(self) -> set[int]:
        """Return the sums that are the start of a stream."""
        if not self._sums:
            return set()
        self._spread()
        found = 0
        for node in self._edges.graph.nodes:
            for maker in self._makers(node.fixed_args):
                found |= self._carried[maker]
            if node.accumulates and node.kind is Kind.INFER:
                found |= self._meet(node.args)
        return {number for number in self._sums if found & self._own[number]}

    def _meet(self, args: tuple[int, ...]) -> int:
        """The sums that meet, in an addition, what is computed from them, or their summand."""
        makers, found = self._makers(args), 0
        for place, one in enumerate(makers):
            for other in (*makers[:place], *makers[place + 1 :]):
                found |= self._carried[one] & (self._through[other] | self._moved[other])
        return found

    def _makers(self, values: tuple[int, ...]) -> list[int]:
        makers = (self._edges.producer[value] for value in values)
        return [maker for maker in makers if maker is not None]

    def _spread(self) -> None:
        nodes = self._edges.graph.nodes
        takers: list[set[int]] = [set() for _ in nodes]
        for number, node in enumerate(nodes):
            for maker in self._makers((*node.args, *node.fixed_args)):
                takers[maker].add(number)
        queue, waiting = deque(range(len(nodes))), set(range(len(nodes)))
        while queue:
            number = queue.popleft()
            waiting.discard(number)
            if self._update(number):
                new = takers[number] - waiting
                queue.extend(new)
                waiting |= new

    def _update(self, number: int) -> bool:
        node, own = self._edges.graph.nodes[number], self._own.get(number, 0)
        carried, seen, through, moved = own, own, 0, self._source_of[number]
        elementwise = node.kind in _ELEMENTWISE
        carries = node.kind is Kind.CLEAR or (node.accumulates and elementwise)
        # around a loop every sum is computed from itself; what a carry adds up is denied anyway
        makers = () if node.carries else self._makers((*node.args, *node.fixed_args))
        for maker in makers:
            seen |= self._seen[maker]
            through |= self._through[maker] if elementwise else self._seen[maker]
            carried |= self._carried[maker] if carries else 0
            moved |= self._moved[maker] if node.kind is Kind.CLEAR else 0
        found = (carried, seen, through, moved)
        before = (
            self._carried[number], self._seen[number], self._through[number], self._moved[number],
        )  # fmt: skip
        self._carried[number], self._seen[number] = carried, seen
        self._through[number], self._moved[number] = through, moved
        return found != before
