"""What a few training steps need of a GPU, as torch's allocator counts it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch

from .engine import train
from .trainee import Policies, Starter


def measure_on_cuda(start: Starter, policies: Policies, steps: int) -> Iterator[dict[str, Any]]:
    """Yield the allocator's peak over a few steps of each policy."""
    method = "peak of the CUDA allocator"
    for label, policy in policies.items():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(start.device)
        before = torch.cuda.memory_allocated(start.device)
        try:
            train(start.anew()(policy), start.recipe, start.seed, steps)
        except Exception as error:  # noqa: BLE001 - the run itself will say more about it
            yield {"policy": label, "error": f"{type(error).__name__}: {error}", "method": method}
            continue
        peak = torch.cuda.max_memory_allocated(start.device) - before
        yield {"policy": label, "bytes": int(peak), "method": method}
