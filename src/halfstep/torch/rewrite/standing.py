"""Keeping graphs apart that would be shared by modules of different policies.

Dynamo compiles functions, not modules: what it makes of the code behind a graph break it runs for
every module that has this code. Where their policies differ, a guard of its own tells them apart.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, TypeAlias

from torch import nn
from torch._dynamo.guards import install_guard
from torch._dynamo.source import GlobalStateSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import Guard, TracingContext

from ...core.policy import Policy, Resolved
from .paths import Paths

Below: TypeAlias = tuple[tuple[str, Policy], ...]
"""The policies of a module and of what it holds, by their paths from there."""

Standing: TypeAlias = tuple[tuple[str, Below], ...]
"""What tells two runs of the same code apart: its modules by name, and the policies below each."""


def variables() -> Mapping[str, Any]:
    """Return the variables that the code which Dynamo is compiling begins with."""
    try:
        translator: Any = InstructionTranslator.current_tx()
    except AttributeError:  # a part of a graph that is compiled when it first runs
        return {}
    scope: Mapping[str, Any] = translator.output.local_scope
    return scope


def guarded(name: str, holds: str, check: Callable[[Mapping[str, Any]], bool]) -> None:
    """Let Dynamo compile the code, which it is compiling now, anew where this does not hold.

    A part of a graph that is compiled when it first runs has the guards of the whole already.

    Args:
        name: of the guard.
        holds: what it guards, in words.
        check: takes the variables that the code begins with.
    """

    def create(builder: Any, guard: Guard) -> None:
        builder.add_python_lambda_leaf_guard_to_root(
            [f"___halfstep_{name}(L)"],
            [holds],
            closure_vars={f"___halfstep_{name}": check},
            is_epilogue=False,
        )

    if TracingContext.try_get() is not None:
        install_guard(Guard(GlobalStateSource(), create))


class Apart:
    """Keeps the graphs of modules apart whose policies differ.

    Args:
        paths: the paths of the model's modules.
        policies: the policy of every module, by its path.
    """

    def __init__(self, paths: Paths, policies: Mapping[str, Resolved]) -> None:
        self._paths, self._policies = paths, policies
        self._below: dict[str, Below] = {}
        self._differ = any(rule.key is not None for rule in policies.values())

    def guard(self, scope: Mapping[str, Any], caller: FrameType) -> None:
        """Let Dynamo compile the code anew where the policies are other ones."""
        if self._differ and not self._alone(scope):
            wanted = self._standing(scope, caller)
            guarded(
                "same_policies",
                "the PolicyMap of halfstep.torch.autocast is the same below this module",
                lambda scope: self._standing(scope, sys._getframe()) == wanted,
            )

    def _alone(self, scope: Mapping[str, Any]) -> bool:
        """Whether no other module of the model could run this code under other policies."""
        found = self._paths.modules_in(scope)
        if list(found) != ["self"]:
            return False
        mine, below = _classes(scope["self"]), self._policies_below(found["self"])
        return all(
            self._policies_below(path) == below
            for path, module in self._paths.modules()
            if mine & _classes(module)
        )

    def _standing(self, scope: Mapping[str, Any], caller: FrameType) -> Standing:
        modules = self._paths.modules_in(scope)
        if "self" not in modules:
            modules[""] = self._paths.stands_in(scope, caller)
        return tuple((name, self._policies_below(path)) for name, path in modules.items())

    def _policies_below(self, path: str) -> Below:
        if path not in self._below:
            start = f"{path}." if path else ""
            self._below[path] = tuple(
                (each.removeprefix(path), rule.policy)
                for each, rule in self._policies.items()
                if each == path or each.startswith(start)
            )
        return self._below[path]


def _classes(module: nn.Module) -> set[type]:
    return set(type(module).__mro__) - set(nn.Module.__mro__)
