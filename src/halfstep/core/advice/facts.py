"""What is known about a model under a policy: plain values that a door gathers, no tensors.

A *place* is a module's path; ``""`` is the model itself, :data:`LOSS` the loss function.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

LOSS = "(loss)"
"""The place of what the loss function computes itself."""


@dataclass(frozen=True)
class Product:
    """A matrix product or a convolution.

    Attributes:
        place: where it ran.
        operation: its name, for instance ``"addmm"``.
        dtype: what it ran in.
        sizes: the dimensions along which its matrices lie in memory, by what they are called.
        flops: operations of one batch, a multiplication and an addition counted as two.
        rows: how many rows of activations it multiplied; 0 if that means nothing.
    """

    place: str
    operation: str
    dtype: str
    sizes: tuple[tuple[str, int], ...]
    flops: int
    rows: int = 0


Role = Literal["added", "bound", "fill", "factor"]


@dataclass(frozen=True)
class Constant:
    """A number in the code that met a tensor.

    Attributes:
        place: where.
        operation: what it was an argument of.
        dtype: of the result, which is what the number must fit.
        value: the number.
        role: ``"added"`` to a tensor, a lower or upper ``"bound"``, put in as a ``"fill"`` (masks),
            or a ``"factor"``, which the kernels keep in float32.
        where: file and line.
        feeds: the operation that took the result next, as far as that was seen.
    """

    place: str
    operation: str
    dtype: str
    value: float
    role: Role
    where: str = ""
    feeds: str = ""


@dataclass(frozen=True)
class Reduction:
    """Many numbers became one, or a softmax over many.

    Attributes:
        place: where.
        operation: its name.
        dtype: of the result.
        count: how many became one.
        largest: the largest magnitude that went in.
        where: file and line.
    """

    place: str
    operation: str
    dtype: str
    count: int
    largest: float
    where: str = ""


@dataclass(frozen=True)
class Range:
    """How large the results of an operation were.

    Attributes:
        place: where.
        operation: its name.
        dtype: of the result.
        largest: the largest finite magnitude of the result.
        largest_in: the largest magnitude that went in.
        lost: how many results are not finite although all that went in was.
        where: file and line.
    """

    place: str
    operation: str
    dtype: str
    largest: float
    largest_in: float
    lost: int = 0
    where: str = ""


@dataclass(frozen=True)
class Result:
    """What the model returns, or the loss.

    Attributes:
        place: ``""`` or :data:`LOSS`.
        dtype: as it was returned.
        computed_in: the dtype of the operation that made it.
        name: where in the output, for instance ``"logits"``.
        operation: the operation that made it.
    """

    place: str
    dtype: str
    computed_in: str
    name: str = ""
    operation: str = ""


@dataclass(frozen=True)
class OwnCast:
    """A module casts by itself, or switches autocast off.

    Attributes:
        place: where.
        kind: the module's class.
        call: what it calls, for instance ``".float()"``.
        before: the dtype before.
        after: the dtype after.
        where: file and line.
        times: how often in one batch.
        size: bytes written in one batch.
        flops: of the matrix products that ran in float32 in this module because of it.
    """

    place: str
    kind: str
    call: str
    before: str
    after: str
    where: str = ""
    times: int = 1
    size: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Weights:
    """Weights of one layer whose dtype is not float32, before or after the policy.

    Attributes:
        place: the layer.
        names: the parameters.
        dtype: what they were stored in before the policy came.
        variable_dtype: what the policy stores them in.
    """

    place: str
    names: tuple[str, ...]
    dtype: str
    variable_dtype: str


@dataclass(frozen=True)
class Memory:
    """Bytes that one training step needs, in float32 and under the policy.

    Attributes:
        kept_before: what the forward pass keeps for the backward pass in float32.
        kept_after: the same under the policy.
        fixed: what does not grow with the batch: weights, gradients.
    """

    kept_before: int
    kept_after: int
    fixed: int


@dataclass(frozen=True)
class Hardware:
    """Whether the policy is fast here.

    Attributes:
        policy: the policy's name.
        ok: whether it is.
        reason: in words.
    """

    policy: str
    ok: bool
    reason: str


@dataclass(frozen=True)
class Failure:
    """The batch did not run.

    Attributes:
        place: the innermost module.
        error: type and message.
        where: file and line.
    """

    place: str
    error: str
    where: str = ""


@dataclass(frozen=True)
class Facts:
    """All that the rules read.

    Attributes:
        policy: the name of the policy, for instance ``"mixed_float16"``.
        global_policy: the global policy's name where it was set and the model does not follow it.
        tensor_cores: whether there is a device here whose matrix units want aligned sizes.
    """

    policy: str
    products: tuple[Product, ...] = ()
    constants: tuple[Constant, ...] = ()
    reductions: tuple[Reduction, ...] = ()
    ranges: tuple[Range, ...] = ()
    results: tuple[Result, ...] = ()
    casts: tuple[OwnCast, ...] = ()
    weights: tuple[Weights, ...] = ()
    hardware: tuple[Hardware, ...] = ()
    memory: Memory | None = None
    failure: Failure | None = None
    global_policy: str | None = None
    tensor_cores: bool = False
    total_flops: int = field(default=0)

    @property
    def flops(self) -> int:
        """Operations of all matrix products of the batch."""
        return self.total_flops or sum(product.flops for product in self.products)


LOW = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def low(dtype: str) -> bool:
    """Whether the dtype has 16 bits or fewer."""
    return dtype in LOW


def distinct(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names without repeats, in order."""
    return tuple(dict.fromkeys(names))
