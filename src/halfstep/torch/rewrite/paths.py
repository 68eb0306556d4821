"""Which module an operation of a graph belongs to, and which line of code made it."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from torch import Tensor, fx, nn

_ROOT = re.compile(r"^L\[['\"](\w+)['\"]\]")
_ATTRIBUTE = re.compile(r"\._(?:modules|parameters|buffers)\[['\"]([^'\"]+)['\"]\]")
_ITEM = re.compile(r"\[['\"]?([^'\"\]]+)['\"]?\]")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


class Paths:
    """The paths of a model's modules, found again in graphs that may begin in the middle of it.

    After a graph break Dynamo begins with whatever function it is in, and names everything from
    there. Modules are told by their identity: in the names that Dynamo writes into a graph, in
    the variables of the function, and in those of its callers.

    Args:
        model: what is compiled; None for a plain function, whose operations have no path.

    Attributes:
        begins_at: the path of the module whose code the latest graph begins in; ``""`` is the
            root, and what calls it.
    """

    def __init__(self, model: nn.Module | None) -> None:
        # Dynamo keeps what it compiled by the code, which outlives the model
        self._model = None if model is None else weakref.ref(model)
        # a module may be held by several others, and then has several paths
        self._known: dict[int, tuple[weakref.ref[nn.Module], tuple[str, ...]]] = {}
        self._roots: dict[str, str] = {}
        self._captured: set[str] = set()
        self.begins_at = ""

    def look_at(self, graph: fx.GraphModule, scope: Mapping[str, Any], caller: FrameType) -> None:
        """Learn from one of Dynamo's graphs where it begins and which tensors it takes.

        Args:
            graph: the graph.
            scope: the variables that its code begins with.
            caller: the frame that called the code, or one that this one called.
        """
        model = None if self._model is None else self._model()
        if model is None:
            return
        self._known = {}
        for path, module in model.named_modules(remove_duplicate=False):
            _, others = self._known.get(id(module), (None, ()))
            self._known[id(module)] = weakref.ref(module), (*others, path)
        self._roots = self.modules_in(scope)
        self.begins_at = self.stands_in(scope, caller)
        self._take_note_of(graph, model)

    def _take_note_of(self, graph: fx.GraphModule, model: nn.Module) -> None:
        names: dict[int, list[str]] = {}
        for path, tensor in _tensors(model):
            names.setdefault(id(tensor), []).append(path)
        for node in graph.graph.find_nodes(op="placeholder"):
            argument = node.meta.get("grapharg")
            example: Any = getattr(argument, "_example", None)
            example = example() if callable(example) else example  # a reference to a tensor
            self._captured.update(names.get(id(example), ()))

    def captured(self, path: str) -> bool:
        """Whether a graph was made with the parameter or buffer at this path."""
        return path in self._captured

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the paths and modules that were there when the latest graph was made."""
        for reference, paths in self._known.values():
            module = reference()
            if module is not None:
                yield paths[0], module

    def path_of(self, value: object) -> str | None:
        """Return the path of a module of the model, None for anything else."""
        module, paths = self._known.get(id(value), (None, ()))
        return paths[0] if module is not None and module() is value else None

    def modules_in(self, scope: Mapping[str, Any]) -> dict[str, str]:
        """Return the paths of those variables that are modules of the model, by their names."""
        found = {name: self.path_of(value) for name, value in scope.items()}
        return {name: path for name, path in found.items() if path is not None}

    def stands_in(self, scope: Mapping[str, Any], caller: FrameType) -> str:
        """Return the path of the module whose code has these variables, or whose code called it."""
        path = self.path_of(scope.get("self"))
        if path is not None:
            return path
        frame: FrameType | None = caller
        while frame is not None and path is None:
            code = frame.f_code
            # a frame's variables are copied to be looked at
            if "self" in code.co_varnames or "self" in code.co_freevars:
                path = self.path_of(_compiled(frame.f_locals.get("self")))
            frame = frame.f_back
        return path or ""

    def of(self, node: fx.Node) -> str:
        """Return the path of the innermost module that called an operation; ``""`` is the root.

        An operation of the backward pass belongs to the module of the forward operation that it
        is the derivative of. What no module is known to have called belongs to the one that the
        graph begins in.
        """
        stack: Mapping[str, Any] = (
            node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
        )
        path = self.begins_at
        for key, called in stack.items():
            number = key.partition("@")[0]  # a module that is called again has @1 behind it
            known = self._known.get(int(number)) if number.isdigit() else None
            path = _below(path, known[1]) if known else self._named(str(called[0]))
        return path

    def _named(self, name: str) -> str:
        root, relative = split_root(name)
        return f"{self._roots.get(root, '')}.{relative}".strip(".")


def _below(path: str, paths: Sequence[str]) -> str:
    """Return which of a module's paths it has in the one at this path, else the first."""
    return next((each for each in paths if path and each.startswith(f"{path}.")), paths[0])


def _compiled(value: object) -> object:
    """Return the module that torch.compile wrapped, and anything else as it is."""
    return value._modules.get("_orig_mod", value) if isinstance(value, nn.Module) else value


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def split_root(name: str) -> tuple[str, str]:
    """Return the variable that Dynamo names a thing from, and the path from there.

    >>> split_root("L['self'].blocks.0.attn"), split_root("L['self']")
    (('self', 'blocks.0.attn'), ('self', ''))
    >>> split_root("L['self']._modules['blocks']._modules['0']._parameters['weight']")
    ('self', 'blocks.0.weight')
    """
    found = _ROOT.match(name)
    root, end = (found.group(1), found.end()) if found else ("", 0)
    plain = _ITEM.sub(r".\1", _ATTRIBUTE.sub(r".\1", name[end:]))
    return root, plain.strip(".")


def source_line(node: fx.Node) -> str:
    """Return the line of code that an operation comes from, as ``file.py:12``."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    file, line, _ = frames[-1]
    return f"{file.rpartition('/')[2]}:{line}"
