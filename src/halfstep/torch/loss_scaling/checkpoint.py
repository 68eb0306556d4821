"""The saved form of a loss scale: plain values, so that ``weights_only=True`` loads them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...core.loss_scale import LossScale, LossScaleState, loss_scale_from_config
from ...errors import LossScaleError
from .history import ScaleEvent

KEY = "loss_scale"
"""Where it stands in an optimizer's state dict, beside ``state`` and ``param_groups``."""

SAVED_EVENTS = 256
"""The newest events that a checkpoint carries."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says about a loss scale."""

    rule: LossScale
    state: LossScaleState
    steps: int
    history: list[ScaleEvent]


def fresh(rule: LossScale) -> Saved:
    """Return what there is before the first step."""
    return Saved(rule, LossScaleState(*(float(value) for value in rule.init(float))), 0, [])


def to_plain(saved: Saved) -> dict[str, Any]:
    """Return ``saved`` as plain dicts, lists and numbers.

    >>> from halfstep import FixedLossScale
    >>> to_plain(fresh(FixedLossScale(8)))["state"]
    {'scale': 8.0, 'finite_steps': 0.0, 'bad_steps': 0.0, 'skipped_steps': 0.0}
    """
    return {
        "config": saved.rule.get_config(),
        "state": {name: float(value) for name, value in saved.state._asdict().items()},
        "steps": saved.steps,
        "history": [list(event) for event in saved.history[-SAVED_EVENTS:]],
    }


def taken_out(state_dict: dict[str, Any]) -> Any:
    """Remove the loss scale's entry of an optimizer's state dict and return it, or None.

    Raises:
        LossScaleError: it is the state dict of a ``GradScaler``.
    """
    if "param_groups" not in state_dict and {"scale", "growth_factor"} <= state_dict.keys():
        scale = state_dict["scale"]
        raise LossScaleError(
            "load_state_dict: this is the state of a GradScaler, not of an optimizer. Begin at its "
            f"scale, LossScaleOptimizer(optimizer, DynamicLossScale(initial_scale={scale})), and "
            "load the optimizer's own state; halfstep.torch.GradScaler loads this one as it is."
        )
    return state_dict.pop(KEY, None)


def from_plain(entry: Any) -> Saved:
    """Return what `to_plain` wrote.

    Raises:
        LossScaleError: something else, with what is missing.
    """
    if not isinstance(entry, Mapping) or not {"config", "state", "steps"} <= set(entry):
        raise LossScaleError(
            f"state_dict[{KEY!r}] must hold 'config', 'state' and 'steps', got "
            f"{sorted(entry) if isinstance(entry, Mapping) else entry!r}."
        )
    rule = loss_scale_from_config(entry["config"])
    try:
        state = LossScaleState(**{name: float(value) for name, value in entry["state"].items()})
        steps = int(entry["steps"])
        history = [ScaleEvent(int(a), float(b), bool(c)) for a, b, c in entry.get("history", ())]
    except (TypeError, ValueError, AttributeError) as error:
        raise LossScaleError(f"state_dict[{KEY!r}] cannot be read: {error}.") from None
    if not (0 < state.scale < float("inf") and min(state) >= 0):
        raise LossScaleError(
            f"state_dict[{KEY!r}]['state'] is {entry['state']!r}: the scale must be positive and "
            "finite, and no count below 0."
        )
    return Saved(rule, state, steps, history)


def to_text(saved: Saved) -> str:
    """Return `to_plain` as one JSON text.

    ``torch.distributed.checkpoint`` takes a dict apart, and reads only what the running loss scale
    has entries for: one of another kind could not be loaded.
    """
    return json.dumps(to_plain(saved))


def from_text(text: Any) -> Saved:
    """Return what `to_text` wrote, or `to_plain`.

    Raises:
        LossScaleError: something else.
    """
    if not isinstance(text, str):
        return from_plain(text)
    try:
        return from_plain(json.loads(text))
    except json.JSONDecodeError as error:
        raise LossScaleError(f"state_dict[{KEY!r}] is no JSON: {error}.") from None


def continued(saved: Saved | None, own: LossScale) -> Saved:
    """Return what a run with the loss scale ``own`` goes on with.

    That is what was saved, unless it was saved without a loss scale, or of the two one alone skips
    steps: a float16 run that goes on in bfloat16 does not get its scale back.

    Args:
        saved: of a checkpoint; None if that says nothing about a loss scale.
        own: of the optimizer that loads.
    """
    if saved is None:
        warnings.warn(
            "This state dict is of a bare optimizer: it holds no loss scale, which starts "
            f"anew at {own.first_scale}.",
            stacklevel=3,
        )
        return fresh(own)
    if saved.rule.skips != own.skips:
        warnings.warn(
            f"The saved loss scale was {saved.rule}; this optimizer keeps {own}.", stacklevel=3
        )
        return fresh(own)
    return saved
