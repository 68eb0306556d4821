"""Everything of JAX that is not documented for users, in one place.

Checked on jax 0.10.2. ``tests/jax/test_internals.py`` checks each of these on the installed
version and says which one moved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
from jax.extend import core as jex

CHECKED_VERSIONS = ("0.10.2",)
"""The versions of JAX on which the tests of this door passed."""

ClosedJaxpr: TypeAlias = Any
Jaxpr: TypeAlias = Any
Equation: TypeAlias = Any
NameStack: TypeAlias = Any

Literal: type = jex.Literal
DropVar: type = jex.DropVar


def trace(function: Callable[..., Any], arguments: Sequence[Any]) -> ClosedJaxpr:
    """The program of a function of flat arguments: arrays, tracers or abstract values."""
    return jax.make_jaxpr(function)(*arguments)


def is_float32(aval: Any) -> bool:
    """Whether an abstract value is an array of float32, not a reference to one."""
    return isinstance(aval, jax.core.ShapedArray) and aval.dtype == "float32"


def with_dtype(aval: Any, dtype: Any) -> Any:
    """The abstract value of the same shape and sharding in another dtype."""
    return aval.update(dtype=jax.numpy.dtype(dtype), weak_type=False)


def name_stack(equation: Equation) -> NameStack:
    """The name scopes and transformations around an equation, inside its own program."""
    return equation.source_info.name_stack


def scope_names(stack: NameStack) -> tuple[str, ...]:
    """The names of the scopes in a name stack, without the transformations between them."""
    from jax._src import source_info_util

    return tuple(part.name for part in stack.stack if isinstance(part, source_info_util.Scope))


def user_line(equation: Equation) -> str:
    """``file.py:12`` for the line of the user's code that made an equation, or nothing."""
    from jax._src import source_info_util

    frame = source_info_util.user_frame(equation.source_info.traceback)
    if frame is None:
        return ""
    return f"{frame.file_name.replace(chr(92), '/').rpartition('/')[2]}:{frame.start_line}"


@contextlib.contextmanager
def standing_at(equation: Equation, stack: NameStack) -> Iterator[None]:
    """What is bound inside keeps the equation's line, names, and compilation hints."""
    from jax._src import source_info_util

    names = source_info_util.current_name_stack() + stack
    traceback = equation.source_info.traceback
    with source_info_util.user_context(traceback, name_stack=names), equation.ctx.manager:
        yield


def bind(equation: Equation, arguments: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Run an equation's primitive on other arguments."""
    primitive = equation.primitive
    found = primitive.bind(*arguments, **primitive.get_bind_params(params))
    return list(found) if primitive.multiple_results else [found]


def without_constants(closed: ClosedJaxpr) -> tuple[Jaxpr, list[Any]]:
    """A program that takes its constants as its first arguments, and these."""
    jaxpr = closed.jaxpr
    debug = jaxpr.debug_info._replace(arg_names=("",) * (len(jaxpr.constvars) + len(jaxpr.invars)))
    opened = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars], debug_info=debug)
    return opened, list(closed.consts)


def retraced(jaxpr: Jaxpr, dtype: Any) -> Jaxpr:
    """The program of a scatter's addition, for scalars of another dtype."""
    function = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))
    scalars = [with_dtype(var.aval, dtype) for var in jaxpr.invars]
    return trace(function, scalars).jaxpr


def zeros_of(zero: Any) -> Any:
    """The zeros that a symbolic zero stands for, with its sharding and its varying axes."""
    from jax._src.interpreters import ad

    return ad.instantiate_zeros(ad.Zero(zero.aval))  # type: ignore[attr-defined, no-untyped-call]


def is_unspecified(sharding: Any) -> bool:
    """Whether a ``jit`` left this sharding to the compiler."""
    return type(sharding).__name__ == "UnspecifiedValue" or sharding is None


def is_concrete(array: Any) -> bool:
    """Whether the numbers of an array are known while tracing."""
    return not isinstance(array, jax.core.Tracer)


def constrained(array: Any, sharding: Any) -> Any:
    """The array with a sharding (JAX leaves this function without types)."""
    return jax.lax.with_sharding_constraint(array, sharding)  # type: ignore[no-untyped-call]
