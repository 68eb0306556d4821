"""From an ATen graph, as AOTAutograd makes it, to the painter's graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ...core.paint import Graph, Kind, Node, OperationLists
from ...core.paint.lists import ASKED
from .operations import ADDITIONS, PORTS, SHAPE_ONLY, SUMS_IF, TAKES_INTEGERS, Ports

Port: TypeAlias = tuple[fx.Node, int | None]
"""A tensor: what makes it, and which of its results it is (None: it makes one tensor)."""

_MOST_CHECKED = 2**22  # elements of a captured array that are looked at for misfits
_FILLED = {
    "zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0,
    "ones": 1.0, "ones_like": 1.0, "new_ones": 1.0,
}  # fmt: skip
_FILLED_BY = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}


@dataclass
class Program:
    """An ATen graph with the painter's graph of its float32 tensors.

    Attributes:
        aten: the ATen graph.
        graph: what the painter paints.
        nodes: the painter's node for each operation on float32 tensors.
        values: the painter's value for each float32 tensor.
    """

    aten: fx.Graph
    graph: Graph = field(default_factory=Graph)
    nodes: dict[fx.Node, int] = field(default_factory=dict)
    values: dict[Port, int] = field(default_factory=dict)

    def value(self, node: fx.Node) -> int | None:
        """The painter's value of a tensor that a graph's node names, if it is float32."""
        return self.values.get(port(node))


def port(node: fx.Node) -> Port:
    """Return where a tensor comes from: through ``getitem``, from one of several results."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return node.args[0], int(node.args[1])  # type: ignore[arg-type]
    return node, None


def name_of(node: fx.Node) -> str:
    """Return an operation's name without its overload, for instance ``'mm'``."""
    return _name_of(node.target)


def original_name_of(node: fx.Node) -> str:
    """Return the name of the operation that this one was before it was taken apart."""
    return _name_of(node.meta.get("original_aten") or node.target)


def _name_of(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return getattr(target, "__name__", str(target))


def build(graph: fx.Graph, lists: OperationLists, kept: Callable[[fx.Node], str | None]) -> Program:
    """Return the program of an ATen graph.

    Args:
        graph: functional, with fake tensors in ``meta["val"]``.
        lists: the kind of every operation.
        kept: why an operation stays in float32 on request, None if it does not.
    """
    program = Program(graph)
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            _add_input(program, node)
        elif node.op == "output":
            _add_outputs(program, node)
        elif node.op == "call_function" and node.target is not operator.getitem:
            _add_operation(program, node, lists, kept)
    return program


def elements(tensor: Tensor) -> int:
    """How many numbers a tensor has; what is not known before the run counts as what it was."""
    count = 1
    for size in tensor.shape:
        # a guard on a dynamic size would compile anew for every other size
        hint = size if isinstance(size, int) else size.node.hint
        count *= 1 if hint is None else int(hint)
    return count


def is_float32(value: Any) -> bool:
    """Whether this is a float32 tensor."""
    return isinstance(value, Tensor) and value.dtype == torch.float32


def results_of(node: fx.Node) -> Iterator[tuple[int | None, Any]]:
    """Yield what a node makes, each with its number (None where it makes one thing)."""
    made = node.meta.get("val")
    if isinstance(made, (list, tuple)):
        yield from enumerate(made)
    else:
        yield None, made


def _add_input(program: Program, node: fx.Node) -> None:
    held, made = captured(node), node.meta.get("val")
    made = held if made is None else made
    if made is None or not is_float32(made):
        return
    value = program.graph.value(elements(made), _numbers(held))
    program.values[node, None] = value
    because = "an input" if held is None else "a captured tensor"
    program.graph.add(Node("input", Kind.OPAQUE, fixed_results=(value,), because=because))


def captured(node: fx.Node) -> Tensor | None:
    """Return the tensor that a graph holds in itself, None for any other node."""
    if node.op != "get_attr":
        return None
    found: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, Tensor) else None


def _numbers(tensor: Any) -> Any:
    real = isinstance(tensor, Tensor) and not hasattr(tensor, "fake_mode")
    if not real or tensor.numel() > _MOST_CHECKED:
        return None
    with unset_fake_temporarily():  # graphs are compiled where every tensor is a fake one
        return tensor.detach().cpu().numpy().astype(np.float32)


def _add_outputs(program: Program, node: fx.Node) -> None:
    for output in node.all_input_nodes:
        value = program.value(output)
        if value is not None:
            program.graph.add(Node("output", Kind.OPAQUE, fixed_args=(value,), because="an output"))


