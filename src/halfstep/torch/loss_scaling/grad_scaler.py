"""A drop-in for ``torch.amp.GradScaler`` over this library's rule."""

from __future__ import annotations

import weakref
from collections import defaultdict
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ...core.loss_scale import DynamicLossScale, LossScaleState
from ...errors import LossScaleError, LossScaleExhausted
from ..bare_steps import refuse_bare_step
from . import checkpoint
from .closures import closure_in, evaluates_once
from .gradients import Gradients, Verdict, blame, divide_, gather, judge, moved
from .guards import is_watched, refuse_foreign, refuse_more
from .history import History, ScaleEvent, exhausted_message
from .optimizer import LossScaleOptimizer
from .outputs import over_tensors, scaled
from .spread import Agreement, agree
from .state import ScaleState
from .stepping import Skip, take_step
from .upstream import (
    UpstreamFace,
    fitting_scale,
    is_available,
    loaded_from_upstream,
    saved_as_upstream,
)


class GradScaler(UpstreamFace):
    """Scale losses and step optimizers as ``torch.amp.GradScaler`` does, without its faults.

    Methods, return values and errors are upstream's, so that it stands in for it in scripts and
    in trainers that take a ``scaler=``. What differs:

    - the scale keeps to ``[min_scale, max_scale]``; at the floor, when gradients stay not finite,
      ``update()`` raises ``LossScaleExhausted`` instead of turning the weights into NaN;
    - losses are scaled in float32, dicts of losses too; gradients are judged after unscaling;
    - a ``backward()`` between ``unscale_()`` and ``update()`` raises instead of mixing scales;
    - closures work with every optimizer that evaluates them once, and raise with the others;
    - bfloat16 gradients work, float16 parameters are refused for fused optimizers too, an
      optimizer without gradients does nothing, and a step that fused SGD skips first leaves no
      uninitialised momentum;
    - `last_step_skipped`, `skipped_steps` and `scale_history` say what happened;
    - ``scale``, ``unscale_``, ``step`` and ``update`` compile with ``fullgraph=True``.

    One scale for all optimizers is upstream's contract and stays: use one
    :class:`~halfstep.torch.LossScaleOptimizer` each where one's overflow is not the other's.

    Args:
        device: the device type, for instance ``"cuda"`` or ``"cpu"``.
        init_scale: the first scale.
        growth_factor: what it is multiplied by after ``growth_interval`` finite iterations.
        backoff_factor: what it is multiplied by after an iteration that was not finite.
        growth_interval: finite iterations in a row after which it grows.
        enabled: False makes every method pass through.
        min_scale: the floor. Left out, it is 1, or ``init_scale`` if that is smaller.
        max_scale: the ceiling. Left out, it is 2**24, or ``init_scale`` if that is larger.
        hysteresis: bad iterations in a row before the scale is reduced.

    Raises:
        AssertionError: a growth factor of 1 or less, a backoff factor of 1 or more (upstream's).
        LossScaleError: another value that cannot work, such as ``init_scale=-1``.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> optimizer = torch.optim.SGD([weight], lr=0.5)
    >>> scaler = GradScaler("cpu", init_scale=1024.0)
    >>> for bad in (1.0, float("inf")):
    ...     optimizer.zero_grad()
    ...     scaler.scale((weight * weight).sum() * bad).backward()
    ...     _ = scaler.step(optimizer)
    ...     scaler.update()
    ...     print(weight.tolist(), scaler.last_step_skipped, scaler.get_scale())
    [0.0, 0.0] False 1024.0
    [0.0, 0.0] True 512.0
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        min_scale: float | None = None,
        max_scale: float | None = None,
        hysteresis: int = 1,
    ) -> None:
        # upstream's __init__ is left out: what it assigns is read through properties here
        self._device = device
        self._enabled = enabled and is_available(device)
        if self._enabled and growth_factor <= 1.0:
            raise AssertionError("The growth factor must be > 1.0.")
        if self._enabled and backoff_factor >= 1.0:
            raise AssertionError("The backoff factor must be < 1.0.")
        rule = DynamicLossScale()  # of a disabled one: never used, but the getters answer
        if self._enabled:
            rule = DynamicLossScale(
                initial_scale=init_scale,
                growth_interval=growth_interval,
                growth_factor=growth_factor,
                backoff_factor=backoff_factor,
                hysteresis=hysteresis,
                min_scale=min(1.0, init_scale) if min_scale is None else min_scale,
                max_scale=max(2.0**24, init_scale) if max_scale is None else max_scale,
            )
        self._continue_from(checkpoint.fresh(rule))

    def _continue_from(self, saved: checkpoint.Saved) -> None:
        self._state = ScaleState(saved.rule, saved.state)
        self._history = History(saved.state, saved.history)
        self._updates = saved.steps
        self._last_found: Tensor | None = None
        self._guards: dict[int, list[RemovableHandle]] = {}
        self._optimizers = weakref.WeakValueDictionary[int, Optimizer]()
        self._per_optimizer_states = defaultdict(_not_yet_stepped)

    # ------------------------------------------------------------------ scaling

    def scale(self, outputs: Any) -> Any:
        """Return ``outputs`` times the scale, computed in float32.

        Args:
            outputs: a tensor, or a nested list, tuple, dict or other iterable of tensors.

        Raises:
            ValueError: something in it that is no tensor.
        """
        return over_tensors(outputs, self._scaled) if self._enabled else outputs

    def _scaled(self, output: Tensor) -> Tensor:
        return scaled(output, self._state.at(output.device)[0])

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the optimizer's gradients by the scale, in place, and look if they are finite.

        `step` does it by itself. Call it before you clip the gradients or look at them.

        Raises:
            RuntimeError: a second call before ``update()``, or a call after ``step()``. And until
                the step a ``backward`` that adds to these gradients raises.
            AssertionError: nothing was scaled yet.
        """
        if not self._enabled:
            return
        packed = self._started("unscale_")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.UNSCALED:
            raise RuntimeError(
                "unscale_() has already been called on this optimizer since the last update()."
            )
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("unscale_() is being called after step().")
        grads = self._gather(optimizer)
        verdict = self._judge(optimizer, grads, packed)
        if verdict is not None:
            divide_(grads, verdict.divisor)
            state["found_inf_per_device"] = {packed.device: verdict.found}
        state["stage"] = OptState.UNSCALED
        if not torch.compiler.is_compiling():
            self._guards[id(optimizer)] = refuse_more(optimizer)

    # ------------------------------------------------------------------ stepping

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Unscale if that has not been done, and step if all gradients are finite.

        Args:
            optimizer: whose gradients they are.
            args: for ``optimizer.step``.
            kwargs: for ``optimizer.step``; a closure is evaluated first, and must scale its loss.

        Returns:
            What ``optimizer.step`` returned, or the closure; None for a skipped step.

        Raises:
            RuntimeError: a second call before ``update()``, or a closure for an optimizer that
                may evaluate it more than once.
            ValueError: float16 parameters.
            AssertionError: nothing was scaled yet.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        closure = closure_in(args, kwargs)
        if closure is None:
            return self._step(optimizer, args, kwargs)
        if not evaluates_once(optimizer):
            raise LossScaleError(
                "Closure use is not currently supported if GradScaler is enabled: "
                f"{type(optimizer).__name__} may evaluate it several times, and only the first "
                "gradients would be unscaled. LossScaleOptimizer supports it."
            )
        with torch.enable_grad():
            loss = closure()
        self._step(optimizer, (), {})
        return loss

    def _step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        packed = self._started("step")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        if state["stage"] is OptState.READY and is_watched(optimizer):
            self.unscale_(optimizer)
        grads = self._gather(optimizer)
        verdict = self._verdict(optimizer, grads, state, packed)
        result = None
        if verdict is not None:
            skip = Skip(verdict.found)
            result = take_step(optimizer, grads, skip, verdict.divisor, *args, **kwargs)
            state["found_inf_per_device"] = {packed.device: verdict.found}
        self._last_found = None if verdict is None else verdict.found
        state["stage"] = OptState.STEPPED
        self._unguard(id(optimizer))
        if not torch.compiler.is_compiling():
            self._optimizers[id(optimizer)] = optimizer
        return result

    def _verdict(
        self, optimizer: Optimizer, grads: Gradients, state: dict[str, Any], packed: Tensor
    ) -> Verdict | None:
        if state["stage"] is OptState.READY:
            return self._judge(optimizer, grads, packed)
        for found in state["found_inf_per_device"].values():
            return Verdict(found, None, None)
        return None

    def _judge(self, optimizer: Optimizer, grads: Gradients, packed: Tensor) -> Verdict | None:
        """Judge the gradients, of DTensors with all ranks that hold a part.

        None without gradients: then there is nothing to decide, and nothing to do.
        """
        ranks = Agreement(optimizer, None).ranks(skips=False)
        verdict = judge(grads, packed[0], None, packed.device) if grads or ranks else None
        if verdict is not None and ranks:
            found = agree(ranks, verdict.found, bool(grads)).found
            verdict = replace(verdict, found=found)
        return verdict

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Make the next scale from what the optimizers of this iteration met.

        Args:
            new_scale: set the scale to this number or one-element tensor instead.

        Raises:
            AssertionError: no optimizer was stepped or unscaled, or a tensor that does not fit.
            LossScaleError: a number outside of ``[min_scale, max_scale]``.
            LossScaleExhausted: a smaller scale can no longer help. On an accelerator it comes a
                few iterations late, because nothing waits for it.
        """
        if not self._enabled:
            return
        packed = self._started("update")
        if new_scale is not None:
            self._state.set_scale(fitting_scale(new_scale, self._rule, self._device))
        elif not self._per_optimizer_states:
            raise AssertionError("No inf checks were recorded prior to update.")
        else:
            self._advance(packed)
        self._unguard_all()
        self._per_optimizer_states = defaultdict(_not_yet_stepped)

    def _advance(self, packed: Tensor) -> None:
        flags = [
            moved(found, packed.device)
            for state in self._per_optimizer_states.values()
            for found in state["found_inf_per_device"].values()
        ]
        if not flags:
            return
        self._state.advance(flags[0] if len(flags) == 1 else torch.stack(flags).amax())
        self._updates += 1
        if torch.compiler.is_compiling():
            return
        for row in self._history.record(self._updates, packed):
            if self._state.rule.exhausted(row):
                self._give_up(row)

    def _give_up(self, row: LossScaleState) -> NoReturn:
        self._per_optimizer_states = defaultdict(_not_yet_stepped)
        alive = self._optimizers.values()
        blamed = "; ".join(f"{type(found).__name__}: {blame(found)}" for found in alive)
        raise LossScaleExhausted(exhausted_message(self._state.rule, row, blamed))

    # ------------------------------------------------------------------ what it did

    @property
    def last_step_skipped(self) -> bool:
        """Whether the last ``step()`` left the parameters alone. It waits for the device."""
        return self._last_found is not None and bool(self._last_found.item())

    @property
    def skipped_steps(self) -> int:
        """In how many iterations a step was skipped. Reading it waits for the device."""
        return int(self._state.read().skipped_steps)

    @property
    def scale_history(self) -> list[ScaleEvent]:
        """Every iteration that was skipped or changed the scale. Reading it waits for the device.

        ``step`` counts the calls of ``update()`` from 1; those inside ``torch.compile`` are left
        out, since nothing can be read there.
        """
        self._history.drain()
        return list(self._history.events)

    @property
    def loss_scale(self) -> DynamicLossScale:
        """The rule that makes the scale: a frozen value."""
        return self._rule

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """Return upstream's five entries and this class's own; ``{}`` if disabled.

        >>> sorted(GradScaler("cpu").state_dict())[:4]
        ['_growth_tracker', 'backoff_factor', 'bad_steps', 'growth_factor']
        """
        if not self._enabled:
            return {}
        return saved_as_upstream(self._rule, self._state.read())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state of this class or of ``torch.amp.GradScaler``.

        A scale outside of the limits, as upstream may have saved one, is cut to them.

        Raises:
            RuntimeError: an empty state.
            LossScaleError: values that cannot work; everything stays as it was.
        """
        if not self._enabled:
            return
        if not state_dict:
            raise RuntimeError(
                "The source state dict is empty, possibly because it was saved "
                "from a disabled instance of GradScaler."
            )
        rule, state = loaded_from_upstream(state_dict, self._rule)
        self._unguard_all()
        self._continue_from(checkpoint.Saved(rule, state, self._updates, []))

    def __getstate__(self) -> dict[str, Any]:
        if self._per_optimizer_states:
            raise AssertionError(
                "A GradScaler instance may only be pickled at the beginning "
                "of an iteration, or at the end after scaler.update()."
            )
        saved = checkpoint.Saved(self._rule, self._state.read(), self._updates, self.scale_history)
        return {"device": self._device, "enabled": self._enabled, "saved": saved}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._device, self._enabled = state["device"], state["enabled"]
        self._continue_from(state["saved"])

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[str, Any]:
        packed = self._started("_check_inf_per_device")
        verdict = self._judge(optimizer, self._gather(optimizer), packed)
        found = torch.zeros_like(packed[0]) if verdict is None else verdict.found
        flags: dict[Any, Any] = {packed.device: found}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = flags
        return flags

    # ------------------------------------------------------------------ small parts

    def _started(self, name: str) -> Tensor:
        """Return the packed state, or raise upstream's error if nothing was scaled yet."""
        packed = self._state.packed
        if packed is None:
            raise AssertionError(
                f"Attempted {name} but _scale is None.  This may indicate your script did not use "
                "scaler.scale(loss or outputs) earlier in the iteration."
            )
        return packed

    def _gather(self, optimizer: Optimizer) -> Gradients:
        if isinstance(optimizer, LossScaleOptimizer):
            raise LossScaleError(
                "GradScaler.step(LossScaleOptimizer): it has a scale of its own, and the gradients "
                "would be unscaled twice. Use its step(), or the inner optimizer with this scaler."
            )
        grads = gather(optimizer)
        if grads.low:
            refuse_bare_step(optimizer)
        refuse_foreign(optimizer, grads)
        return grads

    def _unguard(self, key: int) -> None:
        for guard in self._guards.pop(key, ()):
            guard.remove()

    def _unguard_all(self) -> None:
        for key in list(self._guards):
            self._unguard(key)


def _not_yet_stepped() -> dict[str, Any]:
    return {"stage": OptState.READY, "found_inf_per_device": {}}
