"""``blame``: replay a step, find what broke it, and prove what would help."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...core.fault import Fault
from ...errors import LossScaleError
from ..casting import LOW
from ..plan import plan_of
from . import trials
from .looking import all_zero
from .replay import LossFn, Result, Step, replay, unwrapped
from .trace import Finding, find, find_vanished

_SCALES = tuple(2.0**power for power in (8, 12, 16, 20, 24))


def blame(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    loss_scale: float | None = None,
    optimizer: Optimizer | torch.amp.GradScaler | None = None,
    seed: int | None = None,
    prove: bool = True,
) -> Fault | None:
    """Replay one step and say where its first infinity or NaN was made, why, and what helps.

    ::

        replay forward and backward, eagerly, with every operation watched
        nothing is broken: look for weights whose gradients are all zero; none: return None
        walk back from the loss, the gradients and the buffers that are not finite, through inputs
            that were not finite, to the operation that made the first of it out of finite numbers
        run that operation again in the next wider format, to know whether rounding is the cause
        broken in the backward pass only: find the largest loss scale at which it is not
        replay with a copy of the model with that layer in float32, then the layers around it,
            until everything is finite

    An infinity that was asked for (a mask of ``-inf`` that a softmax consumes) is blamed only if
    it did harm. One that a later operation hid, as ``rsqrt(inf) = 0``, is reported: the step went
    on with wrong numbers.

    Parameters, buffers, gradients and random generators are afterwards as they were before, also
    after an exception; no hook stays. Compiled modules are replayed eagerly. Under data
    parallelism pass the model, or the wrapper: the replay is of this rank alone.

    Args:
        model: any module; with a policy, under ``torch.autocast`` in ``loss_fn``, or neither.
        loss_fn: called as ``loss_fn(model, batch)``; returns the loss: a tensor, something with
            one as ``.loss`` or ``["loss"]``, or scalars to add up. It must use the model that
            it is given, which may be a copy.
        batch: what ``loss_fn`` gets.
        loss_scale: what the loss is multiplied by; left out, the optimizer's, or 1.
        optimizer: a ``LossScaleOptimizer`` or a ``GradScaler``, to take the loss scale from.
        seed: of the random numbers in the replay; left out, they are those that would come next.
        prove: whether to replay with copies of the model in search of a cure. It takes a few more
            steps, and the memory of a second model.

    Returns:
        The fault, which prints as a report; None if all is finite and no weight's gradient is 0.

    Raises:
        LossScaleError: ``loss_fn`` returns no loss, or a loss scale that is not positive.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    (Parameter containing: ..., Parameter containing: ...)
    >>> fault = blame(model, lambda model, x: model(x).sum().log(), torch.ones(1, 2))
    >>> fault.operation, fault.direction, fault.cause
    ('log', 'forward', 'log of 0')
    """
    step = Step(unwrapped(model), loss_fn, batch, _scale(loss_scale, optimizer), seed)
    result = replay(step)
    finding = find(result)
    if finding is None:
        return _vanished(step, result)
    if finding.record.node and step.loss_scale != 1:
        scaled = _too_large_a_scale(step, finding)
        if scaled is not None:
            return scaled
    if finding.record.outside or not (prove and result.watch.low):
        return _or_else(finding.fault)
    return _with_cure(step, finding)


def _scale(given: float | None, optimizer: Any) -> float:
    if given is None:
        read = getattr(optimizer, "get_scale", None)
        given = read() if read is not None else getattr(optimizer, "current_scale", 1.0)
    scale = float(given)
    if not 0 < scale < math.inf:
        raise LossScaleError(f"blame(loss_scale={given!r}): it must be positive and finite.")
    return scale


# ---------------------------------------------------------------------- loss scales


def _too_large_a_scale(step: Step, finding: Finding) -> Fault | None:
    """Return the fault if without its loss scale the step is finite."""
    if find(replay(step.at_scale(1.0))) is not None:
        return None
    good, bad = 0, math.ceil(math.log2(step.loss_scale))
    while bad - good > 1:
        middle = (good + bad) // 2
        if find(replay(step.at_scale(2.0**middle))) is None:
            good = middle
        else:
            bad = middle
    return replace(
        finding.fault,
        cause=f"the loss scale, not the model: {finding.reason.cause}. At a loss scale of "
        f"{_power(step.loss_scale)} the gradients overflow here, unscaled they are finite",
        cure=f"a loss scale of 2**{good} or less. A dynamic one finds it by itself, at the price "
        "of a skipped step for each halving",
        proof=f"at a loss scale of 2**{good} everything is finite, at 2**{bad} it is not",
    )


def _power(scale: float) -> str:
    exponent = math.log2(scale)
    return f"2**{exponent:g}" if exponent.is_integer() and exponent > 3 else f"{scale:g}"


def _vanished(step: Step, result: Result) -> Fault | None:
    """Return the fault if the gradient of a whole weight matrix was rounded to zero."""
    if not result.watch.low or not result.zero_gradients:
        return None
    finding = find_vanished(replay(step, all_zero))
    if finding is None:
        return None
    for scale in _SCALES:
        larger = step.at_scale(scale * step.loss_scale)
        again = replay(larger)
        if find(again) is not None:
            break
        if not again.zero_gradients or find_vanished(replay(larger, all_zero)) is None:
            return replace(
                finding.fault,
                cure=f"a loss scale of {_power(larger.loss_scale)}: LossScaleOptimizer(optimizer), "
                "whose scale is dynamic",
                proof=f"at a loss scale of {_power(larger.loss_scale)} everything is finite and no "
                "weight's gradient is all zero",
            )
    return finding.fault


# ---------------------------------------------------------------------- layers


def _with_cure(step: Step, finding: Finding) -> Fault:
    try:
        still = trials.in_float32(step)
        cured = None if still else trials.search(step, finding)
    except trials.TrialFailed:
        return _or_else(finding.fault)
    fault = finding.fault
    if cured is None:
        return (
            _one_of_several(finding, still) if _elsewhere(finding, still) else _not_cured(finding)
        )
    words = _in_words(cured, step.model)
    return replace(
        fault,
        cause=fault.cause + ("" if finding.reason.rounding else _ROUNDED),
        cure=f"{fault.cure}; or {words}" if fault.cure else words,
        proof=f"with {_changed(cured)} everything is finite",
        layers=cured.layers,
    )


def _not_cured(finding: Finding) -> Fault:
    """Float32 does not help: what broke the step is the code, which may cast by itself."""
    so = "the code itself asks for it" if finding.reason.rounding else "it is not rounding"
    cure = finding.fault.cure or f"take the cast to {finding.fault.dtype} out of this line"
    return replace(
        finding.fault, cure=cure, proof=f"all of the model in float32 is no better, so {so}"
    )


def _elsewhere(finding: Finding, still: Finding | None) -> bool:
    """Whether float32 cures what was found, and something later breaks the step all the same."""
    if still is None or not finding.reason.rounding:
        return False
    first, second = finding.fault, still.fault
    return (first.path, first.source) != (second.path, second.source)


def _one_of_several(finding: Finding, still: Finding | None) -> Fault:
    fault = _or_else(finding.fault)
    if still is None:
        return fault
    next_one = f"{_lower(still.fault.place)} ({still.fault.operation}: {still.fault.cause})"
    proof = f"all of the model in float32 cures this, and is still not finite: {next_one}"
    return replace(fault, proof=proof, layers=(fault.path,) if fault.path else ())


def _lower(place: str) -> str:
    return place[:1].lower() + place[1:] if place.startswith("The ") else place


def _or_else(fault: Fault) -> Fault:
    """What is left to say where nothing was replayed."""
    if fault.cure:
        return fault
    low = fault.dtype in ("float16", "bfloat16")
    where = f"run {fault.path!r} in float32" if fault.path else "compute this line in float32"
    return replace(
        fault, cure=where if low else "make what goes in smaller: normalise it, or clip it"
    )


_ROUNDED = ". That is rounding's doing: in float32 the same step is finite"


def _changed(cured: trials.Cured) -> str:
    return {
        "layers": f"{_quoted(cured)} in float32",
        "output": "the model's output in float32",
        "bfloat16": "all of the model in bfloat16",
        "float32": "all of the model in float32",
    }[cured.how]


def _in_words(cured: trials.Cured, model: nn.Module) -> str:
    if cured.how == "layers":
        overrides = ", ".join(f"{path!r}: 'float32'" for path in cured.layers)
        call = "call it under torch.autocast(device, enabled=False), with .float() inputs"
        if any(parameter.dtype in LOW for parameter in model.parameters()):
            call = ".float() on it, on what goes in, and back to 16 bits on what comes out"
        if plan_of(model) is not None:
            call = f"apply_policy(model, policy, {{{overrides}}})"
        return f"run {_quoted(cured)} in float32: {call}"
    return {
        "output": "give the loss float32: output_dtype='float32', or .float() on what the model "
        "returns",
        "bfloat16": "bfloat16 instead of float16: it has float32's range, and no few layers in "
        "float32 are enough",
        "float32": "float32 for all of the model: no few layers are enough",
    }[cured.how]


def _quoted(cured: trials.Cured) -> str:
    return " and ".join(repr(path) for path in cured.layers)
