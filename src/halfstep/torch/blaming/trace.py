"""From what is broken back to the operation that broke it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ...core.causes import asked_for_reason, batch_reason, explain, parameter_reason
from ...core.evidence import Evidence, Reason
from ...core.fault import GRADIENT, Fault
from ...core.fault import Kind as FaultKind
from ...core.formats import FORMATS, format_of
from .replay import Result
from .watch import Detail, Record

_NODE = re.compile(r"(?:.*::)?(.*?)(?:Backward)?\d*$")
_MADE_FROM = 6
"""How many operations back an epsilon is looked for."""

_EPSILON_OPERATIONS = frozenset(
    {"add", "add_", "sub", "clamp", "clamp_", "clamp_min", "clamp_min_", "maximum", "full"}
)
_FROM_OUTSIDE = "A tensor from outside of the model"
_PRODUCTS = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "linear"}
)
_SOFTMAX = ("softmax", "attention", "logsumexp")


@dataclass(frozen=True)
class Finding:
    """A record that is to blame, why, and the fault to report (without a proven cure)."""

    record: Record
    reason: Reason
    fault: Fault


def find(result: Result) -> Finding | None:
    """Return what broke a step first, None if nothing did.

    ::

        harm   = the loss, else the gradients and buffers that are not finite
        past   = every operation with bad output that led to it, through bad inputs
        blame  = the earliest in past that made something bad out of good inputs, unasked;
                 where every infinity was put there on purpose, what made the first NaN of them
        no harm: the first operation in the forward pass that overflows and would not in float32
    """
    reached = _reached(result)
    harmed = [result.loss] if result.loss is not None and result.loss.bad else []
    harmed = harmed or [*result.bad_gradients.values(), *result.buffers.values()]  # type: ignore[list-item]
    record = _origin(result, harmed) if reached else _swallowed(result)
    return None if record is None else _described(record, reached)


def find_vanished(result: Result) -> Finding | None:
    """Return where the gradients of a whole weight were rounded to zero, None if none were.

    Args:
        result: of a replay that looked for tensors of nothing but zeros.
    """
    gone = {name: result.gradients[name][0] for name in result.zero_gradients}
    made = [
        record
        for start in gone.values()
        if start is not None
        for record in result.watch.look_again(start)
        if record.makes and record.detail is not None and _nonzero(record.detail)
    ]
    if not made:
        return None
    first = min(made, key=lambda record: record.index)
    return _described(first, tuple(GRADIENT + name for name in gone), "zero")


def _nonzero(detail: Detail) -> bool:
    wider = detail.wider
    return wider is not None and wider.zeros < wider.numel


def _reached(result: Result) -> tuple[str, ...]:
    loss = ("the loss",) if result.loss is not None and result.loss.bad else ()
    gradients = tuple(GRADIENT + name for name in result.bad_gradients)
    return loss + gradients + tuple(f"the buffer {name}" for name in result.buffers)


def _origin(result: Result, harmed: Iterable[Record | None]) -> Record | None:
    past = {
        id(record): record
        for start in harmed
        if start is not None
        for record in result.watch.look_again(start)
    }
    suspects = sorted(past.values(), key=lambda record: record.index)
    makers = [record for record in suspects if record.makes or record.outside]
    nan_makers = [record for record in makers if record.bad_parents]
    spread = _multiplied(suspects)
    groups = (
        [r for r in makers if not r.bad_parents and (_certain(r) or id(r) in spread)],
        [record for record in nan_makers if any(word in record.operation for word in _SOFTMAX)],
        [record for record in makers if not record.bad_parents and not record.on_purpose],
        nan_makers,
        makers,
    )
    return next((group[0] for group in groups if group), None)


def _certain(record: Record) -> bool:
    """Whether nobody can have wanted this: not an infinity that may be a mask."""
    if record.on_purpose:
        return False
    if record.operation == "batch":
        return record.nan
    if record.outside or record.nan or record.learns or record.node:
        return True
    wider = None if record.detail is None else record.detail.wider
    return wider is not None and wider.finite


def _multiplied(suspects: Iterable[Record]) -> set[int]:
    """What made infinities that reached a product of matrices: no mask is meant to get there."""
    todo = [
        parent
        for record in suspects
        if record.operation in _PRODUCTS and not record.node
        for parent in record.bad_parents
    ]
    seen: set[int] = set()
    while todo:
        here = todo.pop()
        if here.nan or id(here) in seen:
            continue  # past a NaN, it is that which the product met
        seen.add(id(here))
        todo += here.bad_parents
        if here.outside or here.on_purpose:
            seen.discard(id(here))
    return seen


def _swallowed(result: Result) -> Record | None:
    """The first overflow in the forward pass, though all ended well: something hid it."""
    for record in result.watch.makers:
        detail = record.detail
        if detail is None or record.node or not record.learns or detail.wider is None:
            continue
        if detail.wider.finite and not _adds_mask(detail):
            return record
    return None


def _adds_mask(detail: Detail) -> bool:
    """Whether a mask of the lowest finite number was added to scores: -inf is as good."""
    if detail.output.nans or detail.wider is None or detail.wider.high > detail.output.largest * 2:
        return False
    lowest = -format_of(str(detail.dtype).removeprefix("torch.")).max / 2
    return any(given.low <= lowest for given in detail.inputs)


# ---------------------------------------------------------------------- in words


def _described(record: Record, reached: tuple[str, ...], kind: FaultKind | None = None) -> Finding:
    if record.outside:
        return _came_in(record, reached)
    if record.detail is None:
        return _asked_for(record, reached)
    evidence = _evidence(record, kind)
    reason = explain(evidence)
    operation = f"{record.operation} in {record.node}" if record.node else record.operation
    path, place, source = _owner(record)
    fault = Fault(
        path=path,
        operation=operation,
        direction=evidence.direction,
        kind=evidence.kind,
        cause=reason.cause,
        cure=reason.cure,
        place=place,
        dtype=evidence.dtype,
        limit=evidence.format.max,
        inputs=evidence.inputs,
        output=evidence.output,
        source=source,
        reached=reached,
    )
    return Finding(record, reason, fault)


def _asked_for(record: Record, reached: tuple[str, ...]) -> Finding:
    """An infinity that somebody put there, as in ``loss * inf``, and that nothing consumed."""
    reason = asked_for_reason(record.operation)
    fault = Fault(
        path=record.place.path,
        operation=f"{record.operation} in {record.node}" if record.node else record.operation,
        direction="backward" if record.node else "forward",
        kind="NaN" if record.nan else "infinity",
        cause=reason.cause,
        cure=reason.cure,
        place=record.place.words,
        source=record.place.source,
        reached=reached,
    )
    return Finding(record, reason, fault)


def _owner(record: Record) -> tuple[str, str, str]:
    """The module, in words too, and the line: whose operation it is, or whose weight it casts.

    A policy casts many weights in one go, in the forward of the first layer that needs one.
    """
    parents = record.parents
    if record.operation == "_to_copy" and len(parents) == 1 and parents[0].operation == "parameter":
        path, _, name = parents[0].name.rpartition(".")
        return path, f"{path or 'The model'} (its {name})", ""
    return record.place.path, record.place.words, record.place.source


def _came_in(record: Record, reached: tuple[str, ...]) -> Finding:
    detail = record.detail
    if detail is None:
        raise LookupError(f"no detail of {record.operation} {record.name!r}")
    facts = detail.output if record.name else replace(detail.output, name=_FROM_OUTSIDE)
    is_batch = record.operation == "batch"
    reason = batch_reason(facts) if is_batch else parameter_reason(facts)
    path = "" if is_batch else record.name.rpartition(".")[0]
    fault = Fault(
        path=path,
        operation=record.operation if record.operation != "constant" else "parameter",
        direction="forward",
        kind="NaN" if record.nan else "infinity",
        cause=reason.cause,
        cure=reason.cure,
        place="The batch" if is_batch else record.name or _FROM_OUTSIDE,
        inputs=(facts,),
        reached=reached,
    )
    return Finding(record, reason, fault)


def _evidence(record: Record, kind: FaultKind | None) -> Evidence:
    detail = record.detail
    if detail is None:
        raise LookupError(f"no detail of {record.operation} in {record.place.path!r}")
    dtype = str(detail.dtype).removeprefix("torch.")
    found = _NODE.match(record.node)
    node = "" if found is None else found[1].lower()
    return Evidence(
        operation=record.operation.rstrip("_").lstrip("_"),
        node=node,
        direction="backward" if record.node else "forward",
        kind=kind or ("NaN" if record.nan else "infinity"),
        dtype=dtype,
        inputs=detail.inputs,
        output=detail.output,
        wider=detail.wider,
        constants=record.numbers,
        epsilon=_epsilon(record, dtype),
        constant=not record.learns,
    )


def _epsilon(record: Record, dtype: str) -> float | None:
    """A number that was added, or clamped to, shortly before, and is zero in ``dtype``."""
    if dtype not in FORMATS:
        return None
    zero_below = format_of(dtype).smallest_subnormal / 2
    near, seen = [record], {id(record)}
    for _ in range(_MADE_FROM):
        for each in near:
            small = [number for number in each.numbers if 0 < abs(number) <= zero_below]
            if each.operation in _EPSILON_OPERATIONS and small:
                return small[0]
        near = [p for each in near for p in each.parents if id(p) not in seen]
        seen.update(map(id, near))
    return None
