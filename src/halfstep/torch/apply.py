"""Giving a policy to a model: ``apply_policy``, ``remove_policy`` and ``policy_of``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..core.compatibility import compatibility_check
from ..core.global_policy import global_policy
from ..core.policy import DTYPES, Policy, PolicyMap, as_policy_map
from ..core.policy_names import Update
from ..errors import PolicyError, PolicyWarning, nearest
from . import masters, registry, replicas, shards
from .bare_steps import watch_steps
from .casting import LOW, dtype_named
from .layer import attach, detach, is_policied, plain_class, policied_class, register_parameters
from .plan import LayerPlan, plan_of
from .planning import NEVER_ATTACHED, Functional, Options, plan_model
from .rules import LEFT_ALONE, PLAIN

_NO_LAYER = NEVER_ATTACHED | {PLAIN.name, LEFT_ALONE, "loss"}

Model = TypeVar("Model", bound=nn.Module)


def apply_policy(
    model: Model,
    policy: Policy | PolicyMap | str | None = None,
    overrides: Mapping[str, Policy | str] | None = None,
    *,
    output_dtype: str | None = "float32",
    functional: Functional = "autocast",
    cast_forward_inputs: bool | None = None,
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
        cast_forward_inputs: whether ``model`` itself casts its floating arguments to its compute
            dtype, so that finite constants stay finite. ``True``: a residual stream that starts
            with them has 16 bits. ``False``: a waveform or a timestep keeps its digits until a
            layer below takes it. ``None``: they are cast if it owns weights or if
            ``functional="compute"``. What one kernel computes, as ``nn.Linear`` or a norm, takes
            the dtype that the kernel wants whatever is said here.

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
    _check_arguments(model, output_dtype, functional, cast_forward_inputs)
    policies = as_policy_map(global_policy() if policy is None else policy, overrides)
    before = plan_of(model)
    part = before is not None and (before.part or before.path != "")
    options = Options(functional, output_dtype, part, cast_forward_inputs)
    plans = plan_model(model, policies, options)
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
        if used.loss_scale.skips:
            watch_steps()
    return model


def remove_policy(model: Model) -> Model:
    """Take every policy away again, in place: classes and variable dtypes as they were.

    A weight that ``"master_bfloat16"`` or the like stored in 16 bits gets every digit back that
    its optimizer kept; after ``"bfloat16"`` it gets its dtype back, and no digit.

    >>> model = apply_policy(nn.Linear(2, 2), "mixed_bfloat16")
    >>> type(remove_policy(model)) is nn.Linear
    True
    """
    plans = {module: plan for module in model.modules() if (plan := plan_of(module)) is not None}
    if any(plan.stored for plan in plans.values()):
        shards.refuse_after_forward(model.modules())
        replicas.refuse_change(model)
    for module, plan in plans.items():
        detach(module)
        for name, dtype in plan.stored:
            _store(module, name, dtype)
    for module in plans:  # only now: a tied weight is stored once, and known by all its modules
        registry.forget_module(module)
        masters.forget_module(module)
    return model


def policy_of(module: nn.Module) -> Policy | None:
    """Return the policy that a module follows, ``None`` where none was applied to it.

    >>> model = apply_policy(nn.Sequential(nn.Linear(2, 2)), "mixed_float16")
    >>> policy_of(model[0])
    Policy('mixed_float16')
    """
    plan = plan_of(module)
    return None if plan is None else plan.policy


def _check_arguments(
    model: object, output_dtype: object, functional: object, cast_forward_inputs: object
) -> None:
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
    if not any(cast_forward_inputs is allowed for allowed in (True, False, None)):
        raise PolicyError(
            f"apply_policy(cast_forward_inputs={cast_forward_inputs!r}): allowed are True, False "
            "and None, which leaves it to functional=."
        )


def _matters(plan: LayerPlan) -> bool:
    return plan.policy.is_low or bool(plan.stored)


def _check_plans(
    model: nn.Module, policies: PolicyMap, plans: Mapping[nn.Module, LayerPlan]
) -> None:
    _check_casts_inputs(model, plans[model])
    for module, plan in plans.items():
        if "forward" in module.__dict__ and plan.rule not in NEVER_ATTACHED:
            raise PolicyError(
                f"apply_policy: {plan.path or 'the model'!r} ({type(module).__name__}) carries a "
                "forward of its own, which would pass the policy by. Apply the policy first, then "
                "what replaces its forward."
            )
        if plan.covers and plan.policy.is_low:
            _check_covered(module, plan, plans)
    if any(plan.stored for plan in plans.values()):
        shards.refuse_after_forward(model.modules())
        replicas.refuse_change(model)
    low = [plan for plan in plans.values() if plan.policy.is_low]
    if low and all(plan.rule in _NO_LAYER for plan in low):
        raise PolicyError(
            f"apply_policy({policies}): no layer of this {type(model).__name__} can follow it. "
            "A layer is a module that owns floating weights of at most 32 bits; every one here, "
            "if there is any, is left alone or overridden."
        )


def _check_casts_inputs(model: nn.Module, plan: LayerPlan) -> None:
    if plan.cast_forward_inputs and plan.rule in NEVER_ATTACHED | {LEFT_ALONE}:
        reason = plan.why.rpartition("; ")[2]
        raise PolicyError(
            f"apply_policy(cast_forward_inputs=True): this {type(model).__name__} cannot cast its "
            f"inputs ({reason}). Apply the policy to the modules that can, each by itself."
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
    if plan.rule in NEVER_ATTACHED:
        return None
    return policied_class(plain_class(type(module)), plan.reads)


def _carry_out(module: nn.Module, plan: LayerPlan, policied: type | None) -> None:
    variable = dtype_named(plan.policy.variable_dtype)
    for name, _ in plan.stored:
        dtype = torch.float32 if plan.reads_where == "float32" else variable
        _store(module, name, dtype, plan.policy.update)
    attach(module, plan, policied)
    register_parameters(module)


def _store(module: nn.Module, name: str, dtype: torch.dtype, update: Update = "plain") -> None:
    parameter = module._parameters[name]
    if parameter is None or parameter.dtype is dtype:
        return  # tied to one that was there before
    exact = parameter.data if (known := masters.float32_of(parameter)) is None else known
    grad, parameter.grad = parameter.grad, None
    masters.forget(parameter)
    shards.set_values(parameter, exact.to(dtype))
    parameter.grad_dtype = dtype
    if grad is not None:
        parameter.grad = grad.to(dtype)
    empty = exact.is_meta or is_lazy(parameter)  # no digits yet: they will be drawn in 16 bits
    if update != "plain" and dtype in LOW and parameter.requires_grad and not empty:
        masters.keep(parameter, exact.to(torch.float32), update)
        masters.keep_for_shards(module, name)
    if update != "plain":
        watch_steps()
