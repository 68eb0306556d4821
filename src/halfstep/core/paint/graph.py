"""What the painter paints: operations, and the values that go from one to the next."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


class Kind(enum.Enum):
    """What 16 bits do to an operation."""

    ALLOW = "allow"
    """Much faster in 16 bits and safe there: matrix products, convolutions."""
    DENY = "deny"
    """Not safe in 16 bits: exponentials, sums, losses. What follows it stays in float32 too."""
    INFER = "infer"
    """Safe when what stands around it is: it does what its neighbours do."""
    CLEAR = "clear"
    """No arithmetic: it moves or compares numbers, and rounding commutes with it."""
    OPAQUE = "opaque"
    """Left alone: unknown, or kept in float32 on request. It says nothing about its neighbours."""
    LOW = "low"
    """In 16 bits already: an input that arrives so, an output that is wanted so."""


@dataclass(frozen=True, slots=True)
class Value:
    """A float32 array in the graph.

    Attributes:
        elements: how many numbers; in a loop, over all of its iterations.
        constant: its numbers where they are known before the graph runs, else ``None``. A value
            that nothing produces is a constant and takes any dtype without a cast.
    """

    elements: int = 1
    constant: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """An operation: one colour for all the values that follow it.

    Attributes:
        name: what the framework calls the operation.
        kind: what 16 bits do to it.
        args: values that it takes in its own dtype, 16 bits or float32.
        results: values that it makes in its own dtype.
        fixed_args: values that it takes in float32 whatever its own dtype is (the statistics of
            a fused batch norm, every argument of an opaque operation).
        fixed_results: values that it makes in float32 whatever its own dtype is.
        because: why the list has this kind for it, or who asked for it.
        accumulates: it adds. An infer node that does stays in float32 where one summand is a
            loop's carry, so that it is a sum over the loop; where it is one of many in a row; and
            where a summand is float32 and no bias.
        carries: it stands for what a loop hands from one iteration to the next.
    """

    name: str
    kind: Kind
    args: tuple[int, ...] = ()
    results: tuple[int, ...] = ()
    fixed_args: tuple[int, ...] = ()
    fixed_results: tuple[int, ...] = ()
    because: str = ""
    accumulates: bool = False
    carries: bool = False


@dataclass
class Graph:
    """Nodes and values, by number. Loops are cycles through a node that carries.

    >>> graph = Graph()
    >>> x, y = graph.value(64), graph.value(64)
    >>> graph.add(Node("input", Kind.OPAQUE, fixed_results=(x,)))
    0
    >>> graph.add(Node("dot", Kind.ALLOW, args=(x,), results=(y,)))
    1
    """

    nodes: list[Node] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)

    def value(self, elements: int = 1, constant: NDArray[np.float32] | None = None) -> int:
        """Add a value and return its number."""
        self.values.append(Value(elements, constant))
        return len(self.values) - 1

    def add(self, node: Node) -> int:
        """Add an operation and return its number."""
        self.nodes.append(node)
        return len(self.nodes) - 1


class Edges:
    """Who makes each value and who takes it; valid once the graph is complete."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        count = len(graph.values)
        self.producer: list[int | None] = [None] * count
        self.takers: list[list[int]] = [[] for _ in range(count)]
        self.fixed_takers: list[list[int]] = [[] for _ in range(count)]
        for number, node in enumerate(graph.nodes):
            for value in (*node.results, *node.fixed_results):
                self.producer[value] = number
            for value in node.args:
                self.takers[value].append(number)
            for value in node.fixed_args:
                self.fixed_takers[value].append(number)

    @cached_property
    def after(self) -> list[list[int]]:
        """The nodes that take, in their own dtype, what each node makes in its own."""
        return [
            list(dict.fromkeys(taker for value in node.results for taker in self.takers[value]))
            for node in self.graph.nodes
        ]

    @cached_property
    def before(self) -> list[list[int]]:
        """The other direction of :attr:`after`."""
        before: list[list[int]] = [[] for _ in self.graph.nodes]
        for number, followers in enumerate(self.after):
            for follower in followers:
                before[follower].append(number)
        return before
