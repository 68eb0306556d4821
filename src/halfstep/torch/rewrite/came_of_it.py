"""What came of a rewrite: whether anything runs in 16 bits, and which modules are in no graph."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from ...errors import PolicyError, PolicyWarning
from ..layer import is_policied
from .autocast import Settings
from .painting import Painter


def check(settings: Settings, painter: Painter, warn: bool = True) -> None:
    """Say loudly what is not in 16 bits though it was asked for.

    Raises:
        PolicyError: nothing is.
    """
    missed = uncaptured(settings, painter)
    if not painter.low_operations:
        why = (
            "Dynamo captured no graph"
            if not painter.graphs
            else f"no matrix product on float32 tensors in {painter.graphs} graph(s)"
        )
        raise PolicyError(
            f"{settings.where}: nothing runs in {painter.dtype}: {why}."
            + (f" Not captured or not called: {', '.join(missed)}." if missed else "")
            + _cast_already(settings)
        )
    if missed and warn:
        recurrent = isinstance(settings.model, nn.Module) and any(
            isinstance(module, nn.RNNBase) for module in settings.model.modules()
        )
        warnings.warn(
            f"{settings.where}: Dynamo did not capture {', '.join(missed)}, or the model did not "
            "call it; what Dynamo leaves out runs in float32. halfstep.torch.apply_policy needs no "
            "capture."
            + (" torch._dynamo.config.allow_rnn = True captures RNNs." if recurrent else ""),
            PolicyWarning,
            stacklevel=2,
        )


def _cast_already(settings: Settings) -> str:
    """Who else casts, as far as can be seen; an empty string for nobody."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return " torch.autocast is on around it, and casts by itself: call it outside of that."
    if isinstance(settings.model, nn.Module) and any(map(is_policied, settings.model.modules())):
        return " halfstep.torch.apply_policy has given it a policy already: use one of the two."
    return ""


def uncaptured(settings: Settings, painter: Painter) -> list[str]:
    """Return the modules whose parameters no graph took, as ``path (Class)``."""
    if not isinstance(settings.model, nn.Module):
        return []
    missed = []
    for path, module in settings.model.named_modules():
        own = dict(module.named_parameters(path, recurse=False))
        if own and not any(
            painter.takes(tensor) or painter.paths.captured(name) for name, tensor in own.items()
        ):
            missed.append(f"{path or 'the model itself'} ({type(module).__name__})")
    return missed
