"""Masters and compensations in a checkpoint: entries in the state of each parameter.

They stand beside what the optimizer itself keeps, so that whatever shards or renames the state of
a parameter (``torch.distributed.checkpoint``) takes them along.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ...core.policy import Policy
from ...core.policy_names import Update
from ...errors import LossScaleError
from ..masters import add_digits, adopt, kept_of, take_rest, update_of
from ..registry import policy_of_parameter, register
from .gradients import label_of

ENTRIES: dict[Update, str] = {"master": "master", "kahan": "compensation"}
"""Under which name they stand there."""

Rests = list[tuple[Tensor, str, Tensor]]


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of all groups, in the order of a state dict."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _managed(optimizer: Optimizer) -> Iterator[tuple[int, Tensor, Update]]:
    for place, parameter in enumerate(parameters_of(optimizer)):
        update = update_of(parameter)
        if update != "plain" and not is_lazy(parameter):
            yield place, parameter, update


def with_rests(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the optimizer's own state dict with what is kept of its 16-bit parameters."""
    state = dict(state_dict["state"])
    for place, parameter, update in _managed(optimizer):
        entry = {ENTRIES[update]: kept_of(parameter).rest}
        state[place] = {**state.get(place, {}), **entry}
    return {**state_dict, "state": state}


@contextmanager
def shown(optimizer: Optimizer) -> Iterator[None]:
    """Show what is kept of 16-bit parameters in the optimizer's own state, to save it by name."""
    entries = {
        parameter: {ENTRIES[update]: kept_of(parameter).rest}
        for _, parameter, update in _managed(optimizer)
    }
    before = {parameter: optimizer.state.get(parameter) for parameter in entries}
    for parameter, entry in entries.items():
        # another dict: the one that is saved must not change again
        optimizer.state[parameter] = {**(before[parameter] or {}), **entry}
    try:
        yield
    finally:
        for parameter, own in before.items():
            if own is None:
                del optimizer.state[parameter]
            else:
                optimizer.state[parameter] = own


def split(optimizer: Optimizer, state_dict: dict[str, Any]) -> tuple[dict[str, Any], Rests]:
    """Return a state dict without these entries, and them, each with its parameter.

    Raises:
        LossScaleError: one of another shape than its parameter.
    """
    groups = state_dict.get("param_groups", [])
    ids = [name for group in groups for name in group["params"]]
    own = dict(zip(ids, parameters_of(optimizer), strict=False))
    rests: Rests = []
    state = {}
    for name, values in state_dict.get("state", {}).items():
        kept = {key: values[key] for key in ENTRIES.values() if key in values}
        if name in own:
            rests += [(own[name], key, value) for key, value in kept.items()]
        rest = {key: value for key, value in values.items() if key not in kept}
        if rest or not kept:
            state[name] = rest
    for parameter, key, value in rests:
        if value.shape != parameter.shape:
            raise LossScaleError(
                f"load_state_dict: the {key} of {label_of(optimizer, parameter)}, has the shape "
                f"{tuple(value.shape)} in the state dict."
            )
    return {**state_dict, "state": state}, rests


@torch.no_grad()
def give(rests: Rests) -> None:
    """Give the parameters the digits of a checkpoint, where they fit: see `masters.add_digits`."""
    for parameter, key, value in rests:
        if ENTRIES.get(update_of(parameter)) == key:
            take_rest(parameter, value)
            continue
        value = value.to(parameter.device, torch.float32)
        exact = value if key == ENTRIES["master"] else parameter.detach().float() + value
        add_digits(parameter, exact)


Copied = list[tuple[Tensor, Policy, Tensor]]


def to_copy(optimizer: Optimizer) -> Copied:
    """Return what a copy of the optimizer, made by ``deepcopy`` or pickle, needs to know."""
    found: Copied = []
    for _, parameter, _ in _managed(optimizer):
        policy = policy_of_parameter(parameter)
        if policy is not None:
            found.append((parameter, policy, kept_of(parameter).rest))
    return found


def from_copy(copied: Iterable[tuple[Tensor, Policy, Tensor]]) -> None:
    """Write down for the parameters of a copy what `to_copy` returned for the original."""
    for parameter, policy, rest in copied:
        if policy_of_parameter(parameter) is None:
            register(parameter, policy)
        adopt(parameter, policy.update, rest)
