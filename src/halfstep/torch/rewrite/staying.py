"""Operations that stay in float32 for where they come from, where they run, or what they write."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput

from ...core.paint import Kind, OperationLists
from .build import name_of, original_name_of, port
from .operations import NO_KERNEL_ON_CPU, PORTS, Ports

_STAYS = (Kind.OPAQUE, Kind.DENY)
_STORED = "what it makes is kept in a tensor of the model"


def why_whole(node: fx.Node, lists: OperationLists) -> str | None:
    """Return why a product stays in float32 that is a part of an operation, None if it may not.

    Inductor takes operations apart before they are painted. One that is listed to stay in float32
    does so in parts too: a distance as ``|x|^2 + |y|^2 - 2 x y`` is all cancellation.

    Args:
        node: of a graph.
        lists: the kind of every operation.
    """
    name = original_name_of(node)
    kind, because = lists.kind(name)
    is_product = lists.kind(name_of(node))[0] is Kind.ALLOW
    if name not in lists.names or kind not in _STAYS or not is_product:
        return None
    return f"it is a part of {name}: {because}"


def why_no_kernel(node: fx.Node) -> str | None:
    """Return why an operation cannot run in 16 bits where its tensors are, None if it can."""
    if name_of(node) not in NO_KERNEL_ON_CPU:
        return None
    made = (given.meta.get("val") for given in node.all_input_nodes)
    on_cpu = any(isinstance(each, Tensor) and each.device.type == "cpu" for each in made)
    return "the CPU has no 16-bit kernel for it" if on_cpu else None


def stored(graph: fx.Graph, lists: OperationLists) -> Mapping[fx.Node, str]:
    """Return the operations whose results a model keeps in its buffers or inputs, and why.

    They stay in float32: what is rounded when it is kept, an average for instance, stops moving
    when its steps are smaller than the rounding. What a product makes is kept as it is, and so
    is what only moves between a product and a buffer.

    Args:
        graph: a joint graph, or one without a backward pass.
        lists: the kind of every operation.
    """
    found: dict[fx.Node, str] = {}
    queue = _written(graph)
    while queue:
        node, result = port(queue.pop())
        kind = lists.kind(name_of(node))[0] if node.op == "call_function" else Kind.OPAQUE
        fixed = result is not None and result in PORTS.get(name_of(node), Ports()).results
        if node in found or fixed or kind not in (Kind.INFER, Kind.CLEAR):
            continue
        found[node] = _STORED
        if kind is Kind.CLEAR:
            queue.extend(node.all_input_nodes)
    return found


def _written(graph: fx.Graph) -> list[fx.Node]:
    """What becomes of inputs: written into them in the graph, or handed to who writes it."""
    written = [
        node.args[1]
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
        if isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder"
    ]
    for output in graph.find_nodes(op="output"):
        made = output.args[0] if isinstance(output.args[0], (list, tuple)) else ()
        about = output.meta.get("desc") or ()
        written += [
            value
            for value, what in zip(made, about, strict=False)
            if isinstance(what, InputMutationAOTOutput)
        ]
    return [node for node in written if isinstance(node, fx.Node)]
