"""When a step begins and ends, for every way to take one.

A source tells a listener, without reading anything on the host: here is the loss, now the gradients
are ready and still multiplied by this scale, now the step is over and this is what it found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ...core.loss_scale import DynamicLossScale, FixedLossScale, LossScale
from ...core.numerics.bins import is_power_of_two
from ...errors import PolicyError
from ..eager import never_compiled
from ..loss_scaling import GradScaler, LossScaleOptimizer
from .targets import is_compiled


class Listener(Protocol):
    """What a source tells."""

    def saw_loss(self, loss: Tensor) -> None:
        """Take a loss, unscaled."""

    def gradients_ready(self, optimizer: Optimizer | None, scale: Tensor | None) -> None:
        """Look at the gradients of an optimizer; ``scale`` is what divides them yet."""

    def step_done(self, found: Tensor | None, scale: Tensor | None) -> None:
        """End a step: 1.0 in ``found`` if it was skipped, ``scale`` is the next step's."""


class Steps:
    """A source of steps that there is no optimizer for: each forward of the model begins one.

    A forward under ``no_grad`` begins none. What is between two of them is a step, so that
    gradients must be counted as they are accumulated.
    """

    rule: LossScale | None = None
    """The rule of the loss scale, None without one."""

    announces_gradients = False
    """Whether it tells when the gradients are ready."""

    _begun: Listener | None = None

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = []

    def attach(self, listener: Listener) -> None:
        """Begin to tell ``listener``."""

        def begin(module: nn.Module, args: Any) -> None:
            if not torch.is_grad_enabled():
                return
            if self._begun is not None:
                listener.step_done(None, None)
            self._begun = listener

        self._handles.append(self._model.register_forward_pre_hook(begin))

    def watch_gradients(self, listener: Listener) -> None:
        """Tell when the gradients are ready, in the step that comes."""

    def ignore_gradients(self) -> None:
        """Tell no longer."""

    def finish(self) -> None:
        """End a step that only the next one would end."""
        if self._begun is not None:
            self._begun.step_done(None, None)

    def detach(self) -> None:
        """End telling; nothing of it is left."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._begun = None

    def scale(self) -> Tensor | None:
        """Return what the losses of this step are multiplied by, on its device; None for 1."""
        return None


class OptimizerSteps(Steps):
    """Steps of a plain optimizer, and of one whose loss scale is none."""

    announces_gradients = True

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._handles = []
        self._ready: RemovableHandle | None = None

    def attach(self, listener: Listener) -> None:
        """Begin to tell ``listener``."""

        @never_compiled
        def after(*_: Any) -> None:
            listener.step_done(None, None)

        self._handles.append(self._optimizer.register_step_post_hook(after))

    def watch_gradients(self, listener: Listener) -> None:
        """Tell when the gradients are ready, in the step that comes."""

        # only for that step: loss scaling unscales by a pass of its own where such hooks are
        @never_compiled
        def before(optimizer: Optimizer, *_: Any) -> None:
            # torch.amp lends the scale to fused optimizers, which divide by it in their kernels
            listener.gradients_ready(optimizer, getattr(optimizer, "grad_scale", None))

        self._ready = self._optimizer.register_step_pre_hook(before)

    def ignore_gradients(self) -> None:
        """Tell no longer."""
        if self._ready is not None:
            self._ready.remove()
            self._ready = None

    def detach(self) -> None:
        """End telling; nothing of it is left."""
        super().detach()
        self.ignore_gradients()


class ScaledSteps(Steps):
    """Steps of a `LossScaleOptimizer` that may skip."""

    announces_gradients = True

    def __init__(self, optimizer: LossScaleOptimizer) -> None:
        self._optimizer = optimizer
        self._observer: _Observer | None = None

    @property
    def rule(self) -> LossScale:  # type: ignore[override]
        """The optimizer's rule: loading a state may replace it."""
        return self._optimizer.loss_scale

    def attach(self, listener: Listener) -> None:
        """Begin to tell ``listener``."""
        self._observer = _Observer(listener)
        self._optimizer.observers.append(self._observer)

    def detach(self) -> None:
        """End telling; nothing of it is left."""
        if self._observer in self._optimizer.observers:
            self._optimizer.observers.remove(self._observer)

    def scale(self) -> Tensor | None:
        """Return what the losses of this step are multiplied by."""
        return self._optimizer.scale_tensor


class _Observer:
    def __init__(self, listener: Listener) -> None:
        self.saw_loss = never_compiled(listener.saw_loss)
        self.before_step = never_compiled(listener.gradients_ready)
        self._done = never_compiled(listener.step_done)

    def after_step(self, found: Tensor, state: Tensor) -> None:
        self._done(found, state[0])


