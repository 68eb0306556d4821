"""Rules about numbers: constants that a format cannot hold, sums and results that outgrow it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from ..formats import Format, format_of
from .facts import LOSS, Constant, Facts, Range, Reduction, low
from .findings import Finding

_DIVIDES: dict[str, Callable[[float], float]] = {
    "div": lambda eps: 1 / eps,
    "reciprocal": lambda eps: 1 / eps,
    "rsqrt": lambda eps: 1 / math.sqrt(eps),
}
"""What becomes of an epsilon, where all it was added to is zero, in the operation after it."""

_BREAKS_AT_ZERO = frozenset((*_DIVIDES, "log", "log2", "log10", "sqrt", "pow"))

HEADROOM = 4.0
"""A result within this factor of the largest number is worth a word."""


def epsilon(facts: Facts) -> Iterator[Finding]:
    """Small constants that vanish in 16 bits, and with them the protection they were added for.

    Three ways: it rounds to zero (1e-8 in float16); it is so small that its reciprocal overflows
    (1e-6 in float16, where it protects a division); or it was taken from 1 and 1 is what is left
    (``clamp(p, max=1 - 1e-7)``).
    """
    for constant in facts.constants:
        if not low(constant.dtype) or constant.role not in ("added", "bound"):
            continue
        format = format_of(constant.dtype)
        said = _vanishes(constant, format) or _reciprocal(constant, format) or _one(constant)
        if said is None:
            continue
        severity, evidence = said
        yield Finding(
            "epsilon",
            "error" if severity else "warning",
            constant.place,
            evidence + _at(constant.where),
            _instead(constant, format),
        )


def _rounded(value: float, format: Format) -> float:
    return float(format.round(value))


def _vanishes(constant: Constant, format: Format) -> tuple[bool, str] | None:
    if constant.value == 0 or _rounded(constant.value, format) != 0:
        return None
    breaks = constant.feeds in _BREAKS_AT_ZERO
    after = f", and {constant.feeds} follows" if breaks else ""
    return breaks, (
        f"{constant.value:g} is 0 in {format.name}, whose smallest number is "
        f"{format.smallest_subnormal:.3g}: {constant.operation} of it protects nothing{after}"
    )


def _reciprocal(constant: Constant, format: Format) -> tuple[bool, str] | None:
    becomes = _DIVIDES.get(constant.feeds)
    if becomes is None or not 0 < constant.value < 1:
        return None
    result = becomes(_rounded(constant.value, format))
    if result <= format.max:
        return None
    return False, (
        f"where it is all there is, {constant.value:g} gives {result:.3g} in the "
        f"{constant.feeds} that follows, more than {format.name} can hold ({format.max:g})"
    )


def _one(constant: Constant) -> tuple[bool, str] | None:
    format = format_of(constant.dtype)
    near = 0.5 < abs(constant.value) < 2 and abs(constant.value) != 1
    if not near or abs(_rounded(constant.value, format)) != 1:
        return None
    return False, (
        f"{constant.value!r} is {math.copysign(1, constant.value):g} in {format.name}, whose "
        f"numbers around 1 are {format.epsilon:.2g} apart: the margin is lost"
    )


def _instead(constant: Constant, format: Format) -> str:
    where = _override(constant.place, "run it in float32")
    if 0.5 < abs(constant.value) < 2:
        return f"keep at least {format.epsilon:.2g} away from 1, or {where}"
    return (
        f"use at least {format.smallest_normal:.2g} (torch.finfo(x.dtype).tiny, the smallest "
        f"number with all its digits), or {where}"
    )


def constant(facts: Facts) -> Iterator[Finding]:
    """Constants beyond the format's largest number, such as the -1e9 of an attention mask.

    Infinities are meant, and factors are left out: kernels keep a Python number that multiplies a
    tensor in float32.
    """
    for found in facts.constants:
        if not low(found.dtype) or found.role == "factor" or not math.isfinite(found.value):
            continue
        format = format_of(found.dtype)
        becomes = _rounded(found.value, format)
        if math.isfinite(becomes):
            continue
        mask = found.value < 0
        yield Finding(
            "constant",
            "warning" if mask else "error",
            found.place,
            f"{found.value:g} in {found.operation} becomes {becomes} in {format.name}, whose "
            f"largest number is {format.max:g}{_at(found.where)}",
            (
                "use torch.finfo(x.dtype).min: a row that is masked whole turns into NaN under -inf"
                if mask
                else f"scale it down, or {_override(found.place, 'run it in float32')}"
            ),
        )


_BOUNDS: dict[str, tuple[Callable[[int, float], float], str]] = {
    "sum": (lambda count, largest: count * largest, "as many times the largest"),
    "cumsum": (lambda count, largest: count * largest, "as many times the largest"),
    "norm": (lambda count, largest: math.sqrt(count) * largest, "the root of so many times it"),
    "var": (lambda count, largest: largest * largest, "its square"),
}
"""How large a reduction's result can get at worst, from the largest magnitude that goes in."""


