"""The gradients of an optimizer: find them, measure them, unscale them.

Both :class:`~halfstep.torch.LossScaleOptimizer` and :class:`~halfstep.torch.GradScaler` do their
arithmetic here. Nothing in this file reads a value on the host, except `blame`, which runs when
training has already failed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ...errors import LossScaleError
from ..casting import FLOATS, LOW
from ..masters import update_of
from ..shards import part_of_gradient
from .host import is_free, number

FEW = 2**14
"""So few elements are copied together sooner than each tensor's norm is computed by itself."""

Bucket = tuple[torch.device, torch.dtype] | tuple[torch.device, torch.dtype, int]
"""Which gradients are handled together; of DTensors, also in how many parts each is cut."""


def groups_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the groups of an optimizer, read so that Dynamo takes their parameters as inputs.

    Read as ``param_groups`` they are constants of the graph that it traces (torch 2.13), and a
    ``backward()`` in the same graph does not find them: it gives them no gradients, without a word.
    """
    groups: list[dict[str, Any]] | None = vars(optimizer).get("param_groups")
    return optimizer.param_groups if groups is None else groups


class Float16ParameterError(LossScaleError, ValueError):
    """A float16 parameter under loss scaling. A ValueError too, as torch.amp raises."""


def labelled(optimizer: Optimizer) -> Iterator[tuple[Tensor, str]]:
    """Yield every parameter with the words that an error names it by."""
    for place, group in enumerate(optimizer.param_groups):
        names = group.get("param_names")
        for index, parameter in enumerate(group["params"]):
            name = f" ({names[index]!r})" if names else ""
            shape = "uninitialized" if is_lazy(parameter) else f"shape {tuple(parameter.shape)}"
            yield parameter, f"param_groups[{place}]['params'][{index}]{name}, {shape}"


def label_of(optimizer: Optimizer, parameter: Tensor) -> str:
    """Return the words that an error names ``parameter`` by."""
    return next(label for known, label in labelled(optimizer) if known is parameter)


def refuse_float16(optimizer: Optimizer) -> None:
    """Raise if a parameter is float16: an update of it would round away most of what was scaled.

    Raises:
        Float16ParameterError: with the parameter's group, position, name and shape.
    """
    for parameter, label in labelled(optimizer):
        if parameter.dtype == torch.float16 and update_of(parameter) == "plain":
            raise Float16ParameterError(_float16_message(label))


def _float16_message(label: str) -> str:
    return (
        f"Attempting to unscale FP16 gradients. {label}, is float16, and so is its gradient after "
        "unscaling: small updates are lost, which is what loss scaling is there to prevent. Keep "
        "the variables in float32 and compute in float16: use "
        'apply_policy(model, "mixed_float16") instead of model.half(). Or keep float32 masters: '
        '"master_float16", with LossScaleOptimizer.'
    )


@dataclass
class Gradients:
    """The gradients of an optimizer's parameters, as dense local tensors.

    Attributes:
        buckets: the gradients by device and dtype; a sparse one stands here with its values.
        sparse: whether there is a sparse one.
        sharded: whether there is a DTensor.
        foreign: the first parameter whose gradient has another dtype than itself.
        low: whether there is a parameter with 16 bits.
    """

    buckets: dict[Bucket, list[Tensor]] = field(default_factory=dict)
    sparse: bool = False
    sharded: bool = False
    foreign: Tensor | None = None
    low: bool = False

    def __bool__(self) -> bool:
        return bool(self.buckets)


def gather(optimizer: Optimizer, allow_float16: bool = False) -> Gradients:
    """Return the gradients that the optimizer's parameters have now.

    Uncoalesced sparse gradients are coalesced first, in ``.grad`` too: what counts is the sum of
    what stands at one index.

    Args:
        optimizer: whose parameters.
        allow_float16: whether parameters may be float16, since nothing is unscaled.

    Raises:
        Float16ParameterError: a float16 parameter that is not allowed.
    """
    found = Gradients()
    for group in groups_of(optimizer):
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is None:
                continue
            dtype = parameter.dtype
            if dtype in LOW:
                found.low = True
                if not allow_float16 and not torch.compiler.is_compiling():
                    _refuse_low(optimizer, parameter)
            usual = type(grad) is Tensor and grad.dtype is dtype and dtype in FLOATS
            if usual and grad.layout is torch.strided and grad.numel():
                found.buckets.setdefault((grad.device, dtype), []).append(grad)
            else:
                _add_unusual(found, parameter, grad)
    return found


def _refuse_low(optimizer: Optimizer, parameter: Tensor) -> None:
    if parameter.dtype == torch.float16 and update_of(parameter) == "plain":
        raise Float16ParameterError(_float16_message(label_of(optimizer, parameter)))


def _add_unusual(found: Gradients, parameter: Tensor, grad: Tensor) -> None:
    if grad.dtype != parameter.dtype and found.foreign is None and update_of(parameter) == "plain":
        found.foreign = parameter
    ways = None
    if grad.is_sparse:
        found.sparse = True
        if not grad.is_coalesced():
            grad = parameter.grad = grad.coalesce()
        grad = grad._values()
    elif hasattr(grad, "to_local"):
        found.sharded = True
        grad, ways = part_of_gradient(parameter, grad)
    if grad.is_complex():
        if grad.is_conj():
            grad = parameter.grad = grad.resolve_conj()
        grad = torch.view_as_real(grad)
    if grad.numel():
        key: Bucket = (grad.device, grad.dtype)
        if ways is not None:
            key = (*key, ways)
        found.buckets.setdefault(key, []).append(grad)


def widened(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32 if it has 16 bits, else as it is.

    >>> import torch
    >>> widened(torch.ones(2, dtype=torch.float16)).dtype
    torch.float32
    """
    return tensor.float() if tensor.dtype in LOW else tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``, without waiting where that is safe.

    A copy to the CPU must be waited for: what it copies into could be read too early.
    """
    if tensor.device == device:
        return tensor
    return tensor.to(device, non_blocking=device.type != "cpu")


def norm_of(grads: Gradients, order: float, home: torch.device) -> Tensor:
    """Return the norm of all gradients together, a 0-dim tensor on ``home``.

    It is not finite if and only if a gradient is not (or, for order 2, if the sum of squares
    overflows), so that one pass over the gradients gives the norm and the check. It has float32,
    or float64 where a gradient has that.

    Args:
        grads: what `gather` returned.
        order: 2, or ``math.inf`` for the largest absolute value.
        home: the device of the result.
    """
    norms: list[Tensor] = []
    for bucket in grads.buckets.values():
        each = _largest(bucket) if order == math.inf else _norms(bucket, order)
        norms.append(moved(torch.linalg.vector_norm(each, order), home))
    if not norms:
        return torch.zeros((), device=home)
    if len(norms) == 1:
        return norms[0]
    wide = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    together: Tensor = torch.linalg.vector_norm(torch.stack([n.to(wide) for n in norms]), order)
    return together


def norms_of(grads: Gradients) -> Iterator[tuple[Bucket, Tensor]]:
    """Yield the 2-norms of the gradients, those of each bucket as one tensor on its device."""
    for key, bucket in grads.buckets.items():
        yield key, _norms(bucket, 2.0)


def _norms(bucket: list[Tensor], order: float) -> Tensor:
    wide = torch.promote_types(bucket[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(bucket, order, dtype=wide))


def _seen_finite(grads: Gradients, scale: Tensor) -> bool:
    """Whether the host sees for free that all gradients are finite; False says nothing.

    By a sum or by 2-norms, which are not finite if a gradient is not (or is very large).
    """
    buckets = grads.buckets.values()
    if not is_free(scale) or not all(is_free(bucket[0]) for bucket in buckets):
        return False
    # divided by less than 1, what is finite may not stay so
    return number(scale) >= 1 and all(math.isfinite(_size(bucket)) for bucket in buckets)


def _size(bucket: list[Tensor]) -> float:
    """Return a number that is not finite if one of the gradients is not."""
    if sum(grad.numel() for grad in bucket) > FEW:
        return number(_norms(bucket, 2.0).amax())
    flat: Tensor = _flatten_dense_tensors(bucket)  # type: ignore[no-untyped-call]
    return number(flat.sum(dtype=torch.float32 if flat.dtype in LOW else None))


def _largest(bucket: list[Tensor]) -> Tensor:
    """Return the largest absolute value of each tensor; NaN where there is one."""
    if bucket[0].device.type != "cpu":
        return _norms(bucket, math.inf)
    # this norm is not vectorised on CPUs: 9.6 ms for a million elements, aminmax takes 0.2 ms
    extremes = [extreme for grad in bucket for extreme in torch.aminmax(grad)]
    return widened(torch.stack(extremes).abs())


def divide_(grads: Gradients, divisor: Tensor | None) -> None:
    """Divide all gradients by a 0-dim tensor, in place; None leaves them alone."""
    if divisor is None:
        return
    for key, bucket in grads.buckets.items():
        torch._foreach_div_(bucket, moved(divisor, key[0]))


@dataclass(frozen=True)
class Verdict:
    """What one look at the gradients says; all 0-dim tensors on one device.

    Attributes:
        found: 1.0 if a gradient is not finite, else 0.0, float32. Never another value: the fused
            kernels skip where it *equals* 1.
        divisor: what the gradients are to be divided by: the scale, and the clipping.
        norm: the norm of the unscaled gradients; of order 2 where clipping asked for it.

    A divisor of None leaves the gradients as they are; a norm of None was not measured.
    """

    found: Tensor
    divisor: Tensor | None
    norm: Tensor | None


def judge(grads: Gradients, scale: Tensor, max_norm: float | None, home: torch.device) -> Verdict:
    """Measure the gradients once, and say whether they are finite and what divides them.

    ::

        norm    = |gradients| / scale                      # one pass, float32
        found   = not isfinite(norm)
        clip    = min(1, max_norm / (norm + 1e-6))         # torch.nn.utils.clip_grad_norm_
        divisor = scale / clip

    Args:
        grads: what `gather` returned.
        scale: what they were scaled by, 0-dim float32.
        max_norm: the largest norm of the unscaled gradients, or None for no clipping.
        home: the device of the verdict.
    """
    if max_norm is None and _seen_finite(grads, scale):
        return Verdict(torch.zeros_like(scale), scale, None)
    order = math.inf if max_norm is None else 2.0
    norm = norm_of(grads, order, home) / scale
    found = (norm - norm).ne_(0).to(torch.float32)  # 0 if the norm is finite, else NaN: 1
    if max_norm is None:
        return Verdict(found, scale, norm)
    return Verdict(found, clipping_divisor(norm, scale, max_norm), norm)


def clipping_divisor(norm: Tensor, scale: Tensor, max_norm: float) -> Tensor:
    """Return what divides scaled gradients so that they are unscaled and clipped, in float32."""
    clip = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return (scale / clip).to(torch.float32)


def blame(optimizer: Optimizer, most: int = 5) -> str:
    """Return the parameters whose gradients are not finite now, in words. It reads the host."""
    bad = []
    for parameter, label in labelled(optimizer):
        grad = parameter.grad
        if grad is None:
            continue
        values = grad.coalesce()._values() if grad.is_sparse else grad
        if not bool(torch.isfinite(values).all()):
            bad.append(label)
    if not bad:
        return "none any more: the gradients have been cleared since"
    more = len(bad) - most
    return "; ".join(bad[:most]) + (f"; and {more} more" if more > 0 else "")
