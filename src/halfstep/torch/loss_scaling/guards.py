"""Guards against gradients that would go wrong: of two scales in one sum, of a dtype that fails."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.utils.hooks import RemovableHandle

from ...errors import LossScaleError
from ..bare_steps import refuse_bare_step
from .fusion import is_sgd
from .gradients import Gradients, label_of, labelled


def _trainable(optimizer: Optimizer) -> list[Tensor]:
    return [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and parameter.is_leaf and not is_lazy(parameter)
    ]


def is_watched(optimizer: Optimizer) -> bool:
    """Whether hooks will look at the gradients before the step; they are to see them unscaled."""
    own = getattr(optimizer, "_optimizer_step_pre_hooks", None)
    everywhere = torch_optimizer._global_optimizer_pre_hooks
    if own or not everywhere:
        return bool(own)
    return any(hook is not refuse_bare_step for hook in everywhere.values())


def is_hooked(optimizer: Optimizer) -> bool:
    """Whether hooks run before or after the step; they are to run once, and to see all of it."""
    own = getattr(optimizer, "_optimizer_step_post_hooks", None)
    if own or is_watched(optimizer):
        return True
    everywhere = torch_optimizer._global_optimizer_post_hooks.values()
    # our own forget copies of weights, for each part if need be
    modules = [str(getattr(hook, "__module__", None)) for hook in everywhere]
    return any(not module.startswith("halfstep.") for module in modules)


def refuse_foreign(optimizer: Optimizer, grads: Gradients) -> None:
    """Raise if a gradient's dtype is not its parameter's and the optimizer would fail on that.

    ``Tensor.grad_dtype`` allows it, and SGD's own kernels take it; the others raise when half of
    the parameters are updated.

    Raises:
        LossScaleError: with the parameter's group, position, name and shape.
    """
    if grads.foreign is None or is_sgd(optimizer):
        return
    parameter = grads.foreign
    grad = parameter.grad
    raise LossScaleError(
        f"{label_of(optimizer, parameter)}, has dtype {parameter.dtype} and a gradient of dtype "
        f"{None if grad is None else grad.dtype}: {type(optimizer).__name__} needs the same for "
        "both. Leave grad_dtype alone, or make the parameter float32."
    )


def refuse_more(optimizer: Optimizer) -> list[RemovableHandle]:
    """Make any ``backward`` raise that adds to these gradients; they are unscaled now.

    The hooks exist from unscaling to the step, so that an ordinary step pays nothing for them.
    A graph takes none; `refuse_scaling` stands in for them there. They also run where nothing is
    added, for the weights of another optimizer that were cast together with the ones of this
    backward (`grouping`).

    Returns:
        The hooks; remove them with the step.
    """
    if torch.compiler.is_compiling():
        return []

    trainable = _trainable(optimizer)
    unscaled = {id(p): (id(p.grad), p.grad._version) for p in trainable if p.grad is not None}

    def refuse(parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is None or unscaled.get(id(parameter)) == (id(grad), grad._version):
            return
        raise LossScaleError(
            f"backward() added a gradient to {label_of(optimizer, parameter)}, after unscale_(): "
            "the two have different scales. Run all backward passes before unscale_(), and after "
            "it a step() (with torch.amp's protocol update() too), or a "
            "LossScaleOptimizer's zero_grad() (a module's goes unseen)."
        )

    return [
        parameter.register_post_accumulate_grad_hook(refuse)  # type: ignore[no-untyped-call]
        for parameter in trainable
    ]


def refuse_scaling(unscaled: bool) -> None:
    """Raise in a graph where a loss is scaled while the gradients are unscaled."""
    if unscaled and torch.compiler.is_compiling():
        raise LossScaleError(
            "A loss is scaled after unscale_(), inside torch.compile: its gradients would be added "
            "to unscaled ones. Run all backward passes before unscale_(), and after it a step() "
            "or a zero_grad()."
        )


class Leftovers:
    """Knows the gradients that the last step left, so that none is added to, or used again.

    A gradient left over is unscaled; a backward would add a scaled one to it, and a step would
    divide it by the scale once more. Telling it from one that was cleared needs no value: a
    cleared gradient is gone, or its version is higher as a backward begins. A weak reference says
    that it is gone, for the next one may have its address and its version; but none is held to
    what ``nn.Module.to`` lets trade places, which that forbids (DTensors; all, where torch is
    asked for it).
    """

    def __init__(self) -> None:
        self._noted: list[tuple[int, int, weakref.ref[Tensor] | None]] = []
        self._left: list[tuple[Tensor, str, Tensor, int]] = []

    def __bool__(self) -> bool:
        return bool(self._noted)

    def note(self, optimizer: Optimizer) -> None:
        """Remember the gradients that are there now; not in a graph, where all is known before."""
        if torch.compiler.is_compiling():
            self.forget()
            return
        self._left = []
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        self._noted = [
            (
                id(grad),
                grad._version,
                weakref.ref(grad) if type(grad) is Tensor and not swaps else None,
            )
            for group in optimizer.param_groups
            for parameter in group["params"]
            if (grad := parameter.grad) is not None
        ]

    def forget(self) -> None:
        """The gradients have been cleared."""
        self._left = []
        self._noted = []

    def check(self, optimizer: Optimizer) -> Callable[[Tensor], None]:
        """Return a hook for a scaled loss, which looks as its backward begins and as it ends.

        ``torch.autograd.grad`` adds to no gradient, so it may run beside those of the last step.
        """

        def look(_: Tensor) -> None:
            versions = {
                key: version
                for key, version, there in self._noted
                if there is None or there() is not None
            }
            left = {
                id(parameter): (parameter.grad, parameter.grad._version)
                for group in optimizer.param_groups
                for parameter in group["params"]
                if parameter.grad is not None
                and versions.get(id(parameter.grad)) == parameter.grad._version
            }
            self._left = [
                (parameter, label, *left[id(parameter)])
                for parameter, label in (labelled(optimizer) if left else ())
                if id(parameter) in left
            ]
            # one that adds nothing, torch.autograd.grad's, leaves them to the next
            still = {id(grad) for grad, _ in left.values()}
            self._noted = [noted for noted in self._noted if noted[0] in still]
            if self._left:
                # runs when this backward is over
                Variable._execution_engine.queue_callback(self._refuse_added)

        return look

    def _refuse_added(self) -> None:
        for parameter, label, grad, version in self._left:
            if parameter.grad is not grad or grad._version != version:
                raise LossScaleError(
                    f"{label}, still had the gradient of the last step, which is unscaled: this "
                    "backward added a scaled one to it. Call zero_grad() before; what is written "
                    "through grad.data goes unseen."
                )

    def refuse_stale(self) -> None:
        """Raise if a gradient that the last step left would be used again.

        Raises:
            LossScaleError: with the parameter's group, position, name and shape.
        """
        for parameter, label, grad, version in self._left:
            if parameter.grad is grad and grad._version == version:
                raise LossScaleError(
                    f"{label}, still has the gradient of the last step, which is unscaled: this "
                    "step would divide it by the scale again. Call zero_grad() before."
                )
