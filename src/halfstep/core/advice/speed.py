"""Rules about speed and memory: what keeps the policy from paying, and what it would allow."""

from __future__ import annotations

from collections.abc import Iterator

from .facts import Facts, Product, low
from .findings import Finding, Severity

MULTIPLE = {"float16": 8, "bfloat16": 8, "float8_e4m3fn": 16, "float8_e5m2": 16}
"""Sizes in memory must be multiples of 16 bytes for the fastest kernels: 8 numbers of 16 bits, 16
of 8. NVIDIA, "Deep Learning Performance Guide",
https://docs.nvidia.com/deeplearning/performance/."""

MATTERS = 0.1
"""From this share of a batch's arithmetic on, a product that is not aligned is worth a warning."""

WORTH = 2**20
"""Bytes that a batch must keep before its memory is worth a word."""

GROWS = 1.5
"""From this factor on it is worth saying that the batch could grow."""


def alignment(facts: Facts) -> Iterator[Finding]:
    """Dimensions of matrix products that are not multiples of 8 (16 for float8).

    Tensor cores read blocks of 16 bytes. A product whose rows do not end on such a border runs on
    slower kernels, or on none that uses them.
    """
    for product in facts.products:
        multiple = MULTIPLE.get(product.dtype)
        if multiple is None:
            continue
        odd = [(name, size) for name, size in product.sizes if size % multiple]
        if odd:
            yield _unaligned(facts, product, odd, multiple)


def _unaligned(
    facts: Facts, product: Product, odd: list[tuple[str, int]], multiple: int
) -> Finding:
    padded = {name: -(-size // multiple) * multiple for name, size in odd}
    share = product.flops / facts.flops if facts.flops else 0.0
    grown = 1.0
    for name, size in odd:
        grown *= padded[name] / size
    names = ", ".join(f"{name} {size}" for name, size in odd)
    better = ", ".join(f"{name} to {size}" for name, size in padded.items())
    severity: Severity = "warning" if share >= MATTERS and facts.tensor_cores else "hint"
    none_here = "" if facts.tensor_cores else "; there are no tensor cores here, on a GPU there are"
    verb = "is no multiple" if len(odd) == 1 else "are no multiples"
    return Finding(
        "alignment",
        severity,
        product.place,
        f"{product.operation} in {product.dtype}: {names} {verb} of {multiple}; {share:.1%} of the "
        f"batch's matrix arithmetic{none_here}",
        f"pad {better}: {grown - 1:.1%} more arithmetic in it, all of it on the aligned kernels"
        if grown < 2
        else f"leave it, unless it is slow: {better} would multiply its arithmetic by {grown:.2g}",
    )


def batch_size(facts: Facts) -> Iterator[Finding]:
    """The batch could grow within the memory that float32 needed.

    What a forward pass keeps for the backward pass is what grows with the batch; it was counted
    in float32 and under the policy, on the batch that was given.
    """
    memory = facts.memory
    if memory is None or not memory.kept_after or memory.kept_before < WORTH:
        return
    factor = memory.kept_before / memory.kept_after
    if factor < GROWS:
        return
    words = "a batch twice as large" if factor >= 2 else f"a batch {factor:.2g} times as large"
    yield Finding(
        "batch-size",
        "hint",
        "",
        f"this batch keeps {_size(memory.kept_after)} for the backward pass, {factor:.2f} times "
        f"less than the {_size(memory.kept_before)} of float32; weights and gradients need "
        f"{_size(memory.fixed)} in both",
        f"{words} fits where this one fitted in float32; scale the learning rate with it as usual",
    )


def _size(count: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} bytes"


def hardware(facts: Facts) -> Iterator[Finding]:
    """The machine has no fast units for what the policy computes in."""
    for check in facts.hardware:
        if not check.ok:
            yield Finding(
                "hardware",
                "hint",
                "",
                check.reason.replace("\n", " "),
                "train where there are such units, or stay in float32 here; `halfstep doctor` "
                "shows what this machine is fast in",
            )


def failure(facts: Facts) -> Iterator[Finding]:
    """The batch did not run under the policy, and did in float32."""
    found = facts.failure
    if found is not None:
        yield Finding(
            "failure",
            "error",
            found.place,
            f"{found.error}{f' ({found.where})' if found.where else ''}",
            "make it take 16 bits, or give the module a policy of its own "
            f"(overrides={{{found.place!r}: 'float32'}}); nothing after it was looked at",
        )


def computes_low(facts: Facts) -> bool:
    """Whether any product ran in 16 bits or fewer."""
    return any(low(product.dtype) for product in facts.products)
