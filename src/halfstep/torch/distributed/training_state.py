"""A model, its optimizer and its loss scale as one object that any number of ranks can save."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

from ...errors import LossScaleError
from ..loss_scaling import LossScaleOptimizer, checkpoint, rests
from ..loss_scaling.gradients import labelled
from ..masters import update_of
from .first_state import state_made

_Wide = list[tuple[Tensor, dict[str, Tensor], dict[str, Any]]]
"""16-bit parameters, with the digits and the optimizer's state of each in a checkpoint."""


class TrainingState:
    """A model and its optimizer as one object for ``torch.distributed.checkpoint``.

    Torch's own ``get_state_dict`` knows an optimizer's ``state`` and ``param_groups`` and drops
    everything else: the loss scale, its counters and its history would start anew. Here they are
    saved beside the two, by the names that torch gives them, so that another number of ranks can
    load them: bit for bit. So are masters and compensations of 16-bit weights, in the state of
    each parameter.

    Args:
        model: the model, sharded or not.
        optimizer: its ``LossScaleOptimizer``, or a plain optimizer. It holds parameters of the
            model, all or some.

    Raises:
        LossScaleError: another kind of argument; and, when it saves or loads, an optimizer with
            parameters that are none of the model's.

    Source: the ``Stateful`` protocol of ``torch.distributed.checkpoint``.

    >>> import tempfile
    >>> import torch.distributed.checkpoint as dcp
    >>> from halfstep.torch import apply_policy
    >>> model = apply_policy(nn.Linear(2, 2), "mixed_float16")
    >>> optimizer = LossScaleOptimizer(torch.optim.AdamW(model.parameters()), 1024)
    >>> sorted(TrainingState(model, optimizer).state_dict())
    ['loss_scale', 'model', 'optimizer', 'stepped']
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(model, nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
            raise LossScaleError(
                "TrainingState(model, optimizer) takes a torch.nn.Module and one "
                f"torch.optim.Optimizer, got a {type(model).__name__} and a "
                f"{type(optimizer).__name__}."
            )
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return what ``dcp.save`` writes: ``model``, ``optimizer`` and ``loss_scale``.

        ``stepped`` says whether the optimizer had state. If not, what stands here is what a
        checkpoint is read into; neither this optimizer nor one that loads it gets it.
        """
        scaling = self._scaling()
        inner = self.optimizer if scaling is None else scaling.inner_optimizer
        self._refuse_strangers(inner)
        with state_made(self.optimizer) as made, rests.shown(inner):
            model, optimizer = get_state_dict(self.model, inner)
        state = {"model": model, "optimizer": optimizer, "stepped": made.stepped}
        if scaling is not None:
            _undo_fusing(scaling, optimizer)
            state[checkpoint.KEY] = checkpoint.to_text(scaling._saved())
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what ``dcp.load`` read.

        The saved loss scale holds from now on, unless one of the two is
        :class:`~halfstep.NoLossScale` and the other is not: then the running one stays, with a
        warning, as in ``LossScaleOptimizer.load_state_dict``.

        Raises:
            LossScaleError: the loss scale in it cannot be read; nothing is changed then.
        """
        scaling = self._scaling()
        inner = self.optimizer if scaling is None else scaling.inner_optimizer
        self._refuse_strangers(inner)
        saved = None if scaling is None else checkpoint.from_text(state_dict.get(checkpoint.KEY))
        with state_made(self.optimizer) as made:
            optimizer, wide = self._split(inner, state_dict["optimizer"])
            set_state_dict(
                self.model,
                inner,
                model_state_dict=state_dict["model"],
                optim_state_dict=optimizer,
            )
            _give(inner, wide)
            made.keep = True
        if not state_dict.get("stepped", True):
            inner.state.clear()
        if scaling is not None and saved is not None:
            saved = checkpoint.continued(saved, scaling.loss_scale)
            scaling._fusion.forget()
            if saved.rule.skips:
                with scaling._wide.lent():
                    scaling._fusion.turn_on()
            scaling._continue_from(saved)

    def _split(
        self, inner: torch.optim.Optimizer, state_dict: dict[str, Any]
    ) -> tuple[dict[str, Any], _Wide]:
        """Split off what belongs to 16-bit weights: torch would load all of it in their dtype."""
        own = [p for group in inner.param_groups for p in group["params"]]
        if all(update_of(parameter) == "plain" for parameter in own):
            return state_dict, []
        groups: Any = get_optimizer_state_dict(self.model, inner)["param_groups"]
        names = [name for group in groups for name in group["params"]]
        state, wide = dict(state_dict["state"]), []
        for name, parameter in zip(names, own, strict=True):
            if update_of(parameter) != "plain" and name in state:
                entries = dict(state[name])
                kept = {key: entries.pop(key) for key in rests.ENTRIES.values() if key in entries}
                state[name] = entries
                wide.append((parameter, kept, entries))
        return {**state_dict, "state": state}, wide

    def _refuse_strangers(self, inner: torch.optim.Optimizer) -> None:
        own = {id(parameter) for parameter in self.model.parameters()}
        for parameter, label in labelled(inner):
            if id(parameter) not in own:
                raise LossScaleError(
                    f"TrainingState: {label}, of this {type(inner).__name__} is no parameter of "
                    f"the {type(self.model).__name__}. The optimizer must hold the model's own, as "
                    "they are after sharding: make it last."
                )

    def _scaling(self) -> LossScaleOptimizer | None:
        return self.optimizer if isinstance(self.optimizer, LossScaleOptimizer) else None


def _give(inner: torch.optim.Optimizer, wide: _Wide) -> None:
    """Give 16-bit weights, which are loaded by now, their digits, and float32 state."""
    rests.give(
        [(parameter, key, rest) for parameter, kept, _ in wide for key, rest in kept.items()]
    )
    for parameter, _, entries in wide:
        state = inner.state[parameter]
        for key in state.keys() & entries.keys():
            value = entries[key]
            if key != "step" and isinstance(value, Tensor):
                state[key] = value.to(parameter.device)


def _undo_fusing(scaling: LossScaleOptimizer, state: dict[str, Any]) -> None:
    """Save the settings that the user chose, not those that hold while the optimizer is wrapped."""
    for group, before in zip(state["param_groups"], scaling._fusion.before, strict=False):
        if before is not None:
            group.update(before)
