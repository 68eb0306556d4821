"""A model, its optimizer and its loss scale as one object that any number of ranks can save."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ..loss_scaling import LossScaleOptimizer, checkpoint


class TrainingState:
    """A model and its optimizer as one object for ``torch.distributed.checkpoint``.

    Torch's own ``get_state_dict`` knows an optimizer's ``state`` and ``param_groups`` and drops
    everything else: the loss scale, its counters and its history would start anew. Here they are
    saved beside the two, by the names that torch gives them, so that another number of ranks can
    load them: bit for bit.

    Args:
        model: the model, sharded or not.
        optimizer: its ``LossScaleOptimizer``, or a plain optimizer.

    Source: the ``Stateful`` protocol of ``torch.distributed.checkpoint``.

    >>> import tempfile
    >>> import torch.distributed.checkpoint as dcp
    >>> from halfstep.torch import apply_policy
    >>> model = apply_policy(nn.Linear(2, 2), "mixed_float16")
    >>> optimizer = LossScaleOptimizer(torch.optim.AdamW(model.parameters()), 1024)
    >>> sorted(TrainingState(model, optimizer).state_dict())
    ['loss_scale', 'model', 'optimizer']
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return what ``dcp.save`` writes: ``model``, ``optimizer`` and ``loss_scale``."""
        scaling = self._scaling()
        inner = self.optimizer if scaling is None else scaling.inner_optimizer
        model, optimizer = get_state_dict(self.model, inner)
        state = {"model": model, "optimizer": optimizer}
        if scaling is not None:
            _undo_fusing(scaling, optimizer)
            state[checkpoint.KEY] = checkpoint.to_plain(scaling._saved())
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what ``dcp.load`` read.

        Raises:
            LossScaleError: the loss scale in it cannot be read; nothing is changed then.
        """
        scaling = self._scaling()
        saved = None if scaling is None else checkpoint.from_plain(state_dict.get(checkpoint.KEY))
        set_state_dict(
            self.model,
            self.optimizer if scaling is None else scaling.inner_optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )
        if scaling is not None and saved is not None:
            scaling._fusion.forget()
            if saved.rule.skips:
                scaling._fusion.turn_on()
            scaling._continue_from(saved)

    def _scaling(self) -> LossScaleOptimizer | None:
        return self.optimizer if isinstance(self.optimizer, LossScaleOptimizer) else None


def _undo_fusing(scaling: LossScaleOptimizer, state: dict[str, Any]) -> None:
    """Save the settings that the user chose, not those that hold while the optimizer is wrapped."""
    for group, before in zip(state["param_groups"], scaling._fusion.before, strict=False):
        if before is not None:
            group.update(before)
