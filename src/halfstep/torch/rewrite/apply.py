"""Putting a painting into an ATen graph: casts, dtype arguments, and the tensors' descriptions."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ...core.paint import Painting
from .build import Program, arguments, elements, is_float32, name_of
from .operations import (
    ACCUMULATES_IN,
    MAKES_FROM_NOTHING,
    MASKS,
    PORTS,
    PROMOTES,
    SHAPE_ONLY,
    Ports,
)

_COPIED_META = (
    "nn_module_stack", "fwd_nn_module_stack", "source_fn_stack", "stack_trace", "seq_nr",
    "partitioner_tag", "recompute", "ac_graph_id",
)  # fmt: skip


@dataclass
class Rewritten:
    """What was put into a graph.

    Attributes:
        casts: how many casts.
        cast_bytes: how many bytes they write.
    """

    casts: int = 0
    cast_bytes: int = 0


def rewrite(program: Program, painting: Painting, dtype: torch.dtype) -> Rewritten:
    """Change the program's ATen graph in place to what was painted.

    Args:
        program: what was painted.
        painting: the painter's answer.
        dtype: the 16-bit dtype.
    """
    return _Rewriter(program, painting, dtype).run()


@dataclass
class _Rewriter:
    program: Program
    painting: Painting
    dtype: torch.dtype
    done: Rewritten = field(default_factory=Rewritten)
    casts: dict[tuple[fx.Node, torch.dtype, bool], fx.Node] = field(default_factory=dict)

    def run(self) -> Rewritten:
        mode = _fake_mode(self.program.aten)
        for node in list(self.program.aten.nodes):
            if node.op == "output":
                self._take_in_float32(node)
            elif node in self.program.nodes:
                self._operation(node, mode)
            elif node.target is operator.getitem:
                _describe(node, mode)  # what it takes one of may have changed
        self.program.aten.lint()
        return self.done

    def _is_low(self, node: fx.Node) -> bool:
        value = self.program.value(node)
        return value is not None and self.painting.low_values[value]

    def _operation(self, node: fx.Node, mode: AbstractContextManager[Any] | None) -> None:
        number = self.program.nodes[node]
        painted = self.program.graph.nodes[number]
        fixed = set(painted.fixed_args)
        low = self.painting.low[number]
        if not low and (self._accumulate(node) or self._promote(node)):
            return
        args = {n: self._given(node, n, given, low, fixed) for n, _, given in arguments(node)}
        self._set_dtype(node, args, low)
        _set_arguments(node, args)
        if low:
            _describe(node, mode, PORTS.get(name_of(node), Ports()).results)

    def _given(self, node: fx.Node, name: str, given: Any, low: bool, fixed: set[int]) -> Any:
        shape_only = name == "self" and name_of(node) in SHAPE_ONLY

        def take(each: Any) -> Any:
            value = self.program.value(each) if isinstance(each, fx.Node) else None
            if value is None or shape_only:
                return each
            wanted = self.dtype if low and value not in fixed else torch.float32
            return self._cast(each, wanted, node, name in MASKS)

        return fx.map_arg(given, take) if not isinstance(given, fx.Node) else take(given)

    def _cast(
        self, node: fx.Node, wanted: torch.dtype, user: fx.Node, mask: bool = False
    ) -> fx.Node:
        if node.meta["val"].dtype == wanted:
            return node
        finite = mask and wanted != torch.float32
        key = (node, wanted, finite)
        if key not in self.casts:
            with self.program.aten.inserting_before(user):
                self.casts[key] = self._make_cast(node, wanted, user, finite)
        return self.casts[key]

    def _make_cast(
        self, node: fx.Node, wanted: torch.dtype, user: fx.Node, finite: bool
    ) -> fx.Node:
        source = self._finite(node, user) if finite else node
        cast = self._call(torch.ops.prims.convert_element_type.default, (source, wanted), user)
        self.done.casts += 1
        self.done.cast_bytes += elements(cast.meta["val"]) * wanted.itemsize
        return cast

    def _finite(self, node: fx.Node, user: fx.Node) -> fx.Node:
        """Keep what is finite within the 16-bit dtype; what is infinite on purpose stays so."""
        limits = torch.finfo(self.dtype)
        clamped = self._call(torch.ops.aten.clamp.default, (node, limits.min, limits.max), user)
        infinite = self._call(torch.ops.aten.isinf.default, (node,), user)
        return self._call(torch.ops.aten.where.self, (infinite, node, clamped), user)

    def _call(self, target: Callable[..., Any], args: tuple[Any, ...], user: fx.Node) -> fx.Node:
        made = self.program.aten.call_function(target, args)
        made.meta = {name: user.meta[name] for name in _COPIED_META if name in user.meta}
        _describe(made, _fake_mode(self.program.aten))
        return made

    def _accumulate(self, node: fx.Node) -> bool:
        """Let a sum take 16 bits and add up in float32 by itself: the same numbers, no cast."""
        if name_of(node) not in ACCUMULATES_IN or not self._is_low(node.args[0]):  # type: ignore[arg-type]
            return False
        if "dtype" not in {argument.name for argument in node.target._schema.arguments}:  # type: ignore[union-attr]
            return False
        if is_float32(node.meta["val"]):  # a dtype that the model asks for is its own
            node.kwargs = {**node.kwargs, "dtype": torch.float32}
        return True

    def _promote(self, node: fx.Node) -> bool:
        """Let a sum or product read 16 bits beside a float32 tensor: the same numbers, no cast."""
        tensors = [given for given in node.args if isinstance(given, fx.Node)]
        low = [self._is_low(given) for given in tensors]
        floats = [given for given in tensors if self.program.value(given) is not None]
        if name_of(node) not in PROMOTES or len(floats) != 2 or not any(low):
            return False
        one, other = (given.meta["val"].dim() for given in tensors)
        # a tensor without dimensions has no say in the dtype of a result that has some
        if (one == 0) != (other == 0):
            return False
        if all(low):
            node.replace_input_with(tensors[0], self._cast(tensors[0], torch.float32, node))
        return tensors[0] is not tensors[1]

    def _set_dtype(self, node: fx.Node, args: dict[str, Any], low: bool) -> None:
        """A dtype that the call names, or takes from no tensor's numbers, is the painted one."""
        if not is_float32(node.meta["val"]):
            return
        wanted = self.dtype if low else torch.float32
        for name in ("dtype", "input_dtype"):
            if args.get(name) == torch.float32:
                args[name] = wanted
        if name_of(node) in MAKES_FROM_NOTHING:
            args["dtype"] = wanted

    def _take_in_float32(self, node: fx.Node) -> None:
        def take(each: fx.Node) -> fx.Node:
            if self.program.value(each) is None:
                return each
            return self._cast(each, torch.float32, node)

        node.args = fx.map_arg(node.args, take)


