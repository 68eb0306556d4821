"""Regions of a model's code in which its author switched autocast off.

Whoever writes ``torch.autocast(device, enabled=False)`` around angles or distances says that
16 bits would spoil them. Dynamo's graphs hold the entries and exits of such regions. AOTAutograd's
do not, but keep what is noted on the operations between, and copy it to their derivatives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

_NOTE = "halfstep_autocast_is_off"
_OFF = "torch.autocast(enabled=False) is around it in the model's code"


def why_off(node: fx.Node) -> str | None:
    """Return why an operation stays in float32 if autocast is off around it, else None."""
    return _OFF if (node.meta.get("custom") or {}).get(_NOTE) else None


class Regions:
    """Finds the regions in Dynamo's graphs, those included that begin in front of a graph.

    Attributes:
        outside: the :func:`depth` around the call of the model: those are no regions of its code.
    """

    def __init__(self) -> None:
        self.outside = 0

    def note(self, graph: fx.GraphModule) -> None:
        """Note on the operations of a graph where autocast is off; Dynamo is compiling it.

        Code that is called behind a graph break is compiled by itself, once for both: inside of
        a region and outside.
        """
        from .standing import guarded

        off = self._is_off()
        guarded(
            "same_region",
            "torch.autocast(enabled=False) is around this code as it was",
            lambda _: self._is_off() == off,
        )
        _note(graph, off)

    def _is_off(self) -> bool:
        """Whether the code that runs now was called from a region where autocast is off."""
        return depth() > self.outside and not (
            torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        )


def depth() -> int:
    """How many ``torch.autocast`` blocks this thread is in, whether they are on or off."""
    depth: int = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


def _note(graph: fx.GraphModule, off: bool) -> None:
    entered: list[fx.Node] = []
    for node in graph.graph.nodes:
        if node.target is _enter_autocast:
            entered.append(node)
        elif node.target is _exit_autocast and node.args[0] in entered:
            entered.remove(node.args[0])
        elif node.op.startswith("call_"):
            off_here = not entered[-1].args[2] if entered else off
            if off_here:
                # what notes are copied from one operation to its derivatives is torch's own way
                node.meta["custom"] = {**(node.meta.get("custom") or {}), _NOTE: True}
            for body in _bodies(node):
                _note(body, off_here)


def _bodies(node: fx.Node) -> Iterator[fx.GraphModule]:
    """Yield the graphs that a higher-order operation, a checkpoint for instance, runs."""
    for given in node.all_input_nodes:
        if given.op == "get_attr":
            found: Any = node.graph.owning_module
            for name in str(given.target).split("."):
                found = getattr(found, name, None)
            if isinstance(found, fx.GraphModule):
                yield found
