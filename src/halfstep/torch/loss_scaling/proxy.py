"""An optimizer that stands in front of another one."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch.optim import Optimizer

from ..bare_steps import wrapped


class OptimizerProxy(Optimizer):
    """A real ``torch.optim.Optimizer`` whose groups, state and defaults are another's.

    Schedulers, Lightning and Accelerate ask for the class and write into the groups: both work,
    since the groups are the inner optimizer's own objects. Hooks registered here get this object.
    """

    inner_optimizer: Optimizer

    def _stand_before(self, optimizer: Optimizer) -> None:
        # Optimizer.__init__ is left out on purpose: it would make groups and state of its own
        self.inner_optimizer = optimizer
        wrapped(optimizer)
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's groups, the very objects."""
        return self.inner_optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's state, the very object."""
        return self.inner_optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's defaults, the very object."""
        return self.inner_optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        # what optimizers from elsewhere add to the protocol, such as schedule-free's train()
        if name.startswith("_") or name == "inner_optimizer":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.inner_optimizer, name)

    def _before_step(self, closure: object) -> None:
        for hook in self._optimizer_step_pre_hooks.values():
            hook(self, (closure,), {})

    def _after_step(self, closure: object) -> None:
        for hook in self._optimizer_step_post_hooks.values():
            hook(self, (closure,), {})
