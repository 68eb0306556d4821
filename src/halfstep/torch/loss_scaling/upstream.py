"""The face of ``torch.amp.GradScaler``: its getters, its saved state, and what others read inside.

Trainers and workarounds in scripts read upstream's private attributes, and some assign to
``_scale``; here they are views of this library's rule and state.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ...core.loss_scale import DynamicLossScale, LossScaleState
from ...errors import LossScaleError
from .state import ScaleState

_LIMITS = ("min_scale", "max_scale", "hysteresis")


class UpstreamFace(torch.amp.GradScaler):
    """What `GradScaler` answers of its rule and its state in upstream's words."""

    _state: ScaleState

    def get_scale(self) -> float:
        """Return the scale, 1.0 if disabled. It waits for the device."""
        return float(self._state.read().scale) if self._enabled else 1.0

    def set_growth_factor(self, new_factor: float) -> None:
        """Set the growth factor."""
        self._rule = replace(self._rule, growth_factor=new_factor)

    def set_backoff_factor(self, new_factor: float) -> None:
        """Set the backoff factor."""
        self._rule = replace(self._rule, backoff_factor=new_factor)

    def set_growth_interval(self, new_interval: int) -> None:
        """Set the growth interval."""
        self._rule = replace(self._rule, growth_interval=new_interval)

    @property
    def _rule(self) -> DynamicLossScale:
        return cast(DynamicLossScale, self._state.rule)

    @_rule.setter
    def _rule(self, rule: DynamicLossScale) -> None:
        self._state.rule = rule

    @property
    def _scale(self) -> Tensor | None:
        packed = self._state.packed
        return None if packed is None else packed[0]

    @_scale.setter
    def _scale(self, value: Tensor | None) -> None:
        if value is not None:
            self._state.set_scale(value)

    @property
    def _growth_tracker(self) -> Tensor | None:  # type: ignore[override]
        packed = self._state.packed
        return None if packed is None else packed[1]

    @property
    def _init_scale(self) -> float:  # type: ignore[override]
        return self._rule.initial_scale

    @property
    def _growth_factor(self) -> float:  # type: ignore[override]
        return self._rule.growth_factor

    @property
    def _backoff_factor(self) -> float:  # type: ignore[override]
        return self._rule.backoff_factor

    @property
    def _growth_interval(self) -> int:  # type: ignore[override]
        return self._rule.growth_interval

    def _get_growth_tracker(self) -> int:
        return int(self._state.read().finite_steps) if self._enabled else 0


def saved_as_upstream(rule: DynamicLossScale, state: LossScaleState) -> dict[str, Any]:
    """Return upstream's five entries and this library's own."""
    return {
        "scale": float(state.scale),
        "growth_factor": rule.growth_factor,
        "backoff_factor": rule.backoff_factor,
        "growth_interval": rule.growth_interval,
        "_growth_tracker": int(state.finite_steps),
        "min_scale": rule.min_scale,
        "max_scale": rule.max_scale,
        "hysteresis": rule.hysteresis,
        "bad_steps": int(state.bad_steps),
        "skipped_steps": int(state.skipped_steps),
    }


def loaded_from_upstream(
    saved: dict[str, Any], rule: DynamicLossScale
) -> tuple[DynamicLossScale, LossScaleState]:
    """Return the rule and the state that were saved; what upstream does not save is ``rule``'s.

    Raises:
        LossScaleError: values that cannot work.
    """
    if not float(saved["scale"]) >= 0:
        raise LossScaleError(
            f"load_state_dict: the scale is {saved['scale']!r}, it must be a number >= 0."
        )
    rule = replace(
        rule,
        **{name: saved[name] for name in _LIMITS if name in saved},
        growth_factor=saved["growth_factor"],
        backoff_factor=saved["backoff_factor"],
        growth_interval=saved["growth_interval"],
    )
    state = LossScaleState(
        scale=min(max(float(saved["scale"]), rule.min_scale), rule.max_scale),
        finite_steps=float(saved["_growth_tracker"]),
        bad_steps=float(saved.get("bad_steps", 0)),
        skipped_steps=float(saved.get("skipped_steps", 0)),
    )
    return rule, state


def fitting_scale(new_scale: float | Tensor, rule: DynamicLossScale, device: str) -> float | Tensor:
    """Return a scale that ``update(new_scale)`` may set.

    Raises:
        AssertionError: a tensor that upstream refuses.
        LossScaleError: a number outside of the rule's limits.
    """
    if isinstance(new_scale, Tensor):
        fits = new_scale.numel() == 1 and not new_scale.requires_grad
        if not fits or new_scale.device.type != device:
            raise AssertionError(
                "new_scale should be a float or a 1-element torch.cuda.FloatTensor or "
                "torch.FloatTensor with requires_grad=False."
            )
        # cut to the limits on the device: its value is not read here
        return new_scale.detach().reshape(()).float().clamp(rule.min_scale, rule.max_scale)
    if not rule.min_scale <= new_scale <= rule.max_scale:
        raise LossScaleError(
            f"update(new_scale={new_scale!r}): it must be from min_scale={rule.min_scale} to "
            f"max_scale={rule.max_scale}."
        )
    return float(new_scale)


def is_available(device: str) -> bool:
    """Whether there is such a device; upstream's warning where there is no CUDA."""
    if device == "cuda" and not torch.cuda.is_available():
        warnings.warn(
            "torch.cuda.amp.GradScaler is enabled, but CUDA is not available.  Disabling.",
            stacklevel=3,
        )
        return False
    return True
