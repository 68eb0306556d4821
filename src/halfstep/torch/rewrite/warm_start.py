"""Inductor's caches between processes: what a painted graph depends on, and what came of it.

Two caches lie between a graph of Dynamo and its kernels. AOTAutograd's is asked before a graph is
painted, so its key must hold all that the painting depends on; FX's is asked with the painted one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ...core import formats, paint
from .build import captured
from .painting import Painter
from .regions import why_off


def fingerprint(painter: Painter, graph: fx.GraphModule) -> str:
    """Return what tells two paintings of the same graph apart, in hexadecimal.

    The code of the painter, the format, the lists, and the policy of every operation; for those
    are told by the modules' names, which are no part of the cache's own key.
    """
    lists = painter.lists
    kinds = [(name, lists.kind(name)[0].value) for name in sorted(lists.names)]
    return _digest(_code(), painter.dtype, kinds, *_of_operations(painter, graph))


def _of_operations(painter: Painter, graph: fx.GraphModule) -> Iterator[object]:
    for part in graph.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            yield painter.kept(painter.paths.of(node)), why_off(node)
            tensor = captured(node)
            if tensor is not None:  # its numbers may be too large to paint what takes it
                with unset_fake_temporarily():
                    yield tensor.detach().cpu().flatten().tolist()


@functools.cache
def _code() -> str:
    folders = (Path(__file__).parent, Path(paint.__file__).parent)
    files = [*(file for folder in folders for file in folder.glob("*.py")), Path(formats.__file__)]
    return _digest(*(file.read_bytes() for file in sorted(files)))


def _digest(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


class Count:
    """How many operations of a graph run in 16 bits, kept beside Inductor's caches.

    A graph out of a cache is not painted again, and this is what :func:`~halfstep.torch.autocast`
    has to know of it.

    Args:
        key: the graph's fingerprint.
        graph: the graph.
        inputs: what it is compiled for.
    """

    def __init__(self, key: str, graph: fx.GraphModule, inputs: Sequence[Any]) -> None:
        shapes = [_described(each) for each in inputs]
        name = _digest(key, graph.code, torch.is_grad_enabled(), *shapes)
        self._file = Path(cache_dir()) / "halfstep" / f"{name}.json"

    def write(self, low_operations: int) -> None:
        """Keep a count; where nothing can be written, a graph will be painted again."""
        temporary = self._file.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            self._file.parent.mkdir(exist_ok=True)
            temporary.write_text(json.dumps({"low_operations": low_operations}), encoding="utf-8")
            temporary.replace(self._file)

    def read(self) -> int | None:
        """Return the count, None where there is none."""
        with suppress(OSError, ValueError, KeyError):
            return int(json.loads(self._file.read_text(encoding="utf-8"))["low_operations"])
        return None


def _described(given: Any) -> object:
    if not isinstance(given, Tensor):
        return str(given)
    return str(given.dtype), tuple(map(str, given.shape)), str(given.device), given.requires_grad
