"""How a rewrite paints: its lists, its policies, and what came of each graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ...core.formats import format_of
from ...core.paint import OperationLists, Painting, paint
from ...core.policy import Resolved
from .apply import Rewritten, rewrite
from .build import Program, build, name_of, original_name_of
from .derivatives import derivatives_that_stay
from .paths import Paths
from .regions import Regions, why_off
from .staying import stored, why_no_kernel, why_whole


@dataclass(frozen=True)
class Painted:
    """One graph that was painted.

    Attributes:
        program: its operations.
        painting: what the painter said.
        rewritten: what was put in.
        paths: the path of each operation's module, None where it has none.
    """

    program: Program
    painting: Painting
    rewritten: Rewritten
    paths: Mapping[fx.Node, str | None]

    @property
    def low_operations(self) -> int:
        """How many operations run in 16 bits."""
        return sum(self.painting.low[number] for number in self.program.nodes.values())


@dataclass
class Painter:
    """Paints every graph that it is given, in place, and keeps what came of it.

    Attributes:
        dtype: the 16-bit dtype.
        lists: the kind of every operation.
        policies: the policy of every module, by its path.
        paths: finds the modules again in the graphs.
        keep: whether to keep the graphs, for an explanation; else only what is counted.
        regions: finds the code in which autocast is off.
        painted: the graphs so far, if they are kept.
        graphs: how many there were.
        low_operations: how many operations run in 16 bits in all of them.
        runs: how often one of them ran.
        met: names of the operations in them, also of those that were taken apart before.
        met_all: whether every graph was painted here, so that all names were seen.
        used: the keys of the policies that held for an operation.
        taken: identities of the tensors that they ran with; None where nobody wants to know more.
    """

    dtype: str
    lists: OperationLists
    policies: Mapping[str, Resolved]
    paths: Paths
    keep: bool = False
    regions: Regions = field(default_factory=Regions)
    painted: list[Painted] = field(default_factory=list)
    graphs: int = 0
    low_operations: int = 0
    runs: int = 0
    taken: set[int] | None = field(default_factory=set)
    met: set[str] = field(default_factory=set)
    met_all: bool = True
    used: set[str] = field(default_factory=set)

    def ran(self, args: Sequence[object]) -> None:
        """Count a run of a graph, and note the tensors that it takes for :meth:`takes`."""
        self.runs += 1
        if self.taken is not None:
            self.taken.update(map(id, args))

    def takes(self, tensor: Tensor) -> bool:
        """Whether a graph that ran took this parameter."""
        return self.taken is not None and id(tensor) in self.taken

    def paint(self, graph: fx.Graph) -> int:
        """Rewrite a graph, the operations of forward and backward together or of one.

        Returns:
            How many of its operations run in 16 bits.
        """
        paths = {node: self.paths.of(node) for node in graph.nodes if node.op == "call_function"}
        stay = {**stored(graph, self.lists), **derivatives_that_stay(graph, self.lists)}

        def why_kept(node: fx.Node) -> str | None:
            asked = self.kept(paths.get(node)) or why_off(node) or stay.get(node)
            return asked or why_whole(node, self.lists) or why_no_kernel(node)

        program = build(graph, self.lists, why_kept)
        self.met.update(
            name
            for node in graph.nodes
            if node.op == "call_function"
            for name in (name_of(node), original_name_of(node))
        )
        painting = paint(program.graph, format_of(self.dtype))
        rewritten = rewrite(program, painting, getattr(torch, self.dtype))
        painted = Painted(program, painting, rewritten, paths)
        self.graphs += 1
        self.low_operations += painted.low_operations
        if self.keep:
            self.painted.append(painted)
        return painted.low_operations

    def found(self, low_operations: int | None) -> None:
        """Count a graph that was painted by another process.

        Args:
            low_operations: how many of its operations run in 16 bits; None where this was lost,
                which is taken for one, since a graph with none is rarely kept.
        """
        self.graphs += 1
        self.met_all = False
        self.low_operations += 1 if low_operations is None else low_operations

    def kept(self, path: str | None) -> str | None:
        """Return why an operation of a module stays in float32 on request, None if it does not."""
        while path is not None:
            rule = self.policies.get(path)
            if rule is not None:
                self.used.update(() if rule.key is None else (rule.key,))
                return None if rule.policy.is_low else f"policy {rule.policy.name}, {rule.why}"
            path = path.rpartition(".")[0] if path else None
        default = self.policies.get("")
        if default is None or default.policy.is_low:
            return None
        return f"policy {default.policy.name}, {default.why}"
