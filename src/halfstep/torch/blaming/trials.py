"""Proof by replay: the same step of a copy of the model, with a few layers in float32."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.policy import Policy, PolicyMap
from ...errors import HalfstepError
from ..apply import apply_policy, policy_of, remove_policy
from ..casting import LOW, Cast, cast_call, cast_nested
from ..plan import plan_of
from .places import clean_path
from .replay import Step, replay, unwrapped
from .trace import Finding, find

MOST_LAYERS = 3
_MOST_TRIALS = 8


@dataclass(frozen=True)
class Cured:
    """What helped.

    Attributes:
        layers: the modules to run in float32; empty for all of the model.
        how: what was changed: ``"layers"``, ``"output"``, ``"bfloat16"`` or ``"float32"``.
    """

    layers: tuple[str, ...]
    how: str


class TrialFailed(Exception):
    """A trial could not be run, and says nothing; it never leaves this package."""


def in_float32(step: Step) -> Finding | None:
    """Return what still breaks a step with all of the model in float32, None if nothing does.

    Raises:
        TrialFailed: the model cannot be copied, or does not run like this.
    """
    return _outcome(step, everywhere)


def search(step: Step, finding: Finding) -> Cured:
    """Return the smallest change of precision that makes the whole step finite.

    ::

        repeat, at most 8 times and for at most 3 layers, from the module that is to blame:
            replay with layers in float32; finite: done
            a fault in a layer that is in float32 already: take the module around it instead
            a fault elsewhere: add that layer
        nothing found: bfloat16, then float32, for all of the model

    Args:
        step: one that is finite with all of the model in float32 (`in_float32`).
        finding: what breaks it.
    """
    if finding.fault.path == "" and _helps(step, float32_output):
        return Cured((), "output")
    layers = _layers(step, finding.fault.path)
    if layers:
        return Cured(tuple(layers), "layers")
    return Cured((), "bfloat16" if _helps(step, bfloat16) else "float32")


def _layers(step: Step, path: str) -> list[str]:
    layers = [path]
    for _ in range(_MOST_TRIALS):
        if "" in layers or len(layers) > MOST_LAYERS:
            return []
        try:
            found = _outcome(step, functools.partial(float32_in, paths=tuple(layers)))
        except TrialFailed:
            found = None
            layers = [_around(layers[-1]) if each == layers[-1] else each for each in layers]
            continue
        if found is None:
            return layers
        layers = _grown(layers, found.fault.path)
    return []


def _grown(layers: list[str], path: str) -> list[str]:
    """Return the layers with one more, or with the one that did not help made wider."""
    inside = next((each for each in layers if path == each or path.startswith(each + ".")), None)
    if inside is None:
        kept = [each for each in layers if not each.startswith(path + ".")]
        return [*kept, path]
    wider = _around(inside)
    return [*[each for each in layers if each != inside and not each.startswith(wider)], wider]


def _around(path: str) -> str:
    return path.rpartition(".")[0]


def _helps(step: Step, change: Any) -> bool:
    try:
        return _outcome(step, change) is None
    except TrialFailed:
        return False


def _outcome(step: Step, change: Any) -> Finding | None:
    """Replay the step with a copy of the model, changed.

    Raises:
        TrialFailed: the model cannot be copied, or does not run when changed like this.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _eager(copy.deepcopy(step.model))
            return find(replay(step.of(change(model))))
    except (RuntimeError, TypeError, ValueError, AttributeError, HalfstepError) as error:
        raise TrialFailed from error


# ---------------------------------------------------------------------- changes to a model


def _eager(model: nn.Module) -> nn.Module:
    """Take ``torch.compile``'s wrappers off the modules inside: no policy reaches into them."""
    for path, module in list(model.named_modules()):
        inside = unwrapped(module)
        if path and inside is not module:
            model.set_submodule(clean_path(path), inside)
    return model


def everywhere(model: nn.Module) -> nn.Module:
    """Return ``model`` in float32 throughout."""
    remove_policy(model)
    return _wrapped(model, "", cast_back=False)


def float32_in(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """Return ``model`` with the modules at ``paths`` in float32."""
    if plan_of(model) is not None:
        policies = _policies(model, dict.fromkeys(paths, "float32"))
        return _applied(model, policies)
    low = any(parameter.dtype in LOW for parameter in model.parameters())
    for path in paths:
        _wrapped(_submodule(model, path), path, cast_back=low)
    return model


def float32_output(model: nn.Module) -> nn.Module:
    """Return ``model`` with what it gives cast to float32."""
    if plan_of(model) is not None:
        return _applied(model, _policies(model, {}), output_dtype="float32")
    model.register_forward_hook(lambda module, args, out: cast_nested(out, Cast(torch.float32)))
    return model


def bfloat16(model: nn.Module) -> nn.Module:
    """Return ``model`` with bfloat16 wherever its policy says float16.

    Raises:
        TrialFailed: it has no policy.
    """
    if plan_of(model) is None:
        raise TrialFailed
    return _applied(model, _policies(model, {}, instead={"float16": "bfloat16"}))


def _policies(
    model: nn.Module, overrides: dict[str, str], instead: dict[str, str] | None = None
) -> PolicyMap:
    """Return what the model's modules follow now, with overrides, as one map."""

    def named(policy: Policy) -> str:
        name = policy.name
        for old, new in (instead or {}).items():
            name = name.replace(old, new)
        return name

    own: dict[str, str] = {}
    for path, module in model.named_modules():
        covered = any(path == each or path.startswith(each + ".") for each in overrides)
        policy = policy_of(module)
        if path and policy is not None and not covered:
            own[path] = named(policy)
    root = policy_of(model)
    default = "float32" if root is None else named(root)
    around = {path: own.get(_around(path), default) for path in own}
    changed = {path: name for path, name in own.items() if name != around[path]}
    return PolicyMap(default, changed | overrides)


def _applied(model: nn.Module, policies: PolicyMap, output_dtype: str | None = None) -> nn.Module:
    plan = plan_of(model)
    if plan is None:
        raise TrialFailed
    functional: Any = plan.functional
    wanted = output_dtype or plan.output_dtype
    apply_policy(
        model, policies, output_dtype=wanted, functional=functional,
        cast_forward_inputs=plan.cast_forward_inputs,
    )  # fmt: skip
    return model


def _submodule(model: nn.Module, path: str) -> nn.Module:
    for name, module in model.named_modules():
        if clean_path(name) == path:
            found: nn.Module = module
            return found
    raise TrialFailed


def _wrapped(module: nn.Module, path: str, *, cast_back: bool) -> nn.Module:
    """Let a module compute in float32, whatever autocast says around it."""
    remove_policy(module)
    before = next((p.dtype for p in module.parameters() if p.dtype in LOW), None)
    forward, device = module.forward, _device(module)
    module.float()

    @functools.wraps(forward)
    def in_float32(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = cast_call(args, kwargs, Cast(torch.float32))
        with torch.autocast(device, enabled=False):
            result = forward(*args, **kwargs)
        return cast_nested(result, Cast(before)) if cast_back and before else result

    module.__dict__["forward"] = in_float32
    return module


def _device(module: nn.Module) -> str:
    return next((parameter.device.type for parameter in module.parameters()), "cpu")
