"""Whether the code that runs now is traced: what it reads from a variable would be frozen."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import keras
from keras.src.backend.common import stateless_scope


def current_scope() -> Any | None:
    """Return the ``keras.StatelessScope`` that variables are read from and written to, if any."""
    return stateless_scope.get_stateless_scope() if stateless_scope.in_stateless_scope() else None


def is_traced(values: Iterable[Any] = ()) -> bool:
    """Whether this code runs once, to be compiled, and not each time.

    Args:
        values: arrays that the code works on. JAX marks those, and nothing else, as traced; what
            ``jax.grad`` alone passes holds a real array, and does not count.
    """
    return _TRACED[keras.backend.backend()](values)


def _jax(values: Iterable[Any]) -> bool:
    tracer = sys.modules["jax"].core.Tracer

    def stands_for_none(value: Any) -> bool:
        while isinstance(value, tracer):
            value = getattr(value, "primal", getattr(value, "val", None))
        return not hasattr(value, "__array__")

    return any(isinstance(value, tracer) and stands_for_none(value) for value in values)


def _tensorflow(_: Iterable[Any]) -> bool:
    return not sys.modules["tensorflow"].executing_eagerly()


def _torch(_: Iterable[Any]) -> bool:
    return bool(sys.modules["torch"].compiler.is_compiling())


_TRACED = {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}
