"""Which modules of a model are watched, and by which names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...errors import PolicyError, nearest

Choice: TypeAlias = Iterable[str] | Callable[[str, nn.Module], bool] | None
"""Paths or patterns, or a function of path and module, or None for the default."""

_BY_NAME = re.compile(r"softmax|norm|attention|attn", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """A module that is watched.

    Attributes:
        path: where it lies in the model, ``""`` for the model itself.
        module: the module.
    """

    path: str
    module: nn.Module

    @property
    def title(self) -> str:
        """The name of its class."""
        return type(self.module).__name__

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return its own parameters, those of its children left out, by name."""
        # _parameters: under a policy the attribute is a copy inside of forward
        return [(name, p) for name, p in self.module._parameters.items() if p is not None]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of what ``torch.compile`` and DDP put around it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` was applied to the model, to what wraps it, or to a part of it."""
    return any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        for module in model.modules()
    )


def is_interesting(path: str, module: nn.Module) -> bool:
    """Whether a module is watched by default: it owns parameters, or is a softmax or the like.

    >>> is_interesting("head", nn.Linear(2, 2)), is_interesting("act", nn.ReLU())
    (True, False)
    >>> is_interesting("scores", nn.Softmax(-1))
    True
    """
    return bool(module._parameters) or _BY_NAME.search(type(module).__name__) is not None


def choose(model: nn.Module, modules: Choice) -> list[Target]:
    """Return the modules to watch, in the order of the model.

    Args:
        model: the model, without wrappers.
        modules: as in :class:`~halfstep.torch.NumericsMonitor`.

    Raises:
        PolicyError: a pattern that names no module, or a choice that chooses none.
    """
    named = [(plain_path(path), module) for path, module in model.named_modules()]
    if modules is None:
        chosen = [pair for pair in named if is_interesting(*pair)]
    elif callable(modules):
        chosen = [pair for pair in named if modules(*pair)]
    else:
        chosen = _named(named, [modules] if isinstance(modules, str) else list(modules))
    if not chosen:
        raise PolicyError(
            f"NumericsMonitor(modules={modules!r}): it chooses none of the {len(named)} modules of "
            f"this {type(model).__name__}."
        )
    return [Target(path, module) for path, module in chosen]


def plain_path(path: str) -> str:
    """Return the path that a module has without ``torch.compile`` around it or around a parent."""
    return path.replace("_orig_mod.", "").removesuffix("._orig_mod").removesuffix("_orig_mod")


def _named(named: list[tuple[str, nn.Module]], keys: list[str]) -> list[tuple[str, nn.Module]]:
    """What a key names, and what lies below it: the rule of a policy map."""
    covered: set[str] = set()
    for key in keys:
        roots = [path for path, _ in named if path == key or re.fullmatch(key, path)]
        if not roots:
            raise PolicyError(
                f"NumericsMonitor(modules=...): {key!r} names no module."
                + nearest(key, [path for path, _ in named])
            )
        for root in roots:
            below = f"{root}." if root else ""
            covered |= {path for path, _ in named if path == root or path.startswith(below)}
    return [pair for pair in named if pair[0] in covered]


def parameter_names(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return every parameter of a model by name, in its order, once each."""
    return [(name.replace("_orig_mod.", ""), p) for name, p in model.named_parameters()]


def tensors_in(output: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """Return the floating tensors of a module's output, each with where it lies in it.

    A lone tensor has the name ``""``, the second of a tuple ``"1"``, a field of a dataclass or an
    entry of a dict its key.

    >>> import torch
    >>> [name for name, _ in tensors_in((torch.ones(1), {"loss": torch.ones(1)}, None))]
    ['0', '1.loss']
    """
    if isinstance(output, Tensor):
        return [(name, output)] if output.is_floating_point() or output.is_complex() else []
    found: list[tuple[str, Tensor]] = []
    for key, value in _entries(output):
        found += tensors_in(value, f"{name}.{key}" if name else str(key))
    return found


def _entries(output: Any) -> Iterable[tuple[object, Any]]:
    if isinstance(output, Mapping):
        return list(output.items())
    if isinstance(output, (list, tuple)):
        return list(enumerate(output))
    fields = getattr(type(output), "__dataclass_fields__", None)
    return [(key, getattr(output, key)) for key in fields] if fields else []
