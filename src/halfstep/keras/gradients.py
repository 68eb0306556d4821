"""Gradients on any backend: multiply them by the inverse of the scale, say if all are finite.

The arithmetic is float32 where a gradient has 16 bits: 1 / scale times a float16 gradient would be
zero where the quotient is below 2**-24.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
from keras import ops

Grads: TypeAlias = Sequence[Any]
"""Gradients in the order of their variables; None where there is none."""

HALVES = ("float16", "bfloat16")


def widened(value: Any) -> Any:
    """Return an array in float32 if it has 16 bits, else as it is."""
    return ops.cast(value, "float32") if _dtype(value) in HALVES else value


def unscaled(grads: Grads, inverse: Any, kept: Sequence[bool]) -> list[Any]:
    """Return every gradient times ``inverse``, at least in float32.

    Args:
        grads: gradients; TensorFlow's ``IndexedSlices`` stay sparse.
        inverse: a float32 scalar of the backend.
        kept: where True, the gradient is passed on as it is.
    """

    def times(value: Any) -> Any:
        wide = widened(value)
        return ops.multiply(wide, ops.cast(inverse, _dtype(wide)))

    return [
        grad if grad is None or keep else _over_values(grad, times)
        for grad, keep in zip(grads, kept, strict=True)
    ]


def all_finite(grads: Grads) -> Any:
    """Return whether every number is finite, a boolean scalar of the backend."""
    each = [ops.all(ops.isfinite(_values(grad))) for grad in grads if grad is not None]
    return functools.reduce(ops.logical_and, each)


def judge(
    grads: Grads, variables: Sequence[Any], inverse: Any, kept: Sequence[bool], checked: bool
) -> tuple[list[Any], Any]:
    """Return the gradients to step with, and whether all of them are finite.

    Args:
        grads: scaled gradients.
        variables: the variable of each; on torch a gradient that is its variable's own ``.grad``
            is unscaled in place, as ``torch.amp`` does.
        inverse: 1 / scale; None for gradients that are unscaled already.
        kept: where True, the gradient is no gradient, and is passed on as it is.
        checked: whether a scaled gradient is finite if and only if the unscaled one is.
    """
    return _JUDGE[keras.backend.backend()](grads, variables, inverse, kept, checked)


def _judge(
    grads: Grads, _: Sequence[Any], inverse: Any, kept: Sequence[bool], checked: bool
) -> tuple[list[Any], Any]:
    results = list(grads) if inverse is None else unscaled(grads, inverse, kept)
    return results, all_finite(results)


def _judge_torch(
    grads: Grads, variables: Sequence[Any], inverse: Any, kept: Sequence[bool], checked: bool
) -> tuple[list[Any], Any]:
    """Check and unscale in one pass over the gradients of each device, which is one launch."""
    torch = sys.modules["torch"]
    if torch.compiler.is_compiling() or any(g is not None and g.is_sparse for g in grads):
        return _judge(grads, variables, inverse, kept, checked)
    with torch.no_grad():
        factors = [None if keep else inverse for keep in kept]
        results = _writable(torch, grads, variables, factors)
        buckets: dict[Any, list[int]] = {}
        for place, grad in enumerate(results):
            if grad is not None:
                key = (grad.device, grad.dtype, factors[place] is None)
                buckets.setdefault(key, []).append(place)
        flags = [
            _check([results[place] for place in places], None if plain else inverse, checked)
            for (_, _, plain), places in buckets.items()
        ]
        if len(flags) == 1:
            return results, flags[0] == 0
        return results, torch.stack([flag.to(flags[0].device) for flag in flags]).sum() == 0


def _writable(
    torch: Any, grads: Grads, variables: Sequence[Any], factors: Sequence[Any]
) -> list[Any]:
    """Return gradients in float32 or more that may be unscaled in place.

    Copies, in one launch, except of a variable's own ``.grad`` and of what stays as it is.
    """
    results = list(grads)
    foreign = []
    for place, (grad, variable) in enumerate(zip(grads, variables, strict=True)):
        if grad is None:
            continue
        if grad.dtype in (torch.float16, torch.bfloat16):
            results[place] = grad.float()
        elif factors[place] is not None and grad is not _own_grad(variable):
            foreign.append(place)
    copies = torch._foreach_mul([grads[place] for place in foreign], 1.0) if foreign else ()
    for place, copy in zip(foreign, copies, strict=True):
        results[place] = copy
    return results


def _check(bucket: list[Any], inverse: Any, checked: bool) -> Any:
    """Unscale gradients of one device and dtype in place; return 0.0 if all are finite."""
    torch = sys.modules["torch"]
    home = bucket[0].device
    found, one = torch.zeros((), device=home), torch.ones((), device=home)
    factor = one if inverse is None else inverse.to(home)
    if not checked:
        torch._foreach_mul_(bucket, factor)
        factor = one
    torch._amp_foreach_non_finite_check_and_unscale_(bucket, found, factor)
    return found


def _own_grad(variable: Any) -> Any:
    value = getattr(variable, "value", variable)
    return value.grad if value.is_leaf else None


_JUDGE: dict[str, Callable[..., tuple[list[Any], Any]]] = {
    "torch": _judge_torch,
    "jax": _judge,
    "tensorflow": _judge,
}


def _values(grad: Any) -> Any:
    """The numbers of a gradient; of a sparse one, those that it holds."""
    return grad.values if type(grad).__name__ == "IndexedSlices" else grad


def _over_values(grad: Any, function: Callable[[Any], Any]) -> Any:
    if type(grad).__name__ == "IndexedSlices":
        return type(grad)(function(grad.values), grad.indices, grad.dense_shape)
    return function(grad)


def _dtype(value: Any) -> str:
    return str(keras.backend.standardize_dtype(value.dtype))
