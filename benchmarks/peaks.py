"""How fast the matrix units of a device can be at most, in 16 bits."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

from .measures import synchronize

DATA_SHEETS: tuple[tuple[str, float], ...] = (
    (r"H200|H100.*(SXM|HBM3)|GH200", 989e12),
    (r"H100.*PCIe", 756e12),
    (r"H100.*NVL", 835e12),
    (r"H100", 989e12),
    (r"B200", 2250e12),
    (r"A100|A800", 312e12),
    (r"A40\b", 149.7e12),
    (r"A10\b|A10G", 125e12),
    (r"A30\b", 165e12),
    (r"L40S", 362e12),
    (r"L4\b", 121e12),
    (r"V100", 125e12),
    (r"T4\b", 65e12),
    (r"RTX 4090", 165.2e12),
    (r"RTX 3090", 71e12),
    (r"MI300X", 1307e12),
)
"""Dense products in float16 with float32 accumulation, from the makers' data sheets."""


@dataclass(frozen=True)
class Peak:
    """Operations a second, and where the number is from."""

    flops: float
    source: str


def peak_flops(name: str, device: str, tiny: bool) -> Peak:
    """Return the peak of a device: its data sheet's, or what one product reaches here."""
    for pattern, flops in DATA_SHEETS:
        if device != "cpu" and re.search(pattern, name):
            return Peak(flops, "the maker's data sheet, dense float16")
    return _measured(device, 256 if tiny or device == "cpu" else 8192)


def _measured(device: str, size: int) -> Peak:
    dtype = torch.float32 if device == "cpu" else torch.float16
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        synchronize(device)
        begin = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    word = str(dtype).removeprefix("torch.")
    return Peak(2 * size**3 / best, f"measured: a {size} x {size} product in {word}")
