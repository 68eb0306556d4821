"""What a policy means for every module of a model, decided before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from ..core.policy import Policy, PolicyMap, Resolved
from ..errors import PolicyError
from .casting import FLOATS, LOW, Cast, FiniteCast, Float32OnCpu, LowCast, dtype_named
from .plan import LayerPlan, plan_of
from .region import Region
from .rules import (
    FLOAT32_WHOLE,
    HOLDER,
    LAYER,
    LEFT_ALONE,
    PARAMETRIZATION,
    PLAIN,
    SEALED,
    TRANSPARENT,
    Rule,
    left_alone,
    rule_for,
    rule_for_parametrization,
)

NEVER_ATTACHED = frozenset(rule.name for rule in (HOLDER, PARAMETRIZATION, SEALED, TRANSPARENT))
"""Rules whose modules keep their own class."""

Functional = Literal["autocast", "compute"]


@dataclass(frozen=True)
class Options:
    """The arguments of ``apply_policy`` that are the same for every module."""

    functional: Functional
    output_dtype: str | None
    part: bool
    cast_forward_inputs: bool | None = None


@dataclass(frozen=True)
class _How:
    """The part of a plan that a rule decides."""

    why: str
    inputs: Cast | None = None
    region: Region | None = None
    reads: tuple[str, ...] = ()
    result: Cast | None = None


def plan_model(
    model: nn.Module, policies: PolicyMap, options: Options
) -> dict[nn.Module, LayerPlan]:
    """Return the plan of every module of ``model``.

    Raises:
        PolicyError: a key that matches nothing, two that disagree, or a module in two places that
            was given two policies.
    """
    # every path of every module: one that lies in two places has two
    paths = dict(model.named_modules(remove_duplicate=False))
    resolved = _keep_losses(policies.resolve(paths), paths)
    parametrizations = _parametrizations(paths.values())
    plans: dict[nn.Module, LayerPlan] = {}
    for path, module in paths.items():
        if module in plans:
            _check_same(plans[module], path, resolved[path])
            continue
        parent = resolved[path.rpartition(".")[0]].policy
        rule = rule_for(module, _tensors(module))
        if module in parametrizations:
            rule = parametrizations[module]
        elif (
            path and rule is PLAIN and _runs_as_its_parent(module, resolved[path], parent, options)
        ):
            rule = TRANSPARENT
        plans[module] = _plan_module(module, path, resolved[path], parent, rule, options)
    return plans


def _parametrizations(modules: Iterable[nn.Module]) -> dict[nn.Module, Rule]:
    rules: dict[nn.Module, Rule] = {}
    for module in modules:
        # what lies in another one's follows that: the one feeds the other
        if isinstance(module, ParametrizationList) and module not in rules:
            rules.update(dict.fromkeys(module.modules(), rule_for_parametrization(module)))
    return rules


def _runs_as_its_parent(
    module: nn.Module, resolved: Resolved, parent: Policy, options: Options
) -> bool:
    """Whether this is an activation, a pooling or the like, with nothing to do for a policy.

    Such modules are many and small, and a forward of ours around each would cost the host time.
    """
    ours_to_skip = type(module).__module__.startswith("torch.nn.") and not module._modules
    same = resolved.policy.is_low and resolved.policy.compute_dtype == parent.compute_dtype
    return ours_to_skip and same and options.functional == "autocast"


def _keep_losses(
    resolved: dict[str, Resolved], paths: Mapping[str, nn.Module]
) -> dict[str, Resolved]:
    """Give the losses that own layers, and those layers, float32 where no override names them."""
    for loss in [path for path, module in paths.items() if isinstance(module, FLOAT32_WHOLE)]:
        for path in paths:
            if _lies_in(path, loss) and not (
                resolved[path].key is not None and _lies_in(resolved[path].at, loss)
            ):
                resolved[path] = Resolved(Policy("float32"), None, "", "part of a loss")
    return resolved


def _lies_in(path: str, above: str) -> bool:
    return not above or path == above or path.startswith(above + ".")


def _check_same(plan: LayerPlan, path: str, resolved: Resolved) -> None:
    if plan.policy != resolved.policy:
        raise PolicyError(
            f"apply_policy: {plan.path!r} and {path!r} are the same module and were given two "
            f"policies, {plan.policy} and {resolved.policy}."
        )


def _plan_module(
    module: nn.Module,
    path: str,
    resolved: Resolved,
    parent: Policy,
    rule: Rule,
    options: Options,
) -> LayerPlan:
    policy, alone = resolved.policy, left_alone(module)
    rule = _for_variables(rule, policy)
    if rule.name in NEVER_ATTACHED:
        how = _How(_words(rule, policy, options.functional))
    elif alone is not None:  # what its neighbours give in 16 bits reaches it in float32
        rule = Rule(LEFT_ALONE, f"left alone: {alone}")
        how = _How(rule.why, LowCast(torch.float32), Region(None))
    else:
        how = _how(module, policy, rule, options.functional)
        if not path:
            how = _with_inputs(how, policy, rule, options.cast_forward_inputs)
        if how.region is None and (not path or policy.compute_dtype != parent.compute_dtype):
            # autocast of another dtype around it would cast its own 16-bit tensors again
            how = replace(how, region=Region(None))
    return LayerPlan(
        policy=policy,
        path=path,
        why=f"{resolved.why}; {how.why}{_words_of_normed(module, policy)}",
        rule=rule.name,
        compute=dtype_named(policy.compute_dtype),
        inputs=how.inputs,
        reads=how.reads,
        reads_where=rule.weights,
        covers=rule.covers,
        region=how.region,
        result=_result(how, path, policy, parent, options.output_dtype),  # moot if never attached
        stored=() if alone is not None else _to_store(module, policy, rule),
        functional=options.functional,
        output_dtype=options.output_dtype,
        part=options.part,
        cast_forward_inputs=options.cast_forward_inputs,
    )


def _for_variables(rule: Rule, policy: Policy) -> Rule:
    """A float32 input fits a float32 weight: 16-bit variables are met in 16 bits everywhere."""
    if dtype_named(policy.variable_dtype) not in LOW:
        return rule
    if rule.inputs == "float32 on cpu":
        return replace(rule, inputs="cast", weights="low")
    return replace(rule, inputs="cast") if rule.weights == "rows" else rule


def _with_inputs(how: _How, policy: Policy, rule: Rule, cast: bool | None) -> _How:
    """Cast the arguments of the model itself, or leave them, where its rule allows both."""
    if cast is None or rule not in (PLAIN, LAYER):
        return how
    inputs = FiniteCast(dtype_named(policy.compute_dtype)) if cast else None
    return replace(how, inputs=inputs, why=f"{how.why}, cast_forward_inputs={cast}")


def _how(module: nn.Module, policy: Policy, rule: Rule, functional: Functional) -> _How:
    compute = dtype_named(policy.compute_dtype)
    if not policy.is_low:
        return _How(f"computes in {policy.compute_dtype}", Cast(compute), Region(None))
    return _How(
        why=_words(rule, policy, functional),
        inputs=_inputs(rule, compute, functional),
        region=_region(rule, compute, functional),
        reads=() if rule.weights in ("float32", "rows") else _tensors(module),
        result=Cast(compute) if rule.result else None,
    )


def _words(rule: Rule, policy: Policy, functional: Functional) -> str:
    return rule.why.format(compute=policy.compute_dtype, functional=functional)


def _result(
    how: _How, path: str, policy: Policy, parent: Policy, output_dtype: str | None
) -> Cast | None:
    if not path and output_dtype is not None:
        return LowCast(dtype_named(output_dtype))
    if path and policy.is_low and not parent.is_low:
        # a float32 parent goes on in float32; a cast up loses nothing
        return LowCast(dtype_named(parent.compute_dtype))
    return how.result


def _tensors(module: nn.Module) -> tuple[str, ...]:
    """Names of the module's own tensors that stand for weights.

    Its parameters, parametrized tensors, and what a hook computes from a parameter before each
    call (``torch.nn.utils.weight_norm``, ``spectral_norm`` and ``prune`` do so).
    """
    parameters = {name for name, value in module._parameters.items() if value is not None}
    parametrized = set(getattr(module, "parametrizations", ()))
    computed = {
        name
        for name, value in module.__dict__.items()
        if isinstance(value, torch.Tensor)
        and parameters & {f"{name}_g", f"{name}_orig"}
        and value.dtype in FLOATS
    }
    # only the hook reads what it computes them from
    sources = {f"{name}_{suffix}" for name in computed for suffix in ("g", "v", "orig")}
    return tuple(sorted((parameters - sources) | parametrized | computed))


def _inputs(rule: Rule, compute: torch.dtype, functional: Functional) -> Cast | None:
    if rule.inputs == "float32":
        return Cast(torch.float32)
    if rule.inputs == "cast":
        return Cast(compute)
    if rule.inputs == "float32 on cpu":
        return Float32OnCpu(compute)
    if rule.inputs == "cast finite" or (functional == "compute" and rule.name == "plain"):
        return FiniteCast(compute)
    return None


def _region(rule: Rule, compute: torch.dtype, functional: Functional) -> Region | None:
    if rule.inside == "off":
        return Region(None)
    if rule.inside == "on" or (rule.inside == "functional" and functional == "autocast"):
        return Region(compute)
    return None


def _to_store(module: nn.Module, policy: Policy, rule: Rule) -> tuple[tuple[str, torch.dtype], ...]:
    """The module's parameters whose dtype is not the policy's variable dtype, with theirs.

    Theirs without any policy: what one has stored by now is given back before this one is applied.
    """
    if rule.weights == "unchanged":
        return ()
    plan, normed = plan_of(module), _normed(module)
    before = {} if plan is None else dict(plan.stored)
    wanted = torch.float32 if rule.weights == "float32" else dtype_named(policy.variable_dtype)
    return tuple(
        (name, before.get(name, parameter.dtype))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dtype in FLOATS
        and before.get(name, parameter.dtype) is not wanted
        and name not in normed
    )


def _normed(module: nn.Module) -> set[str]:
    """Names of parameters that the hook of ``torch.nn.utils.spectral_norm`` divides by their norm.

    Which it finds with buffers of theirs, in their dtype.
    """
    buffers = [name for name, _ in module.named_buffers(recurse=False)]
    sources = {f"{name.removesuffix('_u')}_orig" for name in buffers if name.endswith("_u")}
    return sources.intersection(name for name, _ in module.named_parameters(recurse=False))


def _words_of_normed(module: nn.Module, policy: Policy) -> str:
    if dtype_named(policy.variable_dtype) not in LOW:
        return ""
    return "".join(f", {name} as it is" for name in sorted(_normed(module)))
