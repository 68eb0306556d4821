"""The hooks of one recorded step, and the looks at the parameters before and after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .counting import plain_tensor
from .recording import Recording, Scaling
from .targets import Target, tensors_in

_Place = tuple[str, str]
"""Where a parameter lies: its module's path, and its name in it."""


class StepHooks:
    """Shows a recording what happens in one step; made before it, removed after it.

    Args:
        model: the model, without wrappers.
        targets: the modules that are watched.
        recording: what counts.
        saw_loss: takes the loss, where the model returns one.
        alone: whether nothing tells when the gradients are ready.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: list[Target],
        recording: Recording,
        saw_loss: Callable[[Tensor], None],
        alone: bool,
    ) -> None:
        self.recording = recording
        self._saw_loss = saw_loss
        self._handles: list[RemovableHandle] = []
        self._parameters = _places(targets)
        self._before: list[tuple[_Place, nn.Parameter, Tensor]] = []
        self._gradients: dict[nn.Parameter, Tensor] = {}
        for target in targets:
            hook = self._counting(target)
            self._handles.append(target.module.register_forward_hook(hook))
        self._handles.append(model.register_forward_hook(self._look_for_loss))
        if alone:
            self._take_weights(None)
            self._keep_gradients()

    def remove(self) -> None:
        """Remove every hook; what still holds one of them counts nothing any more."""
        self.recording.open = False
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._before = []
        self._gradients = {}

    # ------------------------------------------------------------------ forward and backward

    def _counting(self, target: Target) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if torch.compiler.is_compiling() or not self.recording.open:
                return  # a program that is compiled now outlives this hook: nothing of it goes in
            if not (module.training or torch.is_grad_enabled()):
                return
            # a checkpointed forward runs again within the backward pass: counted once is enough
            again = torch._C._current_graph_task_id() != -1
            for name, tensor in tensors_in(output):
                if not again:
                    self.recording.count("activation", target.path, name, tensor)
                if tensor.requires_grad:
                    hook = self._gradient_hook(target.path, name)
                    self._handles.append(tensor.register_hook(hook))  # type: ignore[no-untyped-call]

        return look

    def _gradient_hook(self, path: str, name: str) -> Callable[[Tensor], None]:
        def look(grad: Tensor) -> None:
            if self.recording.open:
                self.recording.count("activation_gradient", path, name, grad, Scaling.SCALED)

        return look

    def _look_for_loss(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self.recording.open:
            return
        loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.dim() == 0 and loss.is_floating_point():
            self._saw_loss(loss)

    def _keep_gradients(self) -> None:
        def keep(parameter: nn.Parameter) -> None:
            if parameter.grad is not None:
                self._gradients[parameter] = parameter.grad

        for parameter in self._parameters:
            if parameter.requires_grad and parameter.is_leaf:
                hook: Any = parameter.register_post_accumulate_grad_hook
                self._handles.append(hook(keep))

    # ------------------------------------------------------------------ parameters

    def before_step(self, optimizer: Optimizer | None, scale: Tensor | None) -> None:
        """Count the weights and gradients that an optimizer is about to use."""
        own = self._take_weights(optimizer)
        scaling = Scaling.UNSCALED if scale is None else Scaling.SCALED
        if scale is not None:
            self.recording.set_scale(scale)
        for parameter in own:
            self._count_gradient(parameter, parameter.grad, scaling)

    def after_step(self) -> None:
        """Count the updates, and gradients that nobody announced."""
        for parameter, grad in self._gradients.items():
            self._count_gradient(parameter, grad, Scaling.NONE)
        for (path, name), parameter, before in self._before:
            self.recording.count_update(path, name, before, parameter)

    def _count_gradient(
        self, parameter: nn.Parameter, grad: Tensor | None, scaling: Scaling
    ) -> None:
        path, name = self._parameters[parameter]
        self.recording.count("weight_gradient", path, name, grad, scaling)

    def _take_weights(self, optimizer: Optimizer | None) -> list[nn.Parameter]:
        taken = {parameter for _, parameter, _ in self._before}
        wanted = self._parameters if optimizer is None else _parameters_of(optimizer)
        new = [p for p in wanted if p in self._parameters and p not in taken]
        for parameter in new:
            path, name = self._parameters[parameter]
            self.recording.count("weight", path, name, parameter)
            plain = plain_tensor(parameter)
            if plain is not None and parameter.requires_grad:
                self._before.append(((path, name), parameter, plain.clone()))
        return new


def _parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _places(targets: list[Target]) -> dict[nn.Parameter, _Place]:
    places: dict[nn.Parameter, _Place] = {}
    for target in targets:
        for name, parameter in target.parameters():
            places.setdefault(parameter, (target.path, name))
    return places