def _set_arguments(node: fx.Node, given: dict[str, Any]) -> None:
    named = list(given.items())
    node.args = tuple(value for _, value in named[: len(node.args)])
    node.kwargs = dict(named[len(node.args) :])


def _fake_mode(graph: fx.Graph) -> AbstractContextManager[Any] | None:
    for node in graph.nodes:
        mode: AbstractContextManager[Any] | None = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode
    return None


def _describe(
    node: fx.Node,
    mode: AbstractContextManager[Any] | None,
    float32_results: frozenset[int] = frozenset(),
) -> None:
    """Work out anew what a node makes.

    The fake kernels of some operations describe statistics in 16 bits that the real ones make in
    float32.
    """
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: _described(each, mode))
    with mode if mode is not None else torch.no_grad():
        made = node.target(*args, **kwargs)  # type: ignore[operator]
        if float32_results and isinstance(made, (list, tuple)):
            made = tuple(
                each.float() if number in float32_results and _is_floating(each) else each
                for number, each in enumerate(made)
            )
    node.meta["val"] = made
    if isinstance(made, Tensor) and "tensor_meta" in node.meta:
        from torch.fx.passes.shape_prop import _extract_tensor_metadata

        node.meta["tensor_meta"] = _extract_tensor_metadata(made)


def _described(node: fx.Node, mode: AbstractContextManager[Any] | None) -> Any:
    """What a node makes, without its numbers: a graph holds small constants as they are."""
    made = node.meta["val"]
    held = isinstance(made, Tensor) and not isinstance(made, FakeTensor)
    return mode.from_tensor(made) if held and isinstance(mode, FakeTensorMode) else made


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
