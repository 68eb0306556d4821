"""Giving a policy to a model: ``apply_policy``, ``remove_policy`` and ``policy_of``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from ..core.compatibility import compatibility_check
from ..core.policy import (
    DTYPES,
    Policy,
    PolicyMap,
    Resolved,
    as_policy_map,
    global_policy,
)
from ..errors import PolicyError, PolicyWarning, nearest
from . import registry
from .casting import FLOATS, Cast, FiniteCast, LowCast, dtype_named
from .layer import attach, detach, is_policied, plain_class, policied_class, register_parameters
from .plan import LayerPlan, plan_of
from .region import Region
from .rules import (
    FLOAT32_WHOLE,
    HOLDER,
    LEFT_ALONE,
    PARAMETRIZATION,
    PLAIN,
    SEALED,
    TRANSPARENT,
    Rule,
    left_alone,
    rule_for,
)

_NEVER_ATTACHED = frozenset(rule.name for rule in (HOLDER, PARAMETRIZATION, SEALED, TRANSPARENT))
_NO_LAYER = _NEVER_ATTACHED | {PLAIN.name, LEFT_ALONE, "loss"}

Model = TypeVar("Model", bound=nn.Module)
Functional = Literal["autocast", "compute"]


@dataclass(frozen=True)
class _Options:
    functional: Functional
    output_dtype: str | None
    part: bool


@dataclass(frozen=True)
class _How:
    """The part of a plan that a rule decides."""

    why: str
    inputs: Cast | None = None
    region: Region | None = None
    reads: tuple[str, ...] = ()
    result: Cast | None = None


def apply_policy(
    model: Model,
    policy: Policy | PolicyMap | str | None = None,
    overrides: Mapping[str, Policy | str] | None = None,
    *,
    output_dtype: str | None = "float32",
    functional: Functional = "autocast",
) -> Model:
    """Make every layer of ``model`` follow a dtype policy, in place, and return the model.

    A *layer* is a module that owns weights. It casts its floating arguments to the compute dtype
    and reads its weights in it; the weights themselves stay in the variable dtype, so the
    optimizer, ``state_dict`` and everything outside of the layer's own ``forward`` see float32.
    Normalisation layers take and give the compute dtype and keep statistics in float32,
    embeddings gather float32 rows and cast those. :func:`policy_summary` prints what each module
    got and why.

    Args:
        model: any ``nn.Module``. Its class becomes a subclass of the same name.
        policy: a policy, a policy map, or a policy's name; left out, the global policy.
        overrides: policies by path or regular expression, see :class:`halfstep.PolicyMap`.
        output_dtype: 16-bit floats that the model returns are cast to this dtype; ``None`` leaves
            them. A loss in 16 bits is the mistake that the whole field warns about.
        functional: what lies between layers, as ``x @ y`` or ``softmax`` in somebody's forward:
            ``"autocast"`` runs it under ``torch.autocast`` with its lists of operations;
            ``"compute"`` runs it in the dtype of what the layers gave, as Keras does, with fewer
            casts and less memory: then modules without weights cast their arguments too.

    Raises:
        PolicyError: an unknown policy, dtype or path, two overrides that disagree, a model in
            which no layer can follow the policy. The model is then as it was.

    Warns:
        PolicyWarning: the policy asks for what the model does anyway.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    >>> _ = apply_policy(model, "mixed_bfloat16", {"2": "float32"})
    >>> model[0](torch.ones(1, 4)).dtype, model(torch.ones(1, 4)).dtype, model[0].weight.dtype
    (torch.bfloat16, torch.float32, torch.float32)
    """
    _check_arguments(model, output_dtype, functional)
    policies = as_policy_map(global_policy() if policy is None else policy, overrides)
    before = plan_of(model)
    part = before is not None and (before.part or before.path != "")
    plans = _plan(model, policies, _Options(functional, output_dtype, part))
    _check_plans(model, policies, plans)
    # a part of a model with a policy is surrounded by 16 bits: float32 must be kept up there
    if not part and not any(_matters(plan) for plan in plans.values()):
        if not any(is_policied(module) for module in model.modules()):
            _warn_no_change(model, policies, given=policy is not None)
        return remove_policy(model)
    # made first: whatever a class of the model's own says against a subclass, it says before
    classes = {module: _class_of(module, plan) for module, plan in plans.items()}
    remove_policy(model)
    for module, plan in plans.items():
        _carry_out(module, plan, classes[module])
    for used in dict.fromkeys(plan.policy for plan in plans.values()):
        compatibility_check(used)
    return model


def remove_policy(model: Model) -> Model:
    """Take every policy away again, in place: classes and variable dtypes as they were.

    (A weight that a policy like ``"bfloat16"`` stored in 16 bits gets its dtype back, not its
    digits.)

    >>> model = apply_policy(nn.Linear(2, 2), "mixed_bfloat16")
    >>> type(remove_policy(model)) is nn.Linear
    True
    """
    for module in model.modules():
        plan = plan_of(module)
        if plan is None:
            continue
        detach(module)
        for name, dtype in plan.stored:
            _store(module, name, dtype)
        for parameter in module.parameters(recurse=False):
            registry.forget(parameter)
    return model


def policy_of(module: nn.Module) -> Policy | None:
    """Return the policy that a module follows, ``None`` where none was applied to it.

    >>> model = apply_policy(nn.Sequential(nn.Linear(2, 2)), "mixed_float16")
    >>> policy_of(model[0])
    Policy('mixed_float16')
    """
    plan = plan_of(module)
    return None if plan is None else plan.policy


def _check_arguments(model: object, output_dtype: object, functional: object) -> None:
    if not isinstance(model, nn.Module):
        raise PolicyError(f"apply_policy: the model must be an nn.Module, not {type(model)}.")
    if output_dtype is not None and output_dtype not in DTYPES:
        raise PolicyError(
            f"apply_policy(output_dtype={output_dtype!r}): allowed are {', '.join(DTYPES)} and "
            "None, for what the last layer gives." + nearest(str(output_dtype), DTYPES)
        )
    if functional not in ("autocast", "compute"):
        raise PolicyError(
            f"apply_policy(functional={functional!r}): allowed are 'autocast' and 'compute'."
        )


def _paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every path of every module: a module that lies in two places has two."""
    seen: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    yield from seen.items()


