"""Derivatives with matrix products of their own: those of what itself stays in float32.

The derivative of a Cholesky decomposition multiplies matrices, and so does that of an inverse, a
solution or a custom operation. They are steps of an algorithm that needs float32, not layers.
``torch.autocast`` is off in the backward pass and so computes them in float32 too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from ...core.paint import Kind, OperationLists
from .build import is_float32, name_of, original_name_of

_SAME = frozenset({"detach", "alias", "getitem"})
_STAYS = (Kind.OPAQUE, Kind.DENY)


def derivatives_that_stay(graph: fx.Graph, lists: OperationLists) -> Mapping[fx.Node, str]:
    """Return the operations that stay in float32 with what they are the derivative of, and why.

    Autograd numbers its nodes, and the operations of a derivative carry the number of the
    operation that they derive. Of several forward operations with one number the first one made
    the node; those behind it needed no gradient. A derivative without a matrix product is
    painted like all else.

    Args:
        graph: a joint graph; there are no derivatives in another.
        lists: the kind of every operation.
    """
    forward: dict[int, list[fx.Node]] = {}
    backward: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        number = node.meta.get("seq_nr")
        if node.op == "call_function" and number is not None:
            is_backward = node.meta.get("partitioner_tag") == "is_backward"
            (backward if is_backward else forward).setdefault(number, []).append(node)
    stay: dict[fx.Node, str] = {}
    for number, derived in backward.items():
        kinds = {node: lists.kind(name_of(node))[0] for node in derived}
        because = _stays(forward.get(number, ()), lists) if Kind.ALLOW in kinds.values() else None
        if because is not None:
            stay |= {node: because for node in derived if kinds[node] in (Kind.ALLOW, Kind.INFER)}
    return stay


def _stays(made: Sequence[fx.Node], lists: OperationLists) -> str | None:
    """Why the derivative of these operations stays in float32, None if it does not."""
    first = made[0] if made else None
    while first is not None and name_of(first) in _SAME and isinstance(first.args[0], fx.Node):
        first = first.args[0]
    if first is None or first.op != "call_function" or not _takes_float32(first):
        return None
    # what was taken apart before it was painted is still one operation to autograd
    name = original_name_of(first)
    parts = [name_of(each) for each in made if original_name_of(each) == name]
    if name not in lists.names and any(lists.kind(part)[0] is Kind.ALLOW for part in parts):
        return None
    kind, because = lists.kind(name)
    return f"it is the derivative of {name}: {because}" if kind in _STAYS else None


def _takes_float32(node: fx.Node) -> bool:
    return any(is_float32(given.meta.get("val")) for given in node.all_input_nodes)
