"""What the operations of torch mean to an audit: tables by the name of the operation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ...core.advice import Product
from ...core.advice.facts import Role


def dtype_name(tensor: Tensor) -> str:
    """Return ``"float16"`` for ``torch.float16``."""
    return str(tensor.dtype).removeprefix("torch.")


class Sized(NamedTuple):
    """A matrix product in numbers."""

    sizes: tuple[tuple[str, int], ...]
    flops: int
    rows: int


def _matrices(left: Tensor, right: Tensor) -> Sized:
    rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
    batch = left.shape[0] if left.dim() == 3 else 1
    flops = 2 * batch * rows * inner * columns
    return Sized((("in", inner), ("out", columns)), flops, rows * batch)


def _linear(x: Tensor, weight: Tensor, *rest: Any) -> Sized:
    rows = x.numel() // max(x.shape[-1], 1)
    inner, columns = x.shape[-1], weight.shape[0]
    return Sized((("in", inner), ("out", columns)), 2 * rows * inner * columns, rows)


def _convolution(x: Tensor, weight: Tensor, *rest: Any) -> Sized | None:
    transposed, groups = bool(rest[4]), int(rest[6])
    first, second = weight.shape[0] // groups, weight.shape[1]
    into, out = (first, second) if transposed else (second, first)
    if groups > 1 and into == 1:
        return None  # a depthwise convolution is no matrix product
    kernel = math.prod(weight.shape[2:])
    # each input pixel (transposed: each output's source) meets the whole kernel once
    places = x.numel() // x.shape[1] if transposed else _pixels(x, weight, rest)
    return Sized(
        (("in channels", into), ("out channels", out)),
        2 * places * kernel * into * out * groups,
        places,
    )


def _pixels(x: Tensor, weight: Tensor, rest: Sequence[Any]) -> int:
    _, stride, padding, dilation = rest[:4]
    out = [
        (size + 2 * pad - dil * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, dil in zip(
            x.shape[2:], weight.shape[2:], _each(stride, x), _each(padding, x),
            _each(dilation, x), strict=True,
        )
    ]  # fmt: skip
    return int(x.shape[0]) * math.prod(out)


def _each(value: Sequence[int], x: Tensor) -> Sequence[int]:
    return value if len(value) > 1 else list(value) * (x.dim() - 2)


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Sized:
    heads, length, width = math.prod(query.shape[:-2]), query.shape[-2], query.shape[-1]
    flops = 4 * heads * length * key.shape[-2] * width
    return Sized((("head size", width),), flops, heads * length)


_PRODUCTS: dict[str, Callable[..., Sized | None]] = {
    "mm": _matrices,
    "bmm": _matrices,
    "addmm": lambda bias, left, right, *rest: _matrices(left, right),
    "_addmm_activation": lambda bias, left, right, *rest: _matrices(left, right),
    "baddbmm": lambda bias, left, right, *rest: _matrices(left, right),
    "linear": _linear,
    "convolution": _convolution,
    "_convolution": _convolution,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_attention_math": _attention,
}


def product_of(name: str, args: Sequence[Any], place: str) -> Product | None:
    """Return the matrix product that an operation is, None if it is none."""
    sized = _PRODUCTS[name](*args) if name in _PRODUCTS else None
    if sized is None:
        return None
    tensors = [value for value in args if isinstance(value, Tensor)]
    return Product(
        place, plain(name), dtype_name(tensors[-1]), sized.sizes, sized.flops, sized.rows
    )


def plain(name: str) -> str:
    """Return the name that people know an operation by.

    >>> plain("_log_softmax"), plain("add_"), plain("linalg_vector_norm"), plain("_to_copy")
    ('log_softmax', 'add', 'norm', 'cast')
    """
    known = {"linalg_vector_norm": "norm", "_to_copy": "cast", "native_layer_norm": "layer_norm"}
    if name.startswith("_scaled_dot_product"):
        return "scaled_dot_product_attention"
    return known.get(name, name.strip("_"))


REDUCTIONS = frozenset(
    ("_softmax", "_log_softmax", "sum", "mean", "var", "cumsum", "linalg_vector_norm", "logsumexp")
)
"""What makes one number of many."""


def reduced(name: str, args: Sequence[Any], result: Tensor) -> int:
    """Return how many numbers a reduction made into one."""
    source: Tensor = args[0]
    if name in ("_softmax", "_log_softmax", "cumsum"):
        return int(source.shape[args[1]]) if source.dim() else 1
    return source.numel() // max(result.numel(), 1)


_NUMBERS: dict[str, tuple[tuple[int | str, Role], ...]] = {
    "add": ((1, "added"),),
    "sub": ((1, "added"),),
    "rsub": ((1, "added"),),
    "mul": ((1, "factor"),),
    "div": ((1, "factor"),),
    "clamp": ((1, "bound"), (2, "bound"), ("min", "bound"), ("max", "bound")),
    "clamp_min": ((1, "bound"),),
    "clamp_max": ((1, "bound"),),
    "maximum": ((1, "bound"),),
    "minimum": ((1, "bound"),),
    "masked_fill": ((2, "fill"),),
    "where": ((1, "fill"), (2, "fill")),
    "full": ((1, "fill"),),
    "full_like": ((1, "fill"),),
    "fill": ((1, "fill"),),
    "scalar_tensor": ((0, "fill"),),
}
"""Which argument of an operation may be a number, by its place or its name, and what it does."""


def numbers_in(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> list[tuple[float, Role]]:
    """Return the numbers among the arguments, 0-dimensional tensors on the CPU counted in."""
    found = []
    for at, role in _NUMBERS.get(name, ()):
        place = at if isinstance(at, int) else len(args)
        value = args[place] if place < len(args) else kwargs.get(str(at))
        number = _number(value)
        if number is not None:
            found.append((-number if name == "sub" else number, role))
    return found


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    scalar = isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()
    if scalar and value.device.type == "cpu" and not value.requires_grad:
        return float(value)
    return None