class ScalerSteps(Steps):
    """Steps of a ``torch.amp.GradScaler``, or of this library's: from one ``update`` to the next.

    Neither has hooks, so the three methods are replaced on the object while it is watched.
    """

    announces_gradients = True

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self._scaler = scaler

    @property
    def rule(self) -> LossScale | None:  # type: ignore[override]
        """The scaler's rule; upstream's has no floor."""
        scaler = self._scaler
        if not scaler.is_enabled():
            return None
        if isinstance(scaler, GradScaler):
            return scaler.loss_scale
        return DynamicLossScale(
            growth_interval=scaler.get_growth_interval(),
            growth_factor=scaler.get_growth_factor(),
            backoff_factor=scaler.get_backoff_factor(),
            min_scale=2.0**-126,
        )

    def attach(self, listener: Listener) -> None:
        """Begin to tell ``listener``."""
        replaced = {
            "scale": self._scale_telling(listener),
            "step": self._step_telling(listener),
            "update": self._update_telling(listener),
        }
        for name, method in replaced.items():
            object.__setattr__(self._scaler, name, method)

    def detach(self) -> None:
        """End telling; nothing of it is left."""
        for name in ("scale", "step", "update"):
            self._scaler.__dict__.pop(name, None)

    def scale(self) -> Tensor | None:
        """Return what the losses of this step are multiplied by."""
        return self._scaler._scale if self._scaler.is_enabled() else None

    def _scale_telling(self, listener: Listener) -> Callable[[Any], Any]:
        scale = self._scaler.scale

        def scale_and_tell(outputs: Any) -> Any:
            if isinstance(outputs, Tensor):
                listener.saw_loss(outputs)
            return scale(outputs)

        return scale_and_tell

    def _step_telling(self, listener: Listener) -> Callable[..., Any]:
        step = self._scaler.step

        def tell_and_step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            listener.gradients_ready(optimizer, self.scale() if self._scaled(optimizer) else None)
            return step(optimizer, *args, **kwargs)

        return tell_and_step

    def _scaled(self, optimizer: Optimizer) -> bool:
        if not self._scaler.is_enabled():
            return False
        state = self._scaler._per_optimizer_states[id(optimizer)]
        return state["stage"] is torch.amp.grad_scaler.OptState.READY

    def _update_telling(self, listener: Listener) -> Callable[..., None]:
        update = self._scaler.update

        def update_and_tell(*args: Any, **kwargs: Any) -> None:
            found = self._found()
            try:
                update(*args, **kwargs)
            finally:  # LossScaleExhausted is raised here, of a step that was skipped
                listener.step_done(found, self.scale())

        return update_and_tell

    def _found(self) -> Tensor | None:
        flags = [
            flag
            for state in self._scaler._per_optimizer_states.values()
            for flag in state["found_inf_per_device"].values()
        ]
        if not flags:
            return None
        home = flags[0].device
        return torch.stack([flag.to(home).reshape(()) for flag in flags]).amax()


def steps_of(model: nn.Module, optimizer: object) -> Steps:
    """Return the source for what a user steps with.

    Args:
        model: whose forwards count where there is no optimizer.
        optimizer: None, any optimizer, or a GradScaler.

    Raises:
        PolicyError: something else, or a compiled model without an optimizer.
    """
    if optimizer is None:
        if is_compiled(model):
            raise PolicyError(
                "NumericsMonitor(optimizer=None): this model is compiled, and a compiled forward "
                "does not tell when it begins. Pass the optimizer, or the GradScaler."
            )
        return Steps(model)
    if isinstance(optimizer, torch.amp.GradScaler):
        return ScalerSteps(optimizer)
    if isinstance(optimizer, LossScaleOptimizer) and optimizer.loss_scale.skips:
        return ScaledSteps(optimizer)
    if isinstance(optimizer, Optimizer):
        return OptimizerSteps(optimizer)
    raise PolicyError(
        "NumericsMonitor(optimizer=...): it must be a torch.optim.Optimizer, a LossScaleOptimizer, "
        "a GradScaler, or None to count the forwards of the model as steps; this is a "
        f"{type(optimizer).__name__}."
    )


def only_powers_of_two(rule: LossScale | None) -> bool:
    """Whether every scale that a rule makes is a power of two, as those of the defaults are."""
    if isinstance(rule, DynamicLossScale):
        numbers = (
            rule.initial_scale, rule.growth_factor, rule.backoff_factor, rule.min_scale,
            rule.max_scale,
        )  # fmt: skip
    elif isinstance(rule, FixedLossScale):
        numbers = (rule.value,) * 5
    else:
        return True
    return all(map(is_power_of_two, numbers))