def reduction(facts: Facts) -> Iterator[Finding]:
    """Softmax in 16 bits, and sums so large that their result may not fit."""
    for found in facts.reductions:
        if not low(found.dtype):
            continue
        if "softmax" in found.operation:
            yield _softmax(found, format_of(found.dtype))
        elif found.operation in _BOUNDS:
            yield from _outgrows(found, format_of(found.dtype))


def _softmax(found: Reduction, format: Format) -> Finding:
    what = f"{found.operation} over {found.count} values in {format.name}"
    digits = f"{format.mantissa_bits + 1} significant bits{_at(found.where)}"
    if found.operation == "log_softmax" or found.place == LOSS:
        return Finding(
            "reduction", "warning", found.place,
            f"{what}: a loss is made of its results, and they keep {digits}",
            "hand it float32: x.float(), or an output in float32, which is apply_policy's default",
        )  # fmt: skip
    if 1 / found.count < format.smallest_normal:
        return Finding(
            "reduction", "warning", found.place,
            f"{what}: the mean probability, {1 / found.count:.2g}, is below the smallest number "
            f"with all its digits, {format.smallest_normal:.2g}{_at(found.where)}",
            _override(found.place, "run it in float32"),
        )  # fmt: skip
    return Finding(
        "reduction", "hint", found.place,
        f"{what}: its sum is taken in float32 inside the kernel, its results keep {digits}",
        "nothing, if the loss follows float32's; else "
        + _override(found.place, "run it in float32"),
    )  # fmt: skip


def _outgrows(found: Reduction, format: Format) -> Iterator[Finding]:
    bound, words = _BOUNDS[found.operation]
    worst = bound(found.count, found.largest)
    if worst <= format.max:
        return
    yield Finding(
        "reduction",
        "warning",
        found.place,
        f"{found.operation} of {found.count} values up to {found.largest:.3g} in {format.name}: at "
        f"worst {words}, {worst:.3g}, beyond its largest number {format.max:g}{_at(found.where)}",
        f"take it in float32 ({found.operation}(..., dtype=torch.float32)), take a mean, or "
        + _override(found.place, "run the module in float32"),
    )


def overflow(facts: Facts) -> Iterator[Finding]:
    """Results that did not fit their format on this batch, and those that came near."""
    for found in facts.ranges:
        if not low(found.dtype):
            continue
        format = format_of(found.dtype)
        if found.lost:
            yield _lost(found, format)
        elif found.largest * HEADROOM > format.max:
            yield Finding(
                "overflow", "warning", found.place,
                f"{found.operation} gives up to {found.largest:.4g} in {format.name}: a factor of "
                f"{format.max / found.largest:.2g} below its largest number {format.max:g}"
                f"{_at(found.where)}",
                _override(found.place, "leave room: run it in float32 or bfloat16"),
            )  # fmt: skip


def _lost(found: Range, format: Format) -> Finding:
    return Finding(
        "overflow",
        "error",
        found.place,
        f"{found.operation} in {format.name} made {found.lost} values that are not finite from "
        f"finite ones up to {found.largest_in:.4g}; the format ends at {format.max:g}"
        f"{_at(found.where)}",
        _override(found.place, "run it in float32 or bfloat16")
        + "; halfstep.torch.blame says how it came about",
    )


def _override(place: str, words: str) -> str:
    if place == LOSS:
        return f"{words}: cast what goes into the loss with .float()"
    return f"{words} (overrides={{{place!r}: 'float32'}})"


def _at(where: str) -> str:
    return f" ({where})" if where else ""
