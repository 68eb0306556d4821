"""What came of a rewrite: whether anything runs in 16 bits, and which modules are in no graph."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from ...errors import PolicyError, PolicyWarning
from ..layer import is_policied
from .painting import Painter
from .settings import Settings


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
    _warn_of_requests(settings, painter)
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


def _warn_of_requests(settings: Settings, painter: Painter) -> None:
    """Say which requests changed nothing."""
    names = [name for name, each in settings.asked.items() if not painter.met.intersection(each)]
    if names and painter.met_all:
        warnings.warn(
            f"{settings.where}: no operation of the first call is called {', '.join(names)}, as "
            "allow= or deny= asked for; halfstep.torch.explain prints the names of all.",
            PolicyWarning,
            stacklevel=2,
        )
    keys = [key for key in _keys_with_weights(settings) if key not in painter.used]
    if keys:
        warnings.warn(
            f"{settings.where}: no operation of the first call belongs to {', '.join(keys)} of the "
            "PolicyMap: its modules are not called, or others compute with their weights.",
            PolicyWarning,
            stacklevel=2,
        )


def _keys_with_weights(settings: Settings) -> list[str]:
    """Return the keys of the policies that hold for modules with parameters."""
    if not isinstance(settings.model, nn.Module):
        return []
    modules = dict(settings.model.named_modules(remove_duplicate=False))
    rules = settings.policies.resolve(modules)
    return sorted(
        {
            rule.key
            for path, rule in rules.items()
            if rule.key is not None and next(modules[path].parameters(), None) is not None
        }
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
