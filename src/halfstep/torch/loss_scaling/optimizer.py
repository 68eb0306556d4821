"""An optimizer with a loss scale of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ...core.loss_scale import DynamicLossScale, LossScale, as_loss_scale
from ...errors import LossScaleError
from ..masters import update_of
from ..registry import loss_scale_of
from . import checkpoint, rests
from .evaluating import EvaluatedStep
from .fusion import FusedSwitch
from .gradients import judge, moved, refuse_float16, widened
from .history import ScaleEvent
from .scaled_step import ScaledStep
from .stages import Stage
from .undoing import Undo, Where
from .wide import gradient_dtype, put_gradient


class LossScaleOptimizer(EvaluatedStep):
    r"""Wrap an optimizer, so that losses are scaled, and gradients unscaled, checked and clipped.

    ::

        scaled loss = loss * scale                          # in float32
        g           = gradients of the scaled loss
        norm        = |g| / scale                           # one pass over the gradients
        if norm is finite (on every rank of process_group):
            optimizer.step() with g / scale * min(1, max_norm / (norm + 1e-6))
        else:
            the parameters and the optimizer's state stay as they are
        scale       = loss_scale.update(...)                # core.loss_scale, the one rule

    With Adam, AdamW, SGD and Adagrad nothing of this is read on the host: their fused kernels
    are turned on while they are wrapped, and unscale, clip and skip on the device. Every other
    optimizer reads one flag a step, unless ``skip="device"``.

    Scaled gradients stand in ``.grad`` between ``backward`` and ``step``. Call `unscale_` before
    you look at them or change them yourself. Step hooks see them unscaled, on this object and on
    the inner optimizer.

    Args:
        optimizer: any ``torch.optim.Optimizer`` with float32 (or bfloat16, float64, complex)
            parameters.
        loss_scale: ``"dynamic"``, a positive number (fixed), or a :class:`~halfstep.LossScale`.
            Left out, it is the one that the policies of these parameters want
            (:func:`~halfstep.torch.apply_policy`), and dynamic if they have none.
        max_norm: clip the unscaled gradients to this 2-norm, as
            ``torch.nn.utils.clip_grad_norm_`` does. None does not clip. Of DTensors it is the
            norm of the whole gradients, over all ranks of their mesh.
        process_group: agree with the other ranks of this group on skipping: one rank's overflow
            skips the step on all. ``DistributedDataParallel`` needs none, since its gradients
            are equal on all ranks by construction; neither do DTensors on a mesh of all
            processes. A loss need be scaled on one of the ranks only, as in a pipeline, whose last
            stage has it. It does not change what the norm is of.
        skip: where it is decided to leave a step out. ``"auto"``: on the device by the fused
            kernels, and by one flag read on the host with optimizers that have none.
            ``"device"``: without a read, but for what cannot be put back (LBFGS, differentiable
            optimizers, state of unknown kinds; a warning names it). Where there are no fused
            kernels the step is taken, and what it changed is put back on the device: that needs
            memory for a copy of what the step changes (parameters and state) until it is over,
            and reads and writes each of their bytes 9 times. ``"host"``: by one flag read in each
            step; the optimizer keeps its own kernels. Inside ``torch.compile`` and the capture of
            a CUDA graph, where nothing can be read, all three are decided on the device. It is no
            part of the ``state_dict``.

    Raises:
        LossScaleError: an optimizer that is none, or is wrapped already; float16 parameters; a
            ``max_norm`` that is not positive; another ``skip``.
        PolicyError: parameters whose policies want different loss scales.

    Source: Micikevicius et al. 2017, "Mixed Precision Training", arXiv:1710.03740, section 3.2.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> optimizer = LossScaleOptimizer(torch.optim.SGD([weight], lr=0.5), 1024, max_norm=10.0)
    >>> for bad in (1.0, float("inf")):
    ...     optimizer.zero_grad()
    ...     optimizer.backward((weight * weight).sum() * bad)
    ...     optimizer.step()
    ...     print(weight.tolist(), optimizer.last_step_skipped)
    [0.0, 0.0] False
    [0.0, 0.0] True
    >>> optimizer.scale_history
    [ScaleEvent(step=2, scale=1024.0, skipped=True)]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        loss_scale: LossScale | float | str | None = None,
        *,
        max_norm: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        skip: Where = "auto",
    ) -> None:
        _check_optimizer(optimizer)
        if skip not in get_args(Where):
            allowed = ", ".join(map(repr, get_args(Where)))
            raise LossScaleError(f"LossScaleOptimizer(skip={skip!r}): it must be one of {allowed}.")
        _check_max_norm(max_norm)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if loss_scale is None:
            wanted = loss_scale_of(parameters)
            rule = DynamicLossScale() if wanted is None else wanted
        else:
            rule = as_loss_scale(loss_scale)
        self._undo = Undo(skip)
        fusion = FusedSwitch(optimizer, wanted=self._undo.by_kernels)
        self._set_up(optimizer, max_norm, process_group, fusion, checkpoint.fresh(rule))
        self._wide.settled_scale = rule.skips or loss_scale is not None
        if rule.skips:
            refuse_float16(optimizer)
            with self._wide.lent():
                fusion.turn_on()

    # ------------------------------------------------------------------ the inner optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to the inner optimizer.

        Raises:
            LossScaleError: float16 parameters; the group is not added then.
        """
        self.inner_optimizer.add_param_group(param_group)
        self._wide.follow()
        self._cleared.follow()
        if not self.loss_scale.skips:
            return
        try:
            refuse_float16(self.inner_optimizer)
        except LossScaleError:
            self.inner_optimizer.param_groups.pop()
            self._wide.follow()
            self._cleared.follow()
            raise
        with self._wide.lent():
            self._fusion.turn_on()

    def __repr__(self) -> str:
        clip = "" if self.max_norm is None else f", max_norm={self.max_norm}"
        skip = "" if self.skip == "auto" else f", skip={self.skip!r}"
        return f"{type(self).__name__}({self.inner_optimizer!r}, {self.loss_scale!r}{clip}{skip})"

    @property
    def skip(self) -> Where:
        """Where it is decided to leave a step out: ``"auto"``, ``"device"`` or ``"host"``."""
        return self._undo.where

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's state, the very object.

        With ``skip="device"``, looking at it after a step that made state, or counted on the
        host, waits for the device; `inner_optimizer.state` does not, and such entries may
        be those of a step that is being skipped.
        """
        self._undo.settled()
        return self.inner_optimizer.state

    # ------------------------------------------------------------------ what it did

    @property
    def current_scale(self) -> float:
        """What the next loss is multiplied by. Reading it waits for the device."""
        return float(self._state.read().scale)

    @property
    def last_step_skipped(self) -> bool:
        """Whether the last ``step()`` left the parameters alone. Reading it waits for the device.

        Hold back a scheduler with it: ``if not optimizer.last_step_skipped: scheduler.step()``.
        """
        self._undo.settled()
        return self._now.last_found is not None and bool(self._now.last_found.item())

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped in all. Reading it waits for the device."""
        return int(self._state.read().skipped_steps)

    @property
    def last_grad_norm(self) -> Tensor | None:
        """The 2-norm of the unscaled gradients before clipping: a 0-dim tensor on the device.

        None without ``max_norm``, and before the first step.
        """
        return self._now.last_norm

    @property
    def scale_history(self) -> list[ScaleEvent]:
        """Every step that was skipped or changed the scale. Reading it waits for the device."""
        self._steps_taken()
        self._history.drain()
        return list(self._history.events)

    # ------------------------------------------------------------------ the Keras words

    def get_scaled_loss(self, loss: Any) -> Any:
        """Return the scaled loss: the Keras word for `scale`."""
        return self.scale(loss)

    def get_unscaled_gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of a scaled loss, unscaled, as new tensors.

        Args:
            grads: what ``torch.autograd.grad(optimizer.get_scaled_loss(loss), ...)`` gave; None
                stays None.

        Returns:
            A list of the same length; float16 and bfloat16 gradients come back in float32.
        """
        if not self.loss_scale.skips:
            return list(grads)
        scale = self._scale_now()
        return [
            None if grad is None else widened(grad) / moved(scale, grad.device) for grad in grads
        ]

    def apply_gradients(self, grads_and_params: Iterable[tuple[Tensor | None, Tensor]]) -> None:
        """Step with these *unscaled* gradients: check them, clip them, skip if one is not finite.

        What stands in ``.grad`` is neither used nor changed.

        Args:
            grads_and_params: pairs of a gradient (or None) and its parameter.

        Raises:
            LossScaleError: a parameter that this optimizer does not have.
            LossScaleExhausted: as in `step`.

        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = LossScaleOptimizer(torch.optim.SGD([weight], lr=0.5), 1024)
        >>> loss = (weight * weight).sum()
        >>> scaled = torch.autograd.grad(optimizer.get_scaled_loss(loss), [weight])
        >>> grads = optimizer.get_unscaled_gradients(scaled)
        >>> optimizer.apply_gradients(zip(grads, [weight]))
        >>> weight.tolist()
        [0.0]
        """
        with self._gradients_lent(list(grads_and_params)), torch.no_grad():
            self._unguard()
            if self.loss_scale.skips:
                self._now.stage = Stage.UNSCALED
                self._now.found = judge(self._gather(), self._one(), None, self._home()).found
            self._step(None)

    @contextmanager
    def _gradients_lent(self, pairs: list[tuple[Tensor | None, Tensor]]) -> Iterator[None]:
        own = self._parameters()
        known = {id(parameter) for parameter in own}
        for place, (_, parameter) in enumerate(pairs):
            if id(parameter) not in known:
                raise LossScaleError(
                    f"apply_gradients: the parameter of pair {place}, shape "
                    f"{tuple(parameter.shape)}, is not one of this optimizer's {len(own)}."
                )
        before = [(parameter.grad, gradient_dtype(parameter)) for parameter in own]
        try:
            self._cleared.clear(set_to_none=True)
            for grad, parameter in pairs:
                # a copy: the step clips and unscales in place
                if grad is not None:
                    dtype = parameter.dtype if update_of(parameter) == "plain" else torch.float32
                    put_gradient(parameter, grad.detach().to(dtype, copy=True), dtype)
            yield
        finally:
            for parameter, (grad, kept) in zip(own, before, strict=True):
                put_gradient(parameter, grad, kept)
            self._now.found = None
            self._now.stage = Stage.IDLE
            self._leftovers.forget()  # what was lent is gone

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """Return everything that continues the run: ``state``, ``param_groups``, ``loss_scale``.

        The first two are what the bare optimizer would save, so that it can load them too.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._undo.settled()
        with self._wide.lent():
            state_dict = self._fusion.honest(self.inner_optimizer.state_dict())
        if self._wide:
            state_dict = rests.with_rests(self.inner_optimizer, state_dict)
        state_dict[checkpoint.KEY] = checkpoint.to_plain(self._saved())
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state. A failing load leaves everything as it was.

        The saved loss scale holds from now on, unless one of the two is
        :class:`~halfstep.NoLossScale` and the other is not: a run that goes on in bfloat16 keeps
        its own.

        Args:
            state_dict: of `state_dict`, or of the bare optimizer (with a warning: its loss scale
                starts anew).

        Raises:
            LossScaleError: a ``loss_scale`` entry that cannot be read, or a ``GradScaler``'s state.
            ValueError: what the inner optimizer raises where the groups do not fit.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else dict(changed)
        entry = checkpoint.taken_out(state_dict)
        saved = None if entry is None else checkpoint.from_plain(entry)
        saved = checkpoint.continued(saved, self.loss_scale)
        state_dict, digits = rests.split(self.inner_optimizer, state_dict)
        with self._wide.lent():
            self._load_inner(state_dict)
        rests.give(digits)
        self._continue_from(saved)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _saved(self) -> checkpoint.Saved:
        state = self._state.read()
        return checkpoint.Saved(self.loss_scale, state, self._steps_taken(), self.scale_history)

    def _load_inner(self, state_dict: dict[str, Any]) -> None:
        inner = self.inner_optimizer
        self._undo.settled()
        # loading replaces these two objects, so that keeping them is enough to go back
        before = inner.state, inner.param_groups
        try:
            inner.load_state_dict(state_dict)
        except BaseException:
            inner.state, inner.param_groups = before
            raise
        self._fusion.forget()
        if self.loss_scale.skips:
            self._fusion.turn_on()

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise LossScaleError(
                "A LossScaleOptimizer with a process_group cannot be pickled or copied: the group "
                "belongs to this process. Save its state_dict() instead."
            )
        self._undo.settled()
        return {
            "inner_optimizer": self.inner_optimizer,
            "max_norm": self.max_norm,
            "skip": self.skip,
            "saved": self._saved(),
            "fused_before": self._fusion.before,
            "kept": rests.to_copy(self.inner_optimizer),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        inner, saved = state["inner_optimizer"], state["saved"]
        rests.from_copy(state["kept"])
        self._undo = Undo(state["skip"])
        fusion = FusedSwitch(inner, state["fused_before"], self._undo.by_kernels)
        self._set_up(inner, state["max_norm"], None, fusion, saved)
        if saved.rule.skips:
            with self._wide.lent():
                fusion.turn_on()


def _check_max_norm(max_norm: Any) -> None:
    known = max_norm is None or isinstance(max_norm, (Real, Tensor))
    if not known or (max_norm is not None and not max_norm > 0):
        raise LossScaleError(
            f"LossScaleOptimizer(max_norm={max_norm!r}): it must be positive, a number; or None, "
            "which does not clip."
        )


def _check_optimizer(optimizer: object) -> None:
    if isinstance(optimizer, ScaledStep):
        raise LossScaleError(
            "This optimizer is wrapped in a LossScaleOptimizer already: its gradients would be "
            "unscaled twice."
        )
    if not isinstance(optimizer, Optimizer):
        raise LossScaleError(
            f"LossScaleOptimizer takes a torch.optim.Optimizer, got a {type(optimizer).__name__}."
        )
