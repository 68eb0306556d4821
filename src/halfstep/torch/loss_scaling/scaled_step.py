"""How a step is scaled, judged and taken: the inside of `LossScaleOptimizer`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ...core.loss_scale import LossScale
from ...errors import LossScaleError, LossScaleExhausted
from . import checkpoint, traced
from .closures import Closure
from .fusion import FusedSwitch
from .gradients import Gradients, Verdict, blame, divide_, gather, groups_of, judge
from .guards import Leftovers, is_watched, refuse_foreign, refuse_more, refuse_scaling
from .history import History, exhausted_message
from .lost import LostUpdates
from .origin import Origin
from .outputs import over_tensors, scaled
from .proxy import OptimizerProxy
from .shard_lending import shards_lent, steps_on_shards
from .spread import Agreement, Flag, agree, judge_together
from .stages import Now, Stage
from .state import ScaleState
from .stepping import Skip, step_now, take_step
from .wide import WideSide

_NOTHING = nullcontext()


class StepObserver(Protocol):
    """What an instrument is told of each step; nothing is read on the host for it."""

    def saw_loss(self, loss: Tensor) -> None:
        """Take a loss before it is scaled."""

    def before_step(self, optimizer: Optimizer, scale: Tensor | None) -> None:
        """Look at the gradients; ``scale`` is what divides them yet, None for nothing."""

    def after_step(self, found: Tensor, state: Tensor) -> None:
        """Take what the step found (1.0: skipped) and the packed state of the scale after it."""


class ScaledStep(OptimizerProxy):
    """An optimizer in front of another one, with a loss scale between the two.

    Everything that happens from `scale` to `step`; construction, saving and the words of other
    libraries are in :class:`~halfstep.torch.LossScaleOptimizer`.
    """

    max_norm: float | None
    process_group: dist.ProcessGroup | None

    def _set_up(
        self,
        optimizer: Optimizer,
        max_norm: float | None,
        process_group: dist.ProcessGroup | None,
        fusion: FusedSwitch,
        saved: checkpoint.Saved,
    ) -> None:
        self._stand_before(optimizer)
        self.max_norm = max_norm
        self.process_group = process_group
        self._agreement = Agreement(optimizer, process_group)
        self._origin = Origin(told=process_group is not None)
        self._fusion = fusion
        self._wide = WideSide(optimizer)
        self._cleared = traced.Cleared(optimizer)
        self._lost: LostUpdates | None = None
        self._guards: list[RemovableHandle] = []
        self._leftovers = Leftovers()
        self.observers: list[StepObserver] = []
        self._continue_from(saved)

    def _continue_from(self, saved: checkpoint.Saved) -> None:
        self._state = ScaleState(saved.rule, saved.state)
        self._history = History(saved.state, saved.history)
        self._now = Now(saved.steps)
        self._leftovers.forget()
        self._unguard()

    @property
    def loss_scale(self) -> LossScale:
        """The rule that makes the scale: a frozen value."""
        return self._state.rule

    @property
    def scale_tensor(self) -> Tensor:
        """What the next loss is multiplied by: 0-dim, on the device; nothing waits for it."""
        return self._scale_now()

    # ------------------------------------------------------------------ scaling

    def scale(self, loss: Any) -> Any:
        """Return the loss times the scale, computed in float32.

        Args:
            loss: a tensor, or a nested list, tuple, dict or other iterable of tensors.

        Returns:
            The same structure; float16 and bfloat16 tensors come back in float32.

        Raises:
            LossScaleError: a loss that does not require grad, or is no floating tensor.
        """
        if not self.loss_scale.skips:
            return loss
        refuse_scaling(self._now.stage is Stage.UNSCALED)
        outputs = over_tensors(loss, self._scaled)
        self._now.stage = Stage.SCALED if self._now.stage is Stage.IDLE else self._now.stage
        return outputs

    def _scaled(self, loss: Tensor) -> Tensor:
        if not loss.requires_grad:
            raise LossScaleError(
                f"A loss of shape {tuple(loss.shape)}, {loss.dtype}, does not require grad: it was "
                "computed under no_grad, detached, or from parameters that are frozen."
            )
        output = scaled(loss, self._scale_now())
        for observer in self.observers:
            observer.saw_loss(loss)
        if self._leftovers and not torch.compiler.is_compiling():
            check: Any = self._leftovers.check(self.inner_optimizer)
            output.register_hook(check)  # type: ignore[no-untyped-call]
        return output

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Scale the loss and run ``backward(**kwargs)`` on it.

        With ``inputs=`` only these tensors receive gradients: where two losses share a graph (a
        GAN), that keeps one optimizer's scale out of the other's gradients.
        """
        self.scale(loss).backward(**kwargs)

    def unscale_(self) -> None:
        """Divide the gradients by the scale now, in place; a second call does nothing.

        `step` does it by itself. Call it before you look at the gradients or change them.

        Raises:
            LossScaleError: gradients that were never scaled. And until the step or `zero_grad`,
                a ``backward`` that adds to the gradients raises: its own would be scaled.
        """
        if not self.loss_scale.skips or self._now.stage is Stage.UNSCALED:
            return
        grads = self._gather()
        if not grads:
            return
        verdict = judge(grads, self._scale_now(), None, self._home())
        if self._wide:
            self._wide.unscaled(lambda: divide_(self._gather(), verdict.divisor))
        else:
            divide_(grads, verdict.divisor)
        self._now.found = verdict.found
        self._now.stage = Stage.UNSCALED
        self._guards = refuse_more(self.inner_optimizer)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the inner optimizer does."""
        self._cleared.clear(set_to_none)
        self._wide.narrow_again()
        self._leftovers.forget()
        self._unguard()
        if self._now.stage is Stage.UNSCALED:
            self._now.stage = Stage.IDLE

    # ------------------------------------------------------------------ stepping

    def _step(self, closure: Closure | None) -> None:
        if is_watched(self) or is_watched(self.inner_optimizer):
            self.unscale_()
        self._before_step(closure)
        before = None if self._lost is None else self._lost.before(self._parameters())
        if self.loss_scale.skips:
            self._decide_and_step()
        else:
            self._clip_and_step()
        if self._lost is not None and before is not None:
            self._lost.after(before, self._now.last_found)
        self._after_step(closure)

    def _decide_and_step(self) -> None:
        grads = self._gather()
        if not grads and not self._agreement.ranks(True):
            traced.refuse_nothing(self.inner_optimizer, self._now.stage is Stage.SCALED)
            self._now.last_found = None
            self._end()
            return
        for observer in self.observers:
            observer.before_step(self, self._scale_now() if self._now.found is None else None)
        if not torch.compiler.is_compiling():
            with self._wide.lent() if self._wide else _NOTHING:
                self._fusion.follow(grads.sparse)
        verdict, flag = self._judge(grads)
        self._take(grads, Skip(flag.found, self._undo.settled()), verdict.divisor)
        if self.max_norm is not None:
            self._now.last_norm = verdict.norm
        self._record(flag)

    def _take(self, grads: Gradients, skip: Skip, divisor: Tensor | None) -> None:
        inner = self.inner_optimizer

        def take(own: Gradients) -> None:
            on_shards = grads.sharded and grads.foreign is None and steps_on_shards(inner)
            with shards_lent(inner) if on_shards else _NOTHING:
                take_step(inner, own, skip, divisor)
                if on_shards:  # the state is placed anew after this
                    self._undo.settled()

        if self._wide:
            self._wide.step(lambda: take(gather(inner)), skip.found)
        else:
            take(grads)

    @contextmanager
    def lost_updates(self) -> Iterator[LostUpdates]:
        """Count the updates that change nothing, in the steps taken inside a ``with`` block.

        Each such step copies and compares all weights; no other step pays for it.

        >>> import torch
        >>> from halfstep.torch import LossScaleOptimizer
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.bfloat16))
        >>> optimizer = LossScaleOptimizer(torch.optim.SGD([weight], lr=1.0), None)
        >>> with optimizer.lost_updates() as lost:
        ...     optimizer.backward((weight * torch.tensor([0.001, 0.1])).sum())
        ...     optimizer.step()
        >>> lost, weight.tolist()
        (LostUpdates(updates=2, lost=1, unseen=1), [1.0, 0.8984375])
        """
        before, self._lost = self._lost, LostUpdates()
        try:
            yield self._lost
        finally:
            self._lost = before

    def _parameters(self) -> list[Tensor]:
        groups = groups_of(self.inner_optimizer)
        return [parameter for group in groups for parameter in group["params"]]

    def _judge(self, grads: Gradients) -> tuple[Verdict, Flag]:
        """Judge the gradients, together with the other ranks that hold some or must agree."""
        ranks = self._agreement.ranks(True)
        if self.max_norm is None or not ranks.norms:
            verdict = self._verdict(grads)
            flag = agree(ranks, verdict.found, *self._origin.tell(grads))
        else:
            before, told = self._now.found, self._origin.tell(grads)
            scale = self._scale_now() if before is None else self._one()
            verdict, flag = judge_together(
                ranks, grads, scale, self.max_norm, self._home(), before, told
            )
        return verdict, self._origin.settle(flag, grads)

    def _verdict(self, grads: Gradients) -> Verdict:
        """Judge the gradients as they are: still scaled, or unscaled and perhaps changed since."""
        if self._now.found is None:
            return judge(grads, self._scale_now(), self.max_norm, self._home())
        if self.max_norm is None:
            return Verdict(self._now.found, None, None)
        verdict = judge(grads, self._one(), self.max_norm, self._home())
        return Verdict(torch.maximum(verdict.found, self._now.found), verdict.divisor, verdict.norm)

    def _record(self, flag: Flag) -> None:
        found = flag.found
        before = self._state.on(found.device).clone() if traced.in_graph(found) else None
        if before is None:
            self._now.steps = self._steps_taken() + 1
        self._now.last_found = found
        packed = self._state.advance(found, flag.taken)
        self._end()
        for observer in self.observers:
            observer.after_step(found, packed)
        if before is not None:
            self._history.record_in_graph(before, packed)
            return
        for row in self._history.record(self._now.steps, packed):
            if self.loss_scale.exhausted(row):
                raise LossScaleExhausted(
                    exhausted_message(self.loss_scale, row, blame(self.inner_optimizer))
                )

    def _steps_taken(self) -> int:
        """Count the steps, those in graphs too; only after such does it wait for the device."""
        self._now.steps = self._history.catch_up(self._now.steps, self._state.packed)
        return self._now.steps

    def _end(self) -> None:
        if self._now.found is not None:
            self._now.found = None
        self._now.stage = Stage.IDLE
        self._origin.forget()
        self._unguard()
        self._wide.narrow_again()
        self._leftovers.note(self.inner_optimizer)

    def _clip_and_step(self) -> None:
        """Clip and step without a scale."""
        inner = self.inner_optimizer
        self._wide.follow()
        if not self._wide:
            self._clip_only()
            step_now(inner)
            return
        divisor = self._clipping()

        def take() -> None:
            divide_(gather(inner, allow_float16=True), divisor)
            step_now(inner)

        self._wide.step(take, None)

    def _clip_only(self) -> None:
        divisor = self._clipping()
        if divisor is not None:
            divide_(gather(self.inner_optimizer, allow_float16=True), divisor)

    def _clipping(self) -> Tensor | None:
        """Return what clips the gradients if they are divided by it.

        What is not finite stays so, as with ``clip_grad_norm_``.
        """
        if self.max_norm is None:
            return None
        grads = gather(self.inner_optimizer, allow_float16=True)
        ranks = self._agreement.ranks(False)
        if ranks.norms:
            verdict, _ = judge_together(ranks, grads, self._one(), self.max_norm, self._home())
        elif not grads:
            return None
        else:
            verdict = judge(grads, self._one(), self.max_norm, self._home())
        self._now.last_norm = verdict.norm
        return verdict.divisor

    # ------------------------------------------------------------------ small parts

    def _home(self) -> torch.device:
        """The device of the parameters, where the state lives."""
        for group in groups_of(self.inner_optimizer):
            for parameter in group["params"]:
                device: torch.device = parameter.device
                return device
        return torch.device("cpu")

    def _scale_now(self) -> Tensor:
        return self._state.on(self._home())[0]

    def _one(self) -> Tensor:
        return torch.ones((), device=self._home())

    def _gather(self) -> Gradients:
        """Return the gradients, or raise before anything is touched."""
        optimizer = self.inner_optimizer
        grads = gather(optimizer)
        if grads.low or self._wide:
            self._wide.follow()
        if grads and self._now.stage is Stage.IDLE:
            self._origin.doubt(grads, self._home())
        if self._now.stage is Stage.SCALED:
            self._origin.forget()
            self._leftovers.refuse_stale()
        refuse_foreign(optimizer, grads)
        return grads

    def _unguard(self) -> None:
        for guard in self._guards:
            guard.remove()
        self._guards = []
