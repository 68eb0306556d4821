"""Why an operation made an infinity, a NaN or zeros, and what helps: rules from facts to words.

Each rule is a function that looks at the `Evidence` and answers with a `Reason`, or with None where
it does not apply; the first that answers is right, so the sharper ones stand first.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .evidence import Evidence, Reason
from .fault import TensorFacts

_MASK = 1e30  # no activation is as large: whoever writes it means minus infinity


def _mask_constant(seen: Evidence) -> Reason | None:
    lowest = max((abs(each.low) for each in seen.inputs if each.numel), default=0.0)
    if not (seen.constant and seen.kind == "infinity" and lowest > _MASK):
        return None
    return Reason(
        f"a mask's constant of {lowest:.3g} is infinite in {seen.dtype}, and a row of nothing else "
        "has no softmax",
        f"make the mask with torch.finfo(x.dtype).min of the scores' own dtype, which is "
        f"-{seen.format.max:g}",
        rounding=True,
    )


def _epsilon(seen: Evidence) -> Reason | None:
    if seen.epsilon is None or not seen.zeros_in:
        return None
    return Reason(
        f"an epsilon of {seen.epsilon:g} is 0 in {seen.dtype}, whose smallest number is "
        f"{seen.format.smallest_subnormal:.3g}, so it does not keep {seen.operation} from 0",
        f"an epsilon of {seen.least:.2g} or more",
        rounding=True,
    )


def _overflow(seen: Evidence) -> Reason | None:
    wider = seen.wider
    if wider is None or not wider.finite or wider.largest <= seen.format.max:
        return None
    word = "goes" if "to_copy" not in seen.operation and "copy" not in seen.operation else "is cast"
    if word == "is cast":
        cause = f"a value of {wider.largest:.4g} is cast to {seen.dtype}"
    else:
        cause = f"the result is as large as {wider.largest:.4g}"
    return Reason(
        f"{cause}, and {seen.dtype} ends at {seen.format.max:.6g}",
        rounding=True,
    )


def _inside(seen: Evidence) -> Reason | None:
    if not seen.wider_helps or seen.kind == "zero":
        return None
    return Reason(
        f"{seen.operation} of these inputs overflows on the way in {seen.dtype}, which ends at "
        f"{seen.format.max:.6g}; in a wider format the result is finite",
        rounding=True,
    )


def _vanished(seen: Evidence) -> Reason | None:
    if seen.kind != "zero" or seen.wider is None:
        return None
    return Reason(
        f"every value is below {seen.format.smallest_subnormal:.3g}, the smallest number of "
        f"{seen.dtype} (the largest would be {seen.wider.largest:.3g}), so all of them are 0",
        "a loss scale",
        rounding=True,
    )


def _masked_row(seen: Evidence) -> Reason | None:
    if not any(word in seen.operation for word in ("softmax", "scaled_dot_product", "attention")):
        return None
    if not any(each.infinities for each in seen.inputs):
        return None
    return Reason(
        "a row is masked whole: softmax of nothing but -inf is 0/0",
        "leave at least one position of each row unmasked, or mask with the dtype's lowest finite "
        "number",
    )


def _no_targets(seen: Evidence) -> Reason | None:
    if not seen.operation.startswith("nll_loss"):
        return None
    if any(each.infinities for each in seen.inputs):
        return Reason(
            "a target's class has probability 0: its logit is masked with -inf",
            "do not mask the classes that are targets",
        )
    return Reason(
        "every target is ignored (ignore_index), or their weights are 0: the mean over no target "
        "is 0/0",
        "skip such a batch, or use reduction='sum' and divide by max(count, 1)",
    )


def _log(seen: Evidence) -> Reason | None:
    if not (seen.operation.startswith("log") and seen.direction == "forward"):
        return None
    lowest = min((each.low for each in seen.inputs if each.numel), default=math.nan)
    edge = -1.0 if seen.operation == "log1p" else 0.0
    if seen.operation in ("logsumexp", "logcumsumexp", "logaddexp") or not lowest <= edge:
        return None
    if lowest < edge:
        return Reason(
            f"{seen.operation} of a negative number ({lowest:.4g})", "clamp what goes in from below"
        )
    return Reason(
        f"{seen.operation} of {edge:g}",
        "log_softmax or logsigmoid instead of the log of a probability, or clamp what goes in to "
        f"{seen.least:.2g}",
    )


_DOMAINS: dict[str, tuple[float, float]] = {
    "sqrt": (0.0, math.inf),
    "rsqrt": (0.0, math.inf),
    "acos": (-1.0, 1.0),
    "asin": (-1.0, 1.0),
    "atanh": (-1.0, 1.0),
    "acosh": (1.0, math.inf),
    "logit": (0.0, 1.0),
}


def _outside(seen: Evidence) -> Reason | None:
    low, high = _DOMAINS.get(seen.operation, (-math.inf, math.inf))
    worst = [end for each in seen.inputs for end in (each.low, each.high) if not low <= end <= high]
    if not worst or math.isnan(worst[0]):
        return None
    return Reason(
        f"{seen.operation} of {worst[0]:.4g}, outside of where it is defined, {low:g} to {high:g}",
        "clamp what goes in",
    )


_POLES: dict[str, tuple[float, ...]] = {"logit": (0.0, 1.0), "atanh": (-1.0, 1.0)}


def _pole(seen: Evidence) -> Reason | None:
    poles = _POLES.get(seen.operation, ())
    met = [end for each in seen.inputs for end in (each.low, each.high) if end in poles]
    if not met or seen.direction == "backward":
        return None
    return Reason(
        f"{seen.operation} of {met[0]:g} is infinite",
        "use the number that it was made of instead, or keep what goes in between "
        + " and ".join(f"{pole:g}" for pole in poles),
    )


def _power(seen: Evidence) -> Reason | None:
    if seen.operation != "pow" or seen.direction == "backward" or not seen.inputs:
        return None
    base = seen.inputs[0]
    if seen.kind == "NaN" and base.low < 0:
        return Reason(
            f"pow of a negative number ({base.low:.4g}) with an exponent that is no whole number",
            "take the absolute value of the base, or clamp it from below",
        )
    if base.zeros and any(number < 0 for number in seen.constants):
        return Reason(
            "pow of 0 with a negative exponent is a division by 0", "add an epsilon to the base"
        )
    return None


def _nan_in_the_code(seen: Evidence) -> Reason | None:
    if not any(math.isnan(number) for number in seen.constants):
        return None
    return Reason(f"{seen.operation} is called with the number NaN", "put a finite number there")


_DIVISIONS = ("div", "reciprocal", "true_divide", "rsqrt", "floor_divide", "remainder", "fmod")


def _division(seen: Evidence) -> Reason | None:
    if not seen.operation.startswith(_DIVISIONS):
        return None
    divisor = seen.inputs[-1] if seen.inputs else None
    if 0 in seen.constants[:1] or (divisor is not None and divisor.zeros):
        whole = "0/0" if seen.kind == "NaN" else "a division by 0"
        return Reason(
            f"{seen.operation}: {whole}",
            f"add an epsilon of {seen.least:.2g} or more to the divisor, or clamp it from below",
        )
    return None


_STEEP: dict[str, tuple[str, str]] = {
    "sqrt": ("the derivative of sqrt at 0 is infinite", "add an epsilon inside of the root"),
    "rsqrt": ("the derivative of rsqrt at 0 is infinite", "add an epsilon inside of the root"),
    "pow": (
        "the derivative of a power below 1 is infinite at 0",
        "add an epsilon to the base",
    ),
    "log": (
        "the derivative of log at 0 is infinite, also where torch.where discards the value",
        "make the inputs safe before the log: torch.where(x > 0, x, 1).log()",
    ),
    "reciprocal": ("the derivative of 1/x at 0 is infinite", "keep x from 0 before the division"),
    "div": (
        "the derivative of a division by 0 is infinite, also where torch.where discards the value",
        "make the divisor safe before the division: a / torch.where(b != 0, b, 1)",
    ),
    "acos": ("the derivative of acos at 1 and -1 is infinite", "clamp to just inside of [-1, 1]"),
    "asin": ("the derivative of asin at 1 and -1 is infinite", "clamp to just inside of [-1, 1]"),
    "atan2": ("atan2 has no derivative at (0, 0)", "keep one of the two from 0"),
    "norm": ("a norm has no derivative at 0", "add an epsilon to what goes in"),
    "linalgvectornorm": ("a norm has no derivative at 0", "add an epsilon to what goes in"),
    "cdist": ("a distance has no derivative at 0", "add an epsilon to the points"),
    "std": ("the derivative of a standard deviation of 0 is infinite", "sqrt(var + epsilon)"),
    "prod": ("the derivative of prod divides by its factors, one of which is 0", "sum of logs"),
}


def _steep(seen: Evidence) -> Reason | None:
    if seen.direction != "backward" or seen.node not in _STEEP:
        return None
    cause, cure = _STEEP[seen.node]
    return Reason(cause, cure)


_AVERAGES = ("mean", "var", "std")


def _average_of_nothing(seen: Evidence) -> Reason | None:
    if seen.kind != "NaN" or not seen.operation.startswith(_AVERAGES):
        return None
    if seen.inputs and seen.inputs[0].numel == 0:
        return Reason(f"{seen.operation} of no values is 0/0", "skip empty batches")
    if seen.operation.startswith(("var", "std")) and seen.inputs and seen.inputs[0].finite:
        return Reason(
            f"{seen.operation} of one value is 0/0 with Bessel's correction",
            "correction=0, or more values",
        )
    return None


def _infinite_arithmetic(seen: Evidence) -> Reason | None:
    if seen.kind != "NaN" or not any(each.infinities for each in seen.inputs):
        return None
    return Reason(
        f"{seen.operation} met an infinity that was put there on purpose: 0 * inf, inf - inf and "
        "inf / inf are NaN",
        "use masked_fill or torch.where after the arithmetic, instead of infinities in it",
    )


def _anywhere(seen: Evidence) -> Reason:
    again = "" if seen.wider is None else "; a wider format gives the same"
    return Reason(
        f"{seen.operation} of these inputs is not finite{again}",
        "keep its inputs inside of what it is defined for",
    )


RULES: tuple[Callable[[Evidence], Reason | None], ...] = (
    _mask_constant,
    _vanished,
    _epsilon,
    _overflow,
    _inside,
    _masked_row,
    _no_targets,
    _log,
    _steep,
    _division,
    _outside,
    _pole,
    _power,
    _nan_in_the_code,
    _average_of_nothing,
    _infinite_arithmetic,
)
"""The first that answers is right."""


def explain(seen: Evidence) -> Reason:
    """Return why the operation made what it made.

    >>> from halfstep.core.fault import TensorFacts
    >>> logits = TensorFacts("self", (4,), "float16", -400.0, 400.0, 1.0, 0, 0, 0)
    >>> inf = TensorFacts("", (4,), "float16", 1.0, 1.0, 1.0, 0, 3, 0)
    >>> wide = TensorFacts("", (4,), "float32", 1.0, 160000.0, 1.0, 0, 0, 0)
    >>> explain(Evidence("pow", "", "forward", "infinity", "float16", (logits,), inf, wide)).cause
    'the result is as large as 1.6e+05, and float16 ends at 65504'
    """
    for rule in RULES:
        reason = rule(seen)
        if reason is not None:
            return reason
    return _anywhere(seen)


def batch_reason(facts: TensorFacts) -> Reason:
    """Return what is to be said about a batch that is not finite."""
    what = "NaN" if facts.nans else "infinities"
    count = facts.nans or facts.infinities
    return Reason(
        f"the batch holds {what}: {count} of {facts.numel} values of {facts.name}",
        "look at the data: the model cannot do anything about it",
    )


def asked_for_reason(operation: str) -> Reason:
    """Return what is to be said about an infinity that was put there and that nothing consumed."""
    return Reason(
        f"{operation} puts an infinity there on purpose, and no softmax or comparison consumes it",
        "put a finite number there, or leave out of the loss what is masked",
    )


def parameter_reason(facts: TensorFacts) -> Reason:
    """Return what is to be said about a parameter or a buffer that is not finite."""
    return Reason(
        f"{facts.name} is not finite already: {facts.infinities} infinities and {facts.nans} NaN "
        f"of {facts.numel} values",
        "an earlier step broke it: go back to a checkpoint from before, and blame that step",
    )
