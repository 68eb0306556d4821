"""``audit``: gather facts about a model under a policy with one batch, and let the rules speak."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.accelerators import TENSOR_CORES
from ...core.advice import (
    LOSS,
    Facts,
    Failure,
    Hardware,
    Memory,
    Report,
    Result,
    Weights,
    advise,
    check_rules,
)
from ...core.compatibility import judge
from ...core.device import Device
from ...core.global_policy import global_policy
from ...core.hardware import devices
from ...core.policy import Policy, PolicyMap
from ...errors import PolicyError, PolicyWarning
from ..apply import apply_policy, remove_policy
from ..blaming.places import Places
from ..casting import LOW
from ..eager import eagerly
from ..plan import LayerPlan, plan_of
from ..planning import Functional
from .casts import CastWatch
from .operations import dtype_name
from .shadow import copied, random_numbers_kept, shadow
from .watch import KeptBytes, Watch, made_by, path_of

LossFn = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class _Run:
    """One forward pass under the instruments."""

    watch: Watch
    casts: CastWatch
    kept: int
    results: tuple[Result, ...]
    failure: Failure | None


def audit(
    model: nn.Module,
    policy: Policy | PolicyMap | str | None,
    batch: Any,
    loss_fn: LossFn | None = None,
    *,
    overrides: Mapping[str, Policy | str] | None = None,
    silence: Iterable[str] = (),
    output_dtype: str | None = "float32",
    functional: Functional = "autocast",
    cast_forward_inputs: bool | None = None,
) -> Report:
    """Say what could go wrong with a model under a policy, or be better, from one batch.

    A copy of the model runs the batch forward twice, in float32 and under the policy; what its
    operations are, in which dtype, on which constants and how large, goes to the rules of
    :mod:`halfstep.core.advice`. The model, its policy, its buffers and gradients, the batch and
    every random generator are as they were afterwards. (The copy shares the memory of the weights:
    a forward that writes into a weight writes into the model's.)

    Args:
        model: any ``nn.Module``, with a policy or without.
        policy: the policy to look at. ``None``: the one that the model has, else the global one.
        batch: one batch, on the model's device.
        loss_fn: called as ``loss_fn(model, batch)``, it returns the loss. Left out, the model is
            called with the batch: a dict gives keyword arguments, a tuple or list positional ones.
        overrides: policies by path, as for :func:`apply_policy`.
        silence: names of rules that shall say nothing.
        output_dtype: as for :func:`apply_policy`; of a model that has its policy, its own.
        functional: as for :func:`apply_policy`; of a model that has its policy, its own.
        cast_forward_inputs: as for :func:`apply_policy`; of a model that has its policy, its own.

    Raises:
        AdviceError: a rule to silence that there is not.
        PolicyError: a policy that does not fit the model.
        Exception: what the model or the loss raises, with the policy and without.

    >>> class Norm(nn.Module):
    ...     def forward(self, x):
    ...         return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8)
    >>> model = nn.Sequential(nn.Linear(8, 16), Norm())
    >>> report = audit(model, "mixed_float16", torch.randn(4, 8), silence=["hardware"])
    >>> [(found.rule, found.severity, found.place) for found in report]
    [('epsilon', 'error', '1')]
    """
    check_rules(silence)
    if not isinstance(model, nn.Module):
        raise PolicyError(f"audit: the model must be an nn.Module, not {type(model)}.")
    # a compiled model is looked at as what was compiled, which shares everything with it
    model = getattr(model, "_orig_mod", model)
    loss_fn = loss_fn or _call
    plain, low = remove_policy(shadow(model)), shadow(model)
    has = plan_of(model)
    asked = policy
    if policy is None and has is None:
        policy = global_policy()
    if policy is not None:
        # weights are looked at as the model has them now
        with warnings.catch_warnings():
            # that float32 changes nothing is no news in an audit
            warnings.simplefilter("ignore", PolicyWarning)
            low = apply_policy(
                shadow(plain), policy, overrides, output_dtype=output_dtype,
                functional=functional, cast_forward_inputs=cast_forward_inputs,
            )  # fmt: skip
    with random_numbers_kept(model):
        run = _run(low, batch, loss_fn)
    with random_numbers_kept(model):
        base = _kept_without(plain, batch, loss_fn, run.failure)
    facts = _facts(model, low, run, base, late=asked is None and has is None)
    return advise(facts, silence)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _kept_without(
    model: nn.Module, batch: Any, loss_fn: LossFn, failed: Failure | None
) -> int | None:
    """What the model without a policy keeps for the backward pass, in bytes.

    None where it does not run without, as one that calls ``.half()`` does not. If it stopped there
    with the policy too, the model or the batch is at fault, and what it raised is raised.
    """
    kept = KeptBytes(model)
    try:
        with kept.hooks(), torch.enable_grad(), eagerly():
            loss_fn(model, copied(batch))
    except Exception as error:
        if failed is not None and failed.error == _in_a_line(error):
            raise
        return None
    return kept.total(set())


def _run(model: nn.Module, batch: Any, loss_fn: LossFn) -> _Run:
    places = Places(model)
    watch, casts, kept = Watch(places), CastWatch(model, places), KeptBytes(model)
    outputs: list[Any] = []
    failure = None
    with ExitStack() as stack:
        stack.callback(
            model.register_forward_hook(lambda module, args, output: outputs.append(output)).remove
        )
        stack.enter_context(eagerly())
        stack.enter_context(torch.enable_grad())
        for context in (kept.hooks(), places.followed(), casts, watch):
            stack.enter_context(context)
        try:
            loss = loss_fn(model, copied(batch))
        except Exception as error:  # noqa: BLE001 - the batch ran in float32: that it does not now is the finding
            loss = None
            failure = Failure(path_of(watch.last), _in_a_line(error), watch.last.source)
    results = tuple(_results("", outputs[-1:])) if outputs else ()
    if loss_fn is not _call:
        results += tuple(_results(LOSS, loss))
    return _Run(watch, casts, kept.total(watch.weight_copies), results, failure)


def _in_a_line(error: Exception) -> str:
    first, _, _ = str(error).partition("\n")
    return f"{type(error).__name__}: {first}"


def _results(place: str, value: Any, name: str = "") -> Iterable[Result]:
    """Yield what is known of every floating tensor in an output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            made = made_by(value)
            yield Result(
                place,
                dtype_name(value),
                made.dtype if made else dtype_name(value),
                name,
                made.operation if made else "",
            )
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _results(place, item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            several = len(value) > 1
            yield from _results(place, item, f"{name}[{index}]" if several else name)


def _facts(model: nn.Module, low: nn.Module, run: _Run, base: int | None, late: bool) -> Facts:
    plans = {path: plan for path, m in low.named_modules() if (plan := plan_of(m)) is not None}
    policies = dict.fromkeys(plan.policy for plan in plans.values() if plan.policy.is_low)
    machine = devices()
    float32_flops: dict[str, int] = {}
    for product in run.watch.products():
        plan = plans.get(product.place)
        if product.dtype == "float32" and plan is not None and plan.policy.is_low:
            at = product.place
            float32_flops[at] = float32_flops.get(at, 0) + product.flops
    names = list(dict.fromkeys(policy.name for policy in policies)) or ["float32"]
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Facts(
        policy=" and ".join(names),
        products=run.watch.products(),
        constants=run.watch.constants(),
        reductions=run.watch.reductions(),
        ranges=run.watch.ranges(),
        results=run.results,
        casts=run.casts.found(float32_flops),
        weights=tuple(_weights(plans)),
        hardware=tuple(_hardware(policies, machine)),
        memory=None if base is None or run.failure else Memory(base, run.kept, weights + gradients),
        failure=run.failure,
        global_policy=names[0] if late and policies else None,
        tensor_cores=any(_has_tensor_cores(device) for device in machine),
    )


def _weights(plans: Mapping[str, LayerPlan]) -> Iterable[Weights]:
    narrow = [(path, plan) for path, plan in plans.items() if plan.stored]
    pure = [item for item in narrow if item[1].policy.variable_dtype in ("float16", "bfloat16")]
    if pure:
        count = sum(len(plan.stored) for _, plan in pure)
        variable = pure[0][1].policy.variable_dtype
        yield Weights("", (f"{count} parameters",), "float32", variable)
    for path, plan in narrow:
        names = tuple(name for name, dtype in plan.stored if dtype in LOW)
        if names and (path, plan) not in pure:
            before = str(next(dtype for _, dtype in plan.stored if dtype in LOW))
            yield Weights(path, names, before.removeprefix("torch."), plan.policy.variable_dtype)


def _hardware(policies: Iterable[Policy], machine: tuple[Device, ...]) -> Iterable[Hardware]:
    for name in dict.fromkeys(policy.name for policy in policies):
        verdict = judge(name, machine)
        yield Hardware(name, verdict.ok, verdict.reason)


def _has_tensor_cores(device: Device) -> bool:
    return (
        device.usable
        and device.capability is not None
        and (device.capability >= min(TENSOR_CORES.values()))
    )
