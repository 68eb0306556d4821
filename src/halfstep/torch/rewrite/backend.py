"""Compiler backends for Dynamo that paint what they are given and hand it on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch import config as functorch_config
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomGraphPass

from .painting import Painter
from .standing import Apart, variables
from .warm_start import Count, fingerprint

Compiled: TypeAlias = Callable[..., Any]
Backend: TypeAlias = Callable[[fx.GraphModule, Sequence[Any]], Compiled]

_CAST = torch.ops.prims.convert_element_type.default


def inductor(painter: Painter) -> Backend:
    """Paint the joint graph in front of Inductor's own passes over it."""

    def compile_(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        from torch._inductor.compile_fx import compile_fx

        key = fingerprint(painter, graph)
        count, pass_ = Count(key, graph, inputs), _Pass(painter, key)
        patches = {"joint_custom_pre_pass": pass_}
        compiled: Any = compile_fx(graph, inputs, config_patches=patches)
        if pass_.low_operations is not None:
            count.write(pass_.low_operations)
        else:
            painter.found(count.read())
        return compiled  # type: ignore[no-any-return]

    return _watched(compile_, painter)


class _Pass(CustomGraphPass):
    """Paints Inductor's joint graphs, and its graphs without a backward pass."""

    def __init__(self, painter: Painter, key: str) -> None:
        self._painter, self._key = painter, key
        self.low_operations: int | None = None

    def __call__(self, graph: fx.Graph) -> None:
        self.low_operations = (self.low_operations or 0) + self._painter.paint(graph)

    def uuid(self) -> str:
        return self._key


def aot_eager(painter: Painter) -> Backend:
    """Paint the joint graph and run it operation by operation."""
    return _eagerly(painter, None)


def explaining(painter: Painter, name: str) -> Backend:
    """Paint the graphs that a backend would be given, and run them operation by operation."""
    if name != "inductor":
        return _eagerly(painter, None)
    from torch._inductor.decomposition import select_decomp_table

    return _eagerly(painter, select_decomp_table())


def _eagerly(painter: Painter, decompositions: Any) -> Backend:
    def partition(
        joint: fx.GraphModule, inputs: Sequence[Any], **keywords: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        if functorch_config.cse:  # as the partitioner does, but before casts are put in and counted
            joint.graph = fx_graph_cse(joint.graph)
        painter.paint(joint.graph)
        joint.recompile()
        return min_cut_rematerialization_partition(joint, inputs, **keywords)

    def infer(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        painter.paint(graph.graph)
        return _run(graph, inputs)

    backend: Backend = aot_autograd(
        fw_compiler=_run,
        bw_compiler=_run,
        inference_compiler=infer,
        partition_fn=partition,
        decompositions=decompositions,
    )
    return _watched(backend, painter)


def _watched(backend: Backend, painter: Painter) -> Backend:
    """Find out, for every graph that Dynamo gives to a backend, where in the model it stands.

    And count its runs.
    """
    apart = Apart(painter.paths, painter.policies)

    def compile_(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        scope, caller = variables(), sys._getframe()
        painter.paths.look_at(graph, scope, caller)
        apart.guard(scope, caller)
        painter.regions.note(graph)
        run = backend(graph, inputs)

        def counted(*args: Any) -> Any:
            painter.ran(args)
            return run(*args)

        return counted

    return compile_


def _run(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    """Return what runs a graph operation by operation, as torch's own ``aot_eager`` does."""
    for node in graph.graph.find_nodes(op="call_function", target=_CAST):
        # the same operation, but written in C++: 9 us a call, where this one takes 130 us
        node.target = torch.ops.aten._to_copy.default
        node.args, node.kwargs = node.args[:1], {"dtype": node.args[1]}
    return boxed_nop(graph, list(inputs))


COMPILERS: dict[str, Callable[[Painter], Backend]] = {
    "inductor": inductor,
    "aot_eager": aot_eager,
}
"""What compiles a painted graph, by the name that ``torch.compile`` has for it."""
