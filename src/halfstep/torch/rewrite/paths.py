"""Which module an operation of a graph belongs to, and which line of code made it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn

_ROOT = re.compile(r"^L\[['\"]\w+['\"]\]")
_ATTRIBUTE = re.compile(r"\._(?:modules|parameters|buffers)\[['\"]([^'\"]+)['\"]\]")
_ITEM = re.compile(r"\[['\"]?([^'\"\]]+)['\"]?\]")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


class Paths:
    """The paths of a model's modules, found again in graphs that may begin in the middle of it.

    After a graph break Dynamo begins with whatever module it is in, and names everything from
    there. Where that is is told by the parameters: they are the model's own.

    Args:
        model: what is compiled; None for a plain function, whose operations have no path.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._by_identity: dict[int, list[str]] = {}
        for path, tensor in () if model is None else _tensors(model):
            self._by_identity.setdefault(id(tensor), []).append(path)
        self._prefixes: dict[str, str] = {}
        self.captured: set[str] = set()

    def look_at(self, graph: fx.GraphModule) -> None:
        """Learn from one of Dynamo's graphs where it begins and which parameters it takes."""
        self._prefixes = {}
        for node in graph.graph.nodes:
            argument = node.meta.get("grapharg") if node.op == "placeholder" else None
            tensor = None if argument is None else getattr(argument, "_example", None)
            tensor = tensor() if callable(tensor) and not hasattr(tensor, "shape") else tensor
            full = self._by_identity.get(id(tensor), ())
            self.captured.update(full)
            if full and argument is not None:
                self._learn(_source(argument), full)

    @property
    def begins_at(self) -> str:
        """The path of the module in which the graph begins; ``""`` is the root."""
        return max(self._prefixes.values(), default="", key=len)

    def _learn(self, source: str, full: Iterable[str]) -> None:
        root, relative = split_root(source)
        for path in full:
            if root and (path == relative or path.endswith("." + relative)):
                self._prefixes[root] = path.removesuffix(relative).rstrip(".")
                return

    def of(self, node: fx.Node) -> str | None:
        """Return the path of the innermost module that called an operation; ``""`` is the root.

        An operation of the backward pass belongs to the module of the forward operation that it
        is the derivative of. None where no module is known to have called it.
        """
        stack: Mapping[str, Any] = (
            node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
        )
        innermost = next(reversed(list(stack.values())), None)
        if innermost is None:
            return None
        root, relative = split_root(str(innermost[0]))
        prefix = self._prefixes.get(root, "")
        return f"{prefix}.{relative}".strip(".")


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _source(argument: Any) -> str:
    name = argument.source.name
    return str(name() if callable(name) else name)


def split_root(name: str) -> tuple[str, str]:
    """Return what Dynamo names a thing from, and its path from there as modules spell it.

    >>> split_root("L['self'].blocks.0.attn"), split_root("L['self']")
    (("L['self']", 'blocks.0.attn'), ("L['self']", ''))
    >>> split_root("L['self']._modules['blocks']._modules['0']._parameters['weight']")
    ("L['self']", 'blocks.0.weight')
    """
    found = _ROOT.match(name)
    root = found.group() if found else ""
    plain = _ITEM.sub(r".\1", _ATTRIBUTE.sub(r".\1", name[len(root) :]))
    return root, plain.strip(".")


def source_line(node: fx.Node) -> str:
    """Return the line of code that an operation comes from, as ``file.py:12``."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    file, line, _ = frames[-1]
    return f"{file.rpartition('/')[2]}:{line}"