def _plan(model: nn.Module, policies: PolicyMap, options: _Options) -> dict[nn.Module, LayerPlan]:
    paths = dict(_paths(model))
    resolved = _keep_losses(policies.resolve(paths), paths)
    parametrizations = {
        below
        for module in paths.values()
        if isinstance(module, ParametrizationList)
        for below in module.modules()
    }
    plans: dict[nn.Module, LayerPlan] = {}
    for path, module in paths.items():
        if module in plans:
            _check_same(plans[module], path, resolved[path])
            continue
        parent = resolved[path.rpartition(".")[0]].policy
        rule = rule_for(module, _tensors(module))
        if module in parametrizations:
            rule = PARAMETRIZATION
        elif (
            path and rule is PLAIN and _runs_as_its_parent(module, resolved[path], parent, options)
        ):
            rule = TRANSPARENT
        plans[module] = _plan_module(module, path, resolved[path], parent, rule, options)
    return plans


def _runs_as_its_parent(
    module: nn.Module, resolved: Resolved, parent: Policy, options: _Options
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
    options: _Options,
) -> LayerPlan:
    policy, alone = resolved.policy, left_alone(module)
    if rule.name in _NEVER_ATTACHED:
        how = _How(_words(rule, policy, options.functional))
    elif alone is not None:  # what its neighbours give in 16 bits reaches it in float32
        rule = Rule(LEFT_ALONE, f"left alone: {alone}")
        how = _How(rule.why, LowCast(torch.float32), Region(None))
    else:
        how = _how(module, policy, rule, options.functional)
        if how.region is None and (not path or policy.compute_dtype != parent.compute_dtype):
            # autocast of another dtype around it would cast its own 16-bit tensors again
            how = replace(how, region=Region(None))
    return LayerPlan(
        policy=policy,
        path=path,
        why=f"{resolved.why}; {how.why}",
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
    )


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
    """The module's parameters whose dtype is not the policy's variable dtype, with theirs."""
    wanted = torch.float32 if rule.weights == "float32" else dtype_named(policy.variable_dtype)
    return tuple(
        (name, parameter.dtype)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dtype in FLOATS and parameter.dtype is not wanted
    )


def _matters(plan: LayerPlan) -> bool:
    return plan.policy.is_low or bool(plan.stored)


def _check_plans(
    model: nn.Module, policies: PolicyMap, plans: Mapping[nn.Module, LayerPlan]
) -> None:
    for module, plan in plans.items():
        if "forward" in module.__dict__ and plan.rule not in _NEVER_ATTACHED:
            raise PolicyError(
                f"apply_policy: {plan.path or 'the model'!r} ({type(module).__name__}) carries a "
                "forward of its own, which would pass the policy by. Apply the policy first, then "
                "what replaces its forward."
            )
        if plan.covers and plan.policy.is_low:
            _check_covered(module, plan, plans)
    low = [plan for plan in plans.values() if plan.policy.is_low]
    if low and all(plan.rule in _NO_LAYER for plan in low):
        raise PolicyError(
            f"apply_policy({policies}): no layer of this {type(model).__name__} can follow it. "
            "A layer is a module that owns floating weights of at most 32 bits; every one here, "
            "if there is any, is left alone or overridden."
        )


def _check_covered(
    module: nn.Module, plan: LayerPlan, plans: Mapping[nn.Module, LayerPlan]
) -> None:
    for below in module.modules():
        other = plans[below]
        if other.policy.compute_dtype != plan.policy.compute_dtype:
            raise PolicyError(
                f"apply_policy: {other.path!r} cannot have another policy ({other.policy.name}) "
                f"than {plan.path or 'the model'!r} ({plan.policy.name}): a "
                f"{type(module).__name__} reads its weights without calling it. Name "
                f"{plan.path or 'the model'!r} instead."
            )


def _warn_no_change(model: nn.Module, policies: PolicyMap, *, given: bool) -> None:
    source = "" if given else ", the global policy; set it with halfstep.set_global_policy"
    warnings.warn(
        f"apply_policy({policies.default}) changes nothing in this {type(model).__name__}: "
        f"it computes in {policies.default.compute_dtype} already{source}.",
        PolicyWarning,
        stacklevel=3,
    )


def _class_of(module: nn.Module, plan: LayerPlan) -> type | None:
    """The class that the module will get, ``None`` for one that keeps its own."""
    if plan.rule in _NEVER_ATTACHED:
        return None
    return policied_class(plain_class(type(module)), plan.reads)


def _carry_out(module: nn.Module, plan: LayerPlan, policied: type | None) -> None:
    variable = dtype_named(plan.policy.variable_dtype)
    for name, _ in plan.stored:
        _store(module, name, torch.float32 if plan.reads_where == "float32" else variable)
    register_parameters(module, plan)
    attach(module, plan, policied)


def _store(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    parameter = module._parameters[name]
    if parameter is None or parameter.dtype is dtype:
        return  # tied to one that was there before
    parameter.data = parameter.data.to(dtype)
    if parameter.grad is not None:
        parameter.grad = parameter.grad.to(dtype)
