"""How much work a matrix product is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ._internals import Equation


def flops(equation: Equation) -> int:
    """Multiplications and additions of a matrix product or convolution; 0 for all else."""
    count = _COUNTS.get(equation.primitive.name)
    return 0 if count is None else 2 * count(equation)


def _product(shape: Sequence[int], axes: Iterable[int]) -> int:
    return math.prod(int(shape[axis]) for axis in axes)


def _size(var: Any) -> int:
    return math.prod(int(length) for length in var.aval.shape)


def _dot_general(equation: Equation) -> int:
    (contracting, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return _size(equation.outvars[0]) * _product(shape, contracting)


def _ragged_dot_general(equation: Equation) -> int:
    # every row meets one group's matrix
    numbers = equation.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    (contracting, _), _ = numbers
    shape = equation.invars[0].aval.shape
    return _size(equation.outvars[0]) * _product(shape, contracting)


def _convolution(equation: Equation) -> int:
    kernel = equation.invars[1].aval.shape
    features = int(kernel[equation.params["dimension_numbers"].rhs_spec[0]])
    return _size(equation.outvars[0]) * _product(kernel, range(len(kernel))) // features


_COUNTS: dict[str, Callable[[Equation], int]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
    "conv_general_dilated": _convolution,
}
