"""Which variables a layer assigns to while it is called, read off its source.

Inside a call under a mixed policy a variable reads in the compute dtype. On torch, Keras then
writes an assigned value into that cast copy, and it is lost; on JAX and TensorFlow ``assign_add``
starts from the cast value, so that what it adds drowns in 16 bits.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import keras

from . import _internals

_ASSIGN = ("assign", "assign_add", "assign_sub")
_ENOUGH = frozenset(keras.Model.__mro__)


class Target(NamedTuple):
    """What a call assigns to.

    Attributes:
        path: the attributes from the layer to the variable; None where the source does not say.
        from_itself: whether the new value is visibly made from the variable's own.
    """

    path: tuple[str, ...] | None
    from_itself: bool


def assigned_in_call(layer: Any) -> list[tuple[Any, bool]]:
    """Return the variables of a layer that its call assigns to, and that read cast inside it.

    With each comes whether its new value is visibly made from its own. What is assigned through a
    name that the source does not resolve (a loop over states) counts as every variable of the
    layer that is not trainable. Assignments by other objects' methods are not seen.
    """
    if not layer.autocast or layer.compute_dtype == layer.variable_dtype:
        return []
    found: dict[int, tuple[Any, bool]] = {}
    kind: Any = type(layer)
    for path, from_itself in _targets(kind):
        for variable in _resolve(layer, path):
            if _internals.is_cast(variable):
                before = found.get(id(variable), (variable, False))[1]
                found[id(variable)] = (variable, from_itself or before)
    return list(found.values())


def _resolve(layer: Any, path: tuple[str, ...] | None) -> list[Any]:
    if path is not None:
        value = layer
        for name in path:
            value = getattr(value, name, None)
        if isinstance(value, keras.Variable):
            return [value]
        if value is None:  # a variable that this layer was built without
            return []
    return [variable for variable in _internals.own_variables(layer) if not variable.trainable]


@cache
def _targets(cls: Any) -> tuple[Target, ...]:
    """What the call of a class, and the methods of its own that it calls, assign to."""
    targets: dict[Target, None] = {}
    seen, waiting = set(), ["call"]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for function in _definitions(cls, name):
            here, called = _read(function)
            targets |= dict.fromkeys(here)
            waiting += called
    return tuple(targets)


def _read(function: FunctionType) -> tuple[list[Target], list[str]]:
    """What one method assigns to, and the methods of its own layer that it calls."""
    tree = _tree(function)
    if tree is None:
        # no source: what is compiled still names the methods that it calls
        named = set(function.__code__.co_names).intersection(_ASSIGN)
        return [Target(None, bool(named - {"assign"}))] if named else [], []
    targets, called = [], []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        receiver = node.func.value
        if node.func.attr in _ASSIGN:
            value = " ".join(ast.unparse(argument) for argument in node.args)
            from_itself = node.func.attr != "assign" or ast.unparse(receiver) in value
            targets.append(Target(_attributes(receiver), from_itself))
        elif _is_own(receiver):
            called.append(node.func.attr)
    return targets, called


def _definitions(cls: Any, name: str) -> Iterator[FunctionType]:
    """The definition of a method, and those that it may reach by ``super()``."""
    for owner in cls.__mro__:
        function = inspect.unwrap(owner.__dict__[name]) if name in owner.__dict__ else None
        if owner not in _ENOUGH and isinstance(function, FunctionType):
            yield function
            if "super" not in function.__code__.co_names:
                return


def _tree(function: FunctionType) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def _is_own(node: ast.expr) -> bool:
    """``self`` or ``super()``."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id == "self"


def _attributes(node: ast.expr) -> tuple[str, ...] | None:
    """``("a", "b")`` for ``self.a.b``."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return tuple(reversed(names)) if _is_own(node) and names else None
