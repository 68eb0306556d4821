"""Counting the numbers of a tensor where it lies, exactly and without waiting for the device.

The bins are those of :mod:`halfstep.core.numerics.rows`. A float32 number finds its bin by integer
arithmetic on its bits, with ``n`` the bits without the sign (a subnormal is normalised first)::

    exponent        n >> 23
    leading ones    the exponent of float(2**23 - mantissa), which is exact
    above 13/16     (n - 0x680001) >> 23, one less than n >> 23 where the mantissa is not

A number of 16 bits needs none of it: its patterns are counted, all 32,768 of them, and each pattern
knows its bin.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.numerics.bins import PARTS, keys_of
from ...core.numerics.rows import (
    BINS,
    EXPONENT_POSITIONS,
    FIRST_KEY,
    FORMAT_POSITIONS,
)

_PATTERNS = 2**15  # of 16 bits, without the sign
_ROWS = 278  # of 277 exponents, and of infinities and NaNs together
_RAW = 1 + _ROWS * PARTS
_INFINITY = BINS - 2
_SUBNORMAL_ROW = 22  # where subnormals fall together that were not normalised
# elements at a time: what a CPU's second cache holds, and a bound on memory elsewhere
_CHUNKS = {"cpu": 2**18}
_CHUNK = 2**23

WHOLE = (torch.float16, torch.bfloat16)
"""Dtypes whose patterns are counted."""


def bins_of(tensor: Tensor) -> Tensor:
    """Return how many numbers of ``tensor`` lie in each bin: int64, shape ``(BINS,)``.

    float64 is rounded to float32 first; of a complex tensor both parts count. Nothing waits for
    the device.

    >>> bins = bins_of(torch.tensor([0.0, -0.0, 1.0, float("nan")]))
    >>> int(bins[0]), int(bins[-1]), int(bins.sum())
    (2, 1, 4)
    """
    with torch.no_grad():
        flat = _flat(tensor)
        if flat.dtype in WHOLE:
            return _bins_of_patterns(flat)
        first, *rest = _chunks(flat)
        raw = _raw_bins(first)
        for chunk in rest:
            raw += _raw_bins(chunk)
        return _ordered(raw)


def _chunks(flat: Tensor) -> tuple[Tensor, ...]:
    return torch.split(flat, _CHUNKS.get(flat.device.type, _CHUNK))


def _flat(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.dtype not in WHOLE:
        tensor = tensor.to(torch.float32)
    return tensor.reshape(-1).contiguous()


# ---------------------------------------------------------------------- 16 bits


def _bins_of_patterns(flat: Tensor) -> Tensor:
    first, *rest = _chunks(flat.view(torch.int16))
    counts = _counts(first.bitwise_and(0x7FFF), _PATTERNS)
    for chunk in rest:
        counts += _counts(chunk.bitwise_and(0x7FFF), _PATTERNS)
    bins = torch.zeros(BINS, dtype=torch.int64, device=flat.device)
    return bins.index_add_(0, _bin_of_pattern(flat.dtype, flat.device), counts)


@cache
def _bin_of_pattern(dtype: torch.dtype, device: torch.device) -> Tensor:
    values = torch.arange(_PATTERNS, dtype=torch.int16).view(dtype).double().numpy()
    bins = np.zeros(_PATTERNS, dtype=np.int64)
    counted = np.isfinite(values) & (values != 0)
    bins[counted] = keys_of(values[counted]) - FIRST_KEY + 1
    bins[np.isinf(values)] = _INFINITY
    bins[np.isnan(values)] = _INFINITY + 1
    return torch.from_numpy(bins).to(device)


# ---------------------------------------------------------------------- 32 bits


def _raw_bins(chunk: Tensor) -> Tensor:
    if chunk.device.type != "cpu":
        return _counts(_raw_index(chunk, normalise=True), _RAW)
    # a quarter of the time on a CPU goes into normalising, and there are seldom any subnormals
    counts = _counts(_raw_index(chunk, normalise=False), _RAW)
    first = 1 + _SUBNORMAL_ROW * PARTS
    if bool(counts[first : first + PARTS - 1].any()):
        return _counts(_raw_index(chunk, normalise=True), _RAW)
    counts[0], counts[first + PARTS - 1] = counts[first + PARTS - 1].clone(), 0
    return counts


def _raw_index(chunk: Tensor, normalise: bool) -> Tensor:
    """Return the bin of each number, in an order within an exponent that is cheap to compute.

    Part 31 is a mantissa of zero, parts 24 to 0 are the others from small to large.
    """
    n = chunk.view(torch.int32).bitwise_and(0x7FFFFFFF)
    if normalise:
        # int32 to float32 is exact below 2**24, and a subnormal is its bits times 2**-149
        moved = n.float().view(torch.int32).sub_(149 << 23).sub_(n)
        n += moved.bitwise_and_((n - 0x800000).bitwise_right_shift_(31))
    # 8 * (2**23 - mantissa), 0 for a mantissa of 0: its exponent, rounded up, modulo 32
    part = n.mul(-8).bitwise_and_(0x3FFFFF8).float().view(torch.int32)
    part = part.sub_(1).bitwise_right_shift_(23).bitwise_and_(31)
    part -= n.sub(0x680001).bitwise_right_shift_(23)
    part.add_(n.bitwise_right_shift_(23), alpha=PARTS + 1)
    return part.add_(_SUBNORMAL_ROW * PARTS).clamp_(min=0)


def _ordered(raw: Tensor) -> Tensor:
    last = 1 + (_ROWS - 1) * PARTS
    infinity = raw[last + PARTS - 1].reshape(1)
    nan = raw[last : last + PARTS - 1].sum().reshape(1)
    return torch.cat([raw[_order(raw.device)], infinity, nan])


@cache
def _order(device: torch.device) -> Tensor:
    parts = np.array([31, *range(24, -1, -1), *range(25, 31)])
    rows = 1 + PARTS * np.arange(_ROWS - 1)
    order = np.concatenate([[0], (rows[:, None] + parts).ravel()])
    return torch.from_numpy(order).to(device)


def _counts(index: Tensor, size: int) -> Tensor:
    """Count each index below ``size``; ``torch.bincount`` waits for the device on accelerators."""
    kind = index.device.type
    if kind == "cpu":
        return torch.bincount(index, minlength=size)
    if kind == "cuda":
        return torch.histc(index.int(), bins=size, min=0, max=size).long()
    ones = torch.ones((), dtype=torch.int64, device=index.device).expand(index.shape)
    zeros = torch.zeros(size, dtype=torch.int64, device=index.device)
    return zeros.scatter_add_(0, index.long(), ones)


# ---------------------------------------------------------------------- digests


def digest_of(bins: Tensor, scale: Tensor | None = None, divided: bool = False) -> Tensor:
    """Return what a row of the record needs of the bins: int64, shape ``(DIGEST,)``.

    The formats are asked twice: for the numbers as they are, and for them without the scale.

    Args:
        bins: what :func:`bins_of` returned.
        scale: what the numbers were multiplied by, 0-dim, a power of two; None is 1.
        divided: whether they have been divided by it: then the second answer is with the scale.
    """
    below = torch.zeros(BINS + 1, dtype=torch.int64, device=bins.device)
    torch.cumsum(bins, 0, out=below[1:])
    fixed = _positions(bins.device)
    if scale is None:
        return below[fixed]
    borders = len(FORMAT_POSITIONS)
    shift = exponent_of_scale(scale).to(bins.device, non_blocking=bins.device.type != "cpu")
    step = -PARTS if divided else PARTS
    moved = (fixed[-borders:] + step * shift).clamp_(1, _INFINITY)
    return below[torch.cat([fixed[:-borders], moved])]


def exponent_of_scale(scale: Tensor) -> Tensor:
    """Return the exponent of a 0-dim scale that is a power of two, int64, on its device."""
    bits: Tensor = scale.float().reshape(1).view(torch.int32)[0]
    return (bits.bitwise_right_shift(23) - 127).long()


@cache
def _positions(device: torch.device) -> Tensor:
    places = np.concatenate([EXPONENT_POSITIONS, FORMAT_POSITIONS, FORMAT_POSITIONS])
    return torch.from_numpy(places).to(device)


def plain_tensor(value: Any) -> Tensor | None:
    """Return the numbers of a tensor that can be counted here, or None.

    Of a DTensor that is its local part, of a sparse tensor its values. None for integers, for
    what is empty, and for tensors without storage of their own (meta, ``torch.func``).
    """
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return None
    tensor = value.detach()
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_nested:
        tensor = tensor.values()
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return None if tensor.is_meta or wrapped or not tensor.numel() else tensor
