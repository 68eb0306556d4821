"""A function and the arguments of one call: traced, its outputs remembered."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from . import _internals as internals
from .errors import NotTraceableError

_NOT_TRACEABLE = (jax.errors.JAXTypeError, jax.errors.JAXIndexError)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced; everything else stays what it is while the function is traced."""
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct | jax.Ref)


@dataclass(frozen=True)
class Call:
    """A traced call.

    Attributes:
        closed: the program, from arrays to arrays.
        arrays: the arrays among the arguments.
        paths: the path of each, ``"params/head/kernel"``.
        output: puts the arrays of the result back among its other leaves.
    """

    closed: internals.ClosedJaxpr
    arrays: list[Any]
    paths: list[str]
    output: Callable[[Sequence[Any]], Any]


def trace_call(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], where: str
) -> Call:
    """Trace a call; Python numbers, strings, functions and other leaves stay as they are.

    Raises:
        NotTraceableError: the function needs the numbers of an array, for instance in an ``if``.
    """
    with_paths, treedef = jax.tree_util.tree_flatten_with_path((tuple(args), dict(kwargs)))
    leaves = [leaf for _, leaf in with_paths]
    places = [place for place, leaf in enumerate(leaves) if is_array(leaf)]
    seen: list[tuple[Any, list[Any]]] = []

    def flat(*arrays: Any) -> list[Any]:
        filled = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        inner_args, inner_kwargs = jax.tree_util.tree_unflatten(treedef, filled)
        outputs, out_tree = jax.tree_util.tree_flatten(function(*inner_args, **inner_kwargs))
        seen.append((out_tree, [None if is_array(leaf) else leaf for leaf in outputs]))
        return [leaf for leaf in outputs if is_array(leaf)]

    arrays = [leaves[place] for place in places]
    try:
        closed = internals.trace(flat, arrays)
    except _NOT_TRACEABLE as error:
        first = str(error).partition("\n")[0].rstrip(".")
        raise NotTraceableError(
            f"{where}: the function cannot be traced, because it needs the numbers of an array "
            f"while it runs: {first}. Arguments that are not arrays (bool, int, float, str, "
            "functions) stay as they are; give such a value as one of these, or use jax.lax.cond "
            "and jnp.where."
        ) from error
    out_tree, others = seen[-1]

    def output(results: Sequence[Any]) -> Any:
        rest = iter(results)
        return jax.tree_util.tree_unflatten(
            out_tree, [next(rest) if other is None else other for other in others]
        )

    names = _argument_names(function, len(args))
    return Call(closed, arrays, [_path(names, with_paths[place][0]) for place in places], output)


def _argument_names(function: Callable[..., Any], count: int) -> list[str]:
    """The names of the positional arguments, or their numbers where they have none."""
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a callable without a signature
        found = []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in found if parameter.kind in positional]
    return [names[i] if i < len(names) else str(i) for i in range(count)]


def _path(names: Sequence[str], keys: tuple[Any, ...]) -> str:
    kind, argument, *rest = keys
    # the first key tells positional arguments from those by name
    first = names[argument.idx] if kind.idx == 0 else str(argument.key)
    return "/".join((first, jax.tree_util.keystr(tuple(rest), simple=True, separator="/"))).rstrip(
        "/"
    )
