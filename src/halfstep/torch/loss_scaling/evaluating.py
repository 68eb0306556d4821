"""A scaled step that takes a closure, and evaluates it as often as the inner optimizer wants."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import LossScaleError
from .closures import Closure, NotFinite, evaluates_once, step_or_restore
from .gradients import Gradients, divide_
from .scaled_step import ScaledStep
from .spread import Flag
from .stages import Stage


class EvaluatedStep(ScaledStep):
    """The ``step`` of :class:`~halfstep.torch.LossScaleOptimizer`."""

    def step(self, closure: Closure | None = None) -> Any:
        """Unscale, check, clip, and let the inner optimizer step if all gradients are finite.

        Args:
            closure: evaluates the loss, scales it through this optimizer, runs backward, and
                returns the loss (the unscaled one). It is called once, or as often as the inner
                optimizer wants (LBFGS); then each evaluation is unscaled and checked, and one
                that is not finite takes back the whole step.

        Returns:
            What the closure returned first, or None.

        Raises:
            LossScaleError: gradients, and nothing was scaled since the last step.
            LossScaleExhausted: a smaller scale can no longer help. On an accelerator it comes a
                few steps late, because nothing waits for it.
        """
        self._now.called = True
        if closure is not None and not evaluates_once(self.inner_optimizer):
            return self._step_evaluating(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step(closure)
        return loss

    @property
    def _opt_called(self) -> bool:
        # the wrapper that schedulers put around `step` sets it; see the end of this file
        return self._now.called

    @_opt_called.setter
    def _opt_called(self, called: bool) -> None:
        self._now.called = called

    def _step_evaluating(self, closure: Closure) -> Any:
        """Let the inner optimizer evaluate the closure as often as it wants."""
        self._wide.refuse_closure()
        self._undo.settled()
        if not self.loss_scale.skips:
            self._before_step(closure)
            loss: Any = self.inner_optimizer.step(self._evaluation(closure, []))
            self._after_step(closure)
            return loss
        if self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks:
            raise LossScaleError(
                f"{type(self.inner_optimizer).__name__} evaluates its closure itself, so hooks "
                "on the step cannot see its gradients. Register them on inner_optimizer."
            )
        flags: list[Flag] = []
        result = None
        # gradients that were there before belong to the step too (sharpness-aware ones use them)
        if self._ready(Gradients() if self._now.stage is Stage.IDLE else self._gather(), flags):
            result = step_or_restore(self.inner_optimizer, self._evaluation(closure, flags))
        if flags:
            self._record(flags[-1])
        return result

    def _evaluation(self, closure: Closure, flags: list[Flag]) -> Closure:
        def evaluate() -> Any:
            self._unguard()
            self._leftovers.forget()
            self._now.found = None
            self._now.stage = Stage.IDLE
            with torch.enable_grad():
                loss = closure()
            if not self.loss_scale.skips:
                self._clip_only()
            elif not self._ready(self._gather(), flags):
                raise NotFinite
            return loss

        return evaluate

    def _ready(self, grads: Gradients, flags: list[Flag]) -> bool:
        """Unscale and clip the gradients in place; say, by one host read, if they are finite."""
        if not grads and not self._agreement.ranks(True):
            return True
        verdict, flag = self._judge(grads)
        divide_(grads, verdict.divisor)
        self._now.last_norm = verdict.norm if self.max_norm is not None else None
        flags.append(flag)
        return not flag.found.item()


# Schedulers wrap the `step` of each optimizer that does not say that it is wrapped, to warn if they
# are stepped before it; and Dynamo does not trace what they wrap it in.
vars(EvaluatedStep.step)["_wrapped_by_lr_sched"] = True
