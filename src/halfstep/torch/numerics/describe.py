"""The events that describe a run rather than its numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import halfstep

from ...core.loss_scale import LossScale
from ...core.numerics.record import COUNTED_FORMATS, MOST_NAMES, VERSION
from ..plan import plan_of
from .targets import plain_path


def header(model: nn.Module, every: int, rule: LossScale | None) -> dict[str, Any]:
    """Return what the first line says besides the format of the record."""
    plan = plan_of(model)
    first = next(iter(model.parameters()), None)
    return {
        "numerics": VERSION,
        "library": f"torch {torch.__version__}",
        "halfstep": halfstep.__version__,
        "device": "cpu" if first is None else str(first.device),
        "model": type(model).__name__,
        "every": every,
        "policy": None if plan is None else plan.policy.name,
        "loss_scale": None if rule is None else rule.get_config(),
        "formats": list(COUNTED_FORMATS),
        "layers": [_layer(plain_path(path), module) for path, module in model.named_modules()],
    }


def _layer(path: str, module: nn.Module) -> dict[str, Any]:
    plan = plan_of(module)
    return {
        "path": path,
        "class": type(module).__name__,
        "policy": None if plan is None else plan.policy.name,
        "compute_dtype": None if plan is None else _name(plan.compute),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor_event(
    identity: int, key: tuple[str, str, str], title: str, tensor: Tensor
) -> dict[str, Any]:
    """Return the event that gives a tensor its id; ``key`` is kind, path and name."""
    kind, path, name = key
    return {
        "event": "tensor", "id": identity, "kind": kind, "path": path, "name": name,
        "class": title, "dtype": _name(tensor.dtype), "shape": list(tensor.shape),
    }  # fmt: skip


def not_finite_event(step: int, loss: float | None, bad: list[str], of: int) -> dict[str, Any]:
    """Return the event of a recorded step without a loss scale that was not finite."""
    return {
        "event": "not_finite", "step": step, "loss": loss, "parameters": bad[:MOST_NAMES],
        "not_finite": len(bad), "of": of,
    }  # fmt: skip
