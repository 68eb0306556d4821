"""Running one step again, eagerly and under watch, and leaving everything as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import LossScaleError
from ..eager import eagerly
from .generators import Generators, seed_all
from .looking import Badness, all_zero, not_finite, tensors_in
from .places import Places, clean_path
from .watch import Record, Watch, storage_of

LossFn = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Step:
    """One training step: everything but the optimizer.

    Attributes:
        model: without the wrappers of compilation and data parallelism.
        loss_fn: called as ``loss_fn(model, batch)``.
        batch: what it gets.
        loss_scale: what the loss is multiplied by, in float32.
        seed: of the random numbers; None goes on from where the generators are.
    """

    model: nn.Module
    loss_fn: LossFn
    batch: Any
    loss_scale: float = 1.0
    seed: int | None = None

    def at_scale(self, loss_scale: float) -> Step:
        """Return the same step with another loss scale."""
        return replace(self, loss_scale=loss_scale)

    def of(self, model: nn.Module) -> Step:
        """Return the same step of another model."""
        return replace(self, model=model)


@dataclass(frozen=True)
class Result:
    """What a replay saw.

    Attributes:
        watch: the operations.
        loss: the record of the loss, None if there is none.
        gradients: by parameter, the record of its gradient and whether that is bad.
        buffers: by name, the record of each buffer that became bad.
        zero_gradients: the weights of two or more dimensions whose gradients are all zero. (That
            of a bias in front of a norm is nothing but rounding error, so biases do not count.)
    """

    watch: Watch
    loss: Record | None
    gradients: Mapping[str, tuple[Record | None, bool]]
    buffers: Mapping[str, Record | None]
    zero_gradients: tuple[str, ...]

    @property
    def bad_gradients(self) -> dict[str, Record | None]:
        """The gradients that are bad."""
        return {name: record for name, (record, bad) in self.gradients.items() if bad}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of ``torch.compile`` and data parallel wrappers."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif _dynamo() is not None and isinstance(model, _dynamo().OptimizedModule):
            model = model._orig_mod
        else:
            return model


def _dynamo() -> Any:
    """The module behind ``torch.compile`` if anything has used it: importing it takes seconds."""
    return sys.modules.get("torch._dynamo")


def replay(step: Step, badness: Badness = not_finite) -> Result:
    """Run a step under watch. Parameters, buffers, gradients, generators stay as they are.

    Raises:
        LossScaleError: a loss function that returns no loss.
        Exception: whatever the model or the loss function raise.
    """
    places = Places(step.model)
    watch = Watch(places, _names(step), badness)
    with _untouched(step, watch), torch.enable_grad():
        with places.followed(), watch:
            loss = loss_in(step.loss_fn(step.model, step.batch))
        with _gradients_set_aside(_leaves(loss)):
            if loss.requires_grad:
                with places.followed(), watch:
                    _backward(loss, step.loss_scale)
            return _result(step, watch, loss, badness)


def loss_in(returned: Any) -> Tensor:
    """Return the loss in what a loss function returned: a tensor, or its ``loss``, or the sum.

    Raises:
        LossScaleError: there is none.

    >>> loss_in({"loss": torch.tensor(2.0), "logits": torch.ones(3)})
    tensor(2.)
    """
    if isinstance(returned, Mapping) and isinstance(returned.get("loss"), Tensor):
        returned = returned["loss"]
    elif isinstance(getattr(returned, "loss", None), Tensor):
        returned = returned.loss
    if isinstance(returned, Tensor) and returned.is_floating_point():
        return returned
    found = [t for t in tensors_in(returned) if t.is_floating_point() and t.dim() == 0]
    if not found:
        raise LossScaleError(
            f"blame: loss_fn(model, batch) must return the loss, a floating tensor, or something "
            f"with one as .loss or ['loss'], or scalars to add up; it returned a "
            f"{type(returned).__name__}."
        )
    return torch.stack([tensor.float() for tensor in found]).sum()


def _backward(loss: Tensor, scale: float) -> None:
    if scale != 1:
        loss = loss.float() * scale
    loss.backward(torch.ones_like(loss))  # type: ignore[no-untyped-call]


def _result(step: Step, watch: Watch, loss: Tensor, badness: Badness) -> Result:
    gradients, zero = {}, []
    for name, parameter in step.model.named_parameters():
        if parameter.grad is None:
            continue
        record = watch.record_of(parameter.grad)
        gradients[clean_path(name)] = (record, badness(parameter.grad)[0])
        if parameter.dim() > 1 and all_zero(parameter.grad)[0]:
            zero.append(clean_path(name))
    buffers = {
        clean_path(name): watch.record_of(buffer)
        for name, buffer in step.model.named_buffers()
        if not_finite(buffer)[0]
    }
    broken = {name: record for name, record in buffers.items() if record and not record.outside}
    return Result(watch, watch.record_of(loss), gradients, broken, tuple(zero))


# ---------------------------------------------------------------------- names


def _names(step: Step) -> dict[int, tuple[str, str, Tensor]]:
    """What the tensors from outside are called, by their memory."""
    own = [*step.model.named_buffers(), *step.model.named_parameters()]
    return {storage_of(t): ("batch", name, t) for name, t in _named("batch", step.batch)} | {
        storage_of(t): ("parameter", clean_path(name), t) for name, t in own
    }


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(f"{name}[{key!r}]", item)
    elif isinstance(value, tuple | list):
        for place, item in enumerate(value):
            yield from _named(f"{name}[{place}]", item)
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        for key, item in vars(value).items():
            if isinstance(item, Tensor | Mapping | tuple | list):
                yield from _named(f"{name}.{key}", item)


# ---------------------------------------------------------------------- leaving things as they were


@contextmanager
def _untouched(step: Step, watch: Watch) -> Iterator[None]:
    """Put everything back that the step changed: memory, buffers, gradients, generators."""
    parameters = list(step.model.parameters())
    with ExitStack() as stack:
        stack.callback(Generators.now(parameters).put_back)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(eagerly())
        stack.enter_context(_gradients_set_aside(parameters))
        stack.enter_context(_buffers_kept(step.model))
        stack.callback(_put_back, watch)
        stack.callback(torch.clear_autocast_cache)
        torch.clear_autocast_cache()  # a copy kept from a step before belongs to its graph
        if step.seed is not None:
            seed_all(step.seed)
        yield


def _put_back(watch: Watch) -> None:
    for storage, before in reversed(watch.written):
        if storage.nbytes() == before.nbytes():
            storage.copy_(before)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    kept = [
        (module, dict(module._buffers))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)  # which hands out copies of its dicts
    ]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, own in kept:
            module._buffers.clear()
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that a backward pass from ``loss`` would give gradients to."""
    todo, seen, leaves = [loss.grad_fn], set(), []
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves.append(leaf)
        todo += [following for following, _ in node.next_functions]
    return leaves


@contextmanager
def _gradients_set_aside(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Take gradients away, and the hooks that act on them: an optimizer's, a guard's."""
    before = [(tensor, tensor.grad) for tensor in tensors]
    acting = [hooks for tensor in tensors if (hooks := tensor._post_accumulate_grad_hooks)]
    kept = [dict(hooks) for hooks in acting]
    for tensor in tensors:
        tensor.grad = None
    for hooks in acting:
        hooks.clear()  # the engine reads this very dict, so it cannot be exchanged
    try:
        yield
    finally:
        for tensor, grad in before:
            tensor.grad = grad
        for hooks, own in zip(acting, kept, strict=True):
            hooks.update(own)
