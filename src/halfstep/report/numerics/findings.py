"""What the record of a run says, in sentences: the verdict first, then what to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ...core.numerics.advice import TOLERANCE, LossScaleAdvice, advise_loss_scale
from ...core.numerics.histogram import ExponentHistogram, percent
from .reading import Run
from .shares import SCALED, Layer, View

LOST = 0.01
"""From this share on a finding names a tensor; what the classic procedure tolerates is less."""

NAMED = 5
"""The most tensors that one finding names."""


@dataclass(frozen=True)
class Finding:
    """One thing that a reader should know.

    Attributes:
        severity: ``"fault"``, ``"warning"`` or ``"note"``.
        title: in one line.
        text: what was seen, and what helps.
    """

    severity: str
    title: str
    text: str


def verdict(run: Run, found: Sequence[Finding]) -> str:
    """Return one sentence about the run."""
    faults = sum(finding.severity == "fault" for finding in found)
    steps, skipped = run.last_step, len(run.all("skip"))
    done = f"{steps:,} steps" + (f", {skipped:,} of them skipped" if skipped else "")
    if run.end is None:
        done += "; the run was killed, or goes on"
    elif run.end["error"]:
        done += "; it ended with an error"
    if faults:
        return f"{done}. {faults} fault{'s' if faults > 1 else ''} to look at."
    if skipped:
        return f"{done}, all as probes of the loss scale. No fault."
    return f"{done}. No fault."


def findings(run: Run, views: Sequence[View]) -> list[Finding]:
    """Return what there is to say, faults first."""
    by_kind = {view.kind: view for view in views}
    said = [each for rule in _RULES for each in rule(run, by_kind)]
    order = ("fault", "warning", "note")
    return sorted(said, key=lambda finding: order.index(finding.severity))


def advice(run: Run) -> LossScaleAdvice | None:
    """Return what the gradients ask of a fixed loss scale, None where none was recorded."""
    gradients = [
        ExponentHistogram.from_plain(step[kind])
        for step in run.steps
        for kind in ("activation_gradients", "weight_gradients")
        if step.get(kind) is not None
    ]
    return advise_loss_scale(ExponentHistogram.merged(gradients)) if gradients else None


def _ended(run: Run, views: dict[str, View]) -> Iterable[Finding]:
    if run.end is not None and run.end["error"]:
        yield Finding("fault", "The run ended with an error", run.end["error"])
    if run.end is None:
        text = "The record has no last line." + (" It ends within a line." if run.torn else "")
        yield Finding("note", "The run was killed, or goes on", text)


def _skipped(run: Run, views: dict[str, View]) -> Iterable[Finding]:
    runs = run.all("skips")
    for each in (each for each in runs if each["verdict"] == "fault"):
        at = f"Step {each['first']}" + (f" to {each['last']}" if each["count"] > 1 else "")
        names = _names_at(run, each["first"])
        text = f"{each['text'][0].upper()}{each['text'][1:]}."
        yield Finding("fault", f"{at} skipped: a fault", text + names)
    probes = sum(each["count"] for each in runs if each["verdict"] == "probe")
    if probes:
        text = "A dynamic loss scale finds its limit by passing it. Nothing is lost but the steps."
        what = f"{probes} skipped steps were probes" if probes > 1 else "1 skipped step was a probe"
        yield Finding("note", f"{what} of the loss scale", text)


def _names_at(run: Run, step: int) -> str:
    for event in run.all("skip"):
        if event["step"] == step and event["parameters"]:
            names = ", ".join(event["parameters"][:NAMED])
            more = event["not_finite"] - min(NAMED, len(event["parameters"]))
            return f" Not finite: {names}" + (f" and {more} more." if more > 0 else ".")
    return ""


def _not_finite(run: Run, views: dict[str, View]) -> Iterable[Finding]:
    events = run.all("not_finite")
    if events:
        first = events[0]
        names = ", ".join(first["parameters"][:NAMED])
        yield Finding(
            "fault",
            f"Gradients that were not finite in {len(events)} recorded steps",
            f"First in step {first['step']}, in {first['not_finite']} of {first['of']} "
            f"parameters: {names}. Without loss scaling no step is skipped, so they went into the "
            "weights. halfstep.torch.blame names the operation.",
        )


def _worst(view: View | None, name: str) -> list[Layer]:
    layers = [] if view is None else [each for each in view.layers if name in each.worst]
    return sorted((e for e in layers if e.worst[name] > LOST), key=lambda e: -e.worst[name])


def _named(layers: Sequence[Layer], name: str) -> str:
    shown = [f"{each.label} ({percent(each.worst[name])})" for each in layers[:NAMED]]
    more = len(layers) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _activations(run: Run, views: dict[str, View]) -> Iterable[Finding]:
    view = views.get("activation")
    for name in ("float16", "bfloat16"):
        bad = _worst(view, name)
        if bad:
            text = f"At the worst recorded step, of what is not 0: {_named(bad, name)}."
            if name == "float16":
                text += " Keep them in float32, or train in bfloat16."
            yield Finding("warning", f"Activations that {name} would not hold", text)


def _gradients(run: Run, views: dict[str, View]) -> Iterable[Finding]:
    for kind in ("activation_gradient", "weight_gradient"):
        bad = _worst(views.get(kind), SCALED)
        if bad:
            yield Finding(
                "warning",
                f"{views[kind].title} lost in float16 at the loss scale of the run",
                f"At the worst recorded step that was not skipped: {_named(bad, SCALED)}.",
            )
    found = advice(run)
    if found is not None and found.scale is not None:
        title = (
            "float16 can hold the gradients, with a loss scale"
            if found.fits
            else f"float16 cannot hold the gradients within {percent(TOLERANCE)}"
        )
        yield Finding("note" if found.fits else "warning", title, str(found))


def _updates(run: Run, views: dict[str, View]) -> Iterable[Finding]:
    bad = _worst(views.get("update"), "bfloat16")
    if bad:
        yield Finding(
            "note",
            "Updates that weights stored in bfloat16 would lose",
            f"At the worst recorded step: {_named(bad, 'bfloat16')}. Weights in float32 keep "
            "them, which is what the mixed policies are for.",
        )


def _silent(run: Run, views: dict[str, View]) -> Iterable[Finding]:
    view = views.get("weight_gradient")
    dead = [] if view is None else [e.label for e in view.layers if e.zeros == 1.0]
    if dead:
        more = f" and {len(dead) - NAMED} more" if len(dead) > NAMED else ""
        yield Finding(
            "warning",
            "Gradients that are all zero in a recorded step",
            ", ".join(dead[:NAMED]) + more + ". Too small for the format, or cut off.",
        )


_RULES: tuple[Callable[[Run, dict[str, View]], Iterable[Finding]], ...] = (
    _ended, _skipped, _not_finite, _activations, _gradients, _silent, _updates,
)  # fmt: skip
