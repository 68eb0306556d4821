"""Rules about the code around the layers: what works against the policy, or passes it by."""

from __future__ import annotations

from collections.abc import Iterator

from .facts import LOSS, Facts, OwnCast, Result, Weights, low
from .findings import Finding, Severity


def result(facts: Facts) -> Iterator[Finding]:
    """The model's output or the loss is in 16 bits, or was computed in them.

    A cast at the end does not bring back what a loss lost on its way.
    """
    for found in facts.results:
        if low(found.dtype):
            yield Finding("result", "warning", found.place, _comes_out(found), _go_on(found))
        elif found.place == LOSS and low(found.computed_in):
            yield Finding(
                "result",
                "warning",
                found.place,
                f"the loss is {found.dtype}, but {found.operation or 'what made it'} computed it "
                f"in {found.computed_in}: the cast came too late",
                "compute it from outputs in float32",
            )


def _comes_out(found: Result) -> str:
    what = "the loss" if found.place == LOSS else f"the output {found.name}".rstrip()
    made = f"; {found.operation} made it" if found.operation else ""
    return f"{what} is {found.dtype}{made}"


def _go_on(found: Result) -> str:
    if found.place == LOSS:
        return "compute the loss in float32: it is one number, and every gradient starts from it"
    return "leave apply_policy's output_dtype at 'float32': losses and metrics want its digits"


def own_casts(facts: Facts) -> Iterator[Finding]:
    """Modules that cast by themselves, or switch autocast off, and so undo the policy.

    A cast up around something delicate is often meant: that one is only a hint. What costs is
    matrix arithmetic in float32 behind it, and what breaks is a 16-bit dtype that is written down.
    """
    for cast in facts.casts:
        yield Finding(
            "own-casts", _weight_of(facts, cast), cast.place, _does(facts, cast), _rather(cast)
        )


def _weight_of(facts: Facts, cast: OwnCast) -> Severity:
    fixed = low(cast.after) and cast.after != cast.before
    heavy = bool(facts.flops) and cast.flops / facts.flops >= 0.01
    return "warning" if fixed or heavy else "hint"


def _does(facts: Facts, cast: OwnCast) -> str:
    unit = "operations" if cast.before == cast.after else "times"
    times = f"{cast.times} {unit} a batch" if cast.times > 1 else "once a batch"
    where = f" ({cast.where})" if cast.where else ""
    if cast.before == cast.after:
        said = f"{cast.kind} runs with {cast.call}, {times}{where}"
    else:
        said = f"{cast.kind} calls {cast.call}, {cast.before} to {cast.after}, {times}{where}"
    if cast.flops and facts.flops:
        said += f"; {cast.flops / facts.flops:.1%} of the matrix arithmetic then ran in float32"
    return said


def _rather(cast: OwnCast) -> str:
    if low(cast.after) and cast.after != cast.before:
        return (
            f"cast to the dtype of another tensor (x.to(other.dtype)): {cast.after} is right under "
            "one policy only"
        )
    return (
        "if float32 is meant here, say so in the policy instead "
        f"(overrides={{{cast.place!r}: 'float32'}}) and remove it, or silence this rule; "
        "else remove it"
    )


def weights(facts: Facts) -> Iterator[Finding]:
    """The weights are not what a mixed policy wants: float32, from the start."""
    if facts.global_policy is not None:
        yield Finding(
            "weights",
            "warning",
            "",
            f"the global policy is {facts.global_policy}, and this model was built without it: "
            "setting it changes no model that is there",
            "call apply_policy(model), which takes the global policy",
        )
    for found in facts.weights:
        yield _stored(found)


def _stored(found: Weights) -> Finding:
    names = ", ".join(found.names)
    if low(found.variable_dtype):
        return Finding(
            "weights", "warning", found.place,
            f"{names}: the policy keeps them in {found.variable_dtype}, where an update below "
            f"{'2**-9' if found.variable_dtype == 'bfloat16' else '2**-12'} of a weight is lost",
            f"train with 'mixed_{found.variable_dtype}': variables in float32 (Zamirai et al. "
            "2020, arXiv:2010.06192)",
        )  # fmt: skip
    return Finding(
        "weights",
        "warning",
        found.place,
        f"{names}: {found.dtype} when the policy came, so the digits of {found.variable_dtype} "
        "were gone already",
        "build or load the model in float32, without .half() or .bfloat16(); the policy makes the "
        "16-bit copies",
    )