def _add_operation(
    program: Program,
    node: fx.Node,
    lists: OperationLists,
    kept: Callable[[fx.Node], str | None],
) -> None:
    name = name_of(node)
    found = _Arguments(program, node, PORTS.get(name, Ports()), name in SHAPE_ONLY)
    own, fixed = _add_results(program, node, PORTS.get(name, Ports()))
    if not (own or fixed or found.tensors):
        return
    kind, because = kind_of(node, lists)
    if name in SUMS_IF and _given(node, SUMS_IF[name]):
        kind, because = Kind.DENY, "it adds up what falls on the same place"
    foreign = found.foreign or _foreign_result(node)
    if foreign is not None:
        kind, because = Kind.OPAQUE, f"it meets {foreign}"
    elif found.integers and kind is not Kind.DENY and name not in TAKES_INTEGERS:
        kind, because = Kind.OPAQUE, "it takes integers, which 16 bits may not hold"
    asked = kept(node)
    made = Node(
        name, kind, tuple(found.own), tuple(own), tuple(found.fixed), tuple(fixed), because,
        accumulates=name in ADDITIONS,
    )  # fmt: skip
    if kind is Kind.OPAQUE or asked is not None:
        made = _left_alone(made, because if asked is None else asked)
    program.nodes[node] = program.graph.add(made)


def kind_of(node: fx.Node, lists: OperationLists) -> tuple[Kind, str]:
    """Return the kind of an operation and why; what Inductor took apart has the user's kind."""
    kind, because = lists.kind(name_of(node))
    whole = lists.kind(original_name_of(node))
    computes = kind in (Kind.ALLOW, Kind.DENY, Kind.INFER) and because not in ASKED.values()
    return whole if computes and whole[1] in ASKED.values() else (kind, because)


def _left_alone(node: Node, because: str) -> Node:
    return replace(
        node, kind=Kind.OPAQUE, because=because, args=(), results=(),
        fixed_args=(*node.args, *node.fixed_args),
        fixed_results=(*node.results, *node.fixed_results),
    )  # fmt: skip


def _add_results(program: Program, node: fx.Node, ports: Ports) -> tuple[list[int], list[int]]:
    own: list[int] = []
    fixed: list[int] = []
    constant = _made_constant(node)
    for number, made in results_of(node):
        if not is_float32(made):
            continue
        value = program.graph.value(elements(made), constant)
        program.values[node, number] = value
        (fixed if number is not None and number in ports.results else own).append(value)
    return own, fixed


def _made_constant(node: fx.Node) -> Any:
    """The number that a tensor is full of, where it is known."""
    name = name_of(node)
    filled: Any = _FILLED.get(name)
    if filled is None and name in _FILLED_BY:
        filled = node.args[_FILLED_BY[name]]
    return _constant(filled) if _is_number(filled) else None


def _constant(number: float) -> Any:
    with np.errstate(over="ignore"):
        return np.asarray(number, np.float32)


class _Arguments:
    """What an operation takes: values in its own dtype, in float32, and what is neither."""

    def __init__(self, program: Program, node: fx.Node, ports: Ports, shape_only: bool) -> None:
        self.own: list[int] = []
        self.fixed: list[int] = []
        self.tensors = False
        self.integers = False
        self.foreign: str | None = None
        self._program, self._ports = program, ports
        for name, type_, given in arguments(node):
            if not (shape_only and name == "self"):
                self._take(name, type_, given)

    def _take(self, name: str, type_: str, given: Any) -> None:
        if isinstance(given, (list, tuple)):
            for each in given:
                self._take(name, type_, each)
        elif isinstance(given, fx.Node):
            self._take_tensor(name, given)
        elif _is_number(given) and ("number" in type_ or "Tensor" in type_):
            self.own.append(self._program.graph.value(0, _constant(given)))

    def _take_tensor(self, name: str, given: fx.Node) -> None:
        made = given.meta.get("val")
        if made is None:
            made = captured(given)
        value = self._program.value(given)
        if value is not None:
            self.tensors = True
            (self.fixed if name in self._ports.args else self.own).append(value)
        elif isinstance(made, Tensor):
            if made.is_floating_point() or made.is_complex():
                self.foreign = str(made.dtype).removeprefix("torch.")
            elif made.dtype != torch.bool:
                self.integers = True


def _is_number(given: Any) -> bool:
    return isinstance(given, (int, float)) and not isinstance(given, bool)


def _given(node: fx.Node, wanted: str) -> Any:
    return next((given for name, _, given in arguments(node) if name == wanted), None)


def arguments(node: fx.Node) -> Iterator[tuple[str, str, Any]]:
    """Yield name, type and what was given, for each argument: positions first, as in the call.

    The arguments of a higher-order operation have their numbers for names, and no types.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        for number, given in enumerate(node.args):
            yield str(number), "", given
        for name, given in node.kwargs.items():
            yield name, "", given
        return
    schema = node.target._schema.arguments
    for argument, given in zip(schema, node.args, strict=False):
        yield argument.name, str(argument.type), given
    types = {argument.name: str(argument.type) for argument in schema}
    for name, given in node.kwargs.items():
        yield name, types.get(name, ""), given


def _foreign_result(node: fx.Node) -> str | None:
    for _, made in results_of(node):
        floating = isinstance(made, Tensor) and (made.is_floating_point() or made.is_complex())
        if floating and made.dtype != torch.float32:
            return str(made.dtype).removeprefix("torch.")
    return None
