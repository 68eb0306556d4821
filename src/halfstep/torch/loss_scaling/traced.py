"""A step as Dynamo traces it, into one graph together with its forward and backward pass.

Dynamo knows optimizers, and treats them in ways of its own (torch 2.13), which hold for a compiled
``optimizer.step`` after a backward pass outside, and not for one in the same graph:

- reading ``param_groups`` makes the parameters constants of the graph. A ``backward()`` in it then
  does not find them, and gives them no gradients, without a word;
- ``_init_group`` is called while tracing, and sees the gradients of before the graph.

So nothing here reads ``param_groups`` by that name, and the step is that of a twin: an object with
the optimizer's class and contents, which Dynamo traces as it is written.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from ...errors import LossScaleError
from .changing import ABSENT, UNCHANGING, not_own, same
from .closures import evaluates_once
from .gradients import groups_of, moved

Groups = list[dict[str, Any]]

_TRACEABLE: dict[str, Any] = {"fused": False, "foreach": True, "capturable": True}
"""Kernels that Dynamo traces, with their counters on the device."""


_OUTSIDE = "Leave its step outside of what is compiled."
_MADE = "made its state", "Run one step outside first."


def in_graph(found: Tensor) -> bool:
    """Whether a graph is made of what runs now, so that nothing can be read on the host."""
    return torch.compiler.is_compiling() or (
        found.is_cuda and torch.cuda.is_current_stream_capturing()
    )


class Cleared:
    """Clears the gradients of an optimizer, in a graph too: Dynamo refuses to trace ``zero_grad``.

    Dynamo (2.13) knows one None. Written to ``.grad`` and read from there, it takes it for that
    gradient from then on, wherever a None was meant; so each parameter gets a None of its own.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._nothing: list[list[None]] = []
        self.follow()

    def follow(self) -> None:
        """Look again: groups may have been added."""
        self._nothing = [[None for _ in group["params"]] for group in groups_of(self._optimizer)]

    def clear(self, set_to_none: bool) -> None:
        """Do what the optimizer's ``zero_grad`` does."""
        if not torch.compiler.is_compiling():
            self._optimizer.zero_grad(set_to_none)
            if len(self._optimizer.param_groups) != len(self._nothing):
                self.follow()
            return
        for group, nothing in zip(groups_of(self._optimizer), self._nothing, strict=True):
            for parameter, none in zip(group["params"], nothing, strict=True):
                if parameter.grad is None:
                    continue
                if set_to_none:
                    parameter.grad = none
                else:
                    parameter.grad = torch.zeros_like(parameter.grad)


def refuse_nothing(optimizer: Optimizer, scaled: bool) -> None:
    """Raise in a graph where a loss was scaled and no parameter has a gradient.

    Outside of a graph such a step does nothing; in one, something hid the parameters from Dynamo.
    """
    if scaled and torch.compiler.is_compiling():
        raise LossScaleError(
            f"A loss was scaled inside torch.compile, and no parameter of "
            f"{type(optimizer).__name__} has a gradient. Dynamo's backward() does not find "
            "parameters that were read off an optimizer (optimizer.param_groups) in what is "
            "compiled, now or before: read them off the model instead."
        )


def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
    """Step, without what stands around ``step`` in torch.optim: it breaks the graph on purpose."""
    with torch.no_grad():
        return _step(optimizer, _traceable(optimizer), *args, **kwargs)


def step_or_undo(optimizer: Optimizer, found: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Step, and choose between what was and what is, on the device.

    Args:
        optimizer: whose turn it is.
        found: 1.0 to take the step back, 0.0 to leave it.
        args: for ``optimizer.step``.
        kwargs: for ``optimizer.step``.

    Raises:
        LossScaleError: an optimizer that keeps, or makes while it steps, what cannot be taken back.
    """
    with torch.no_grad():
        groups = _traceable(optimizer)
        _make_state(optimizer, groups)
        before = _Before(optimizer)
        result = _step(optimizer, groups, *args, **kwargs)
        before.choose(found)
    return result


def _traceable(optimizer: Optimizer) -> Groups:
    """Copies of the groups, with settings for kernels that Dynamo traces."""
    settings = {key: value for key, value in _TRACEABLE.items() if key in optimizer.defaults}
    return [{**group, **settings} for group in groups_of(optimizer)]


def _step(optimizer: Optimizer, groups: Groups, *args: Any, **kwargs: Any) -> Any:
    twin = _twin(optimizer)
    twin.param_groups = groups
    result = _unwrapped(type(optimizer).step)(twin, *args, **kwargs)
    _refuse_lost(optimizer, twin, groups)
    for own, group in zip(groups_of(optimizer), groups, strict=True):
        for key, value in group.items():
            if key not in _TRACEABLE and (key not in own or own[key] is not value):
                own[key] = value
    return result


def _refuse_lost(optimizer: Optimizer, twin: Any, groups: Groups) -> None:
    """Raise if the step wrote an attribute: Dynamo (2.13) writes none of an optimizer, silently."""
    before, now = not_own(vars(optimizer)), not_own(vars(twin))
    written = [
        name
        for name in {**before, **now}
        if name != "_init_group" and not same(before.get(name, ABSENT), now.get(name, ABSENT))
    ]
    if twin.state is not optimizer.state:
        written.append("state")
    if twin.param_groups is not groups:
        written.append("param_groups")
    if written:
        raise LossScaleError(
            f"{type(optimizer).__name__} writes its attribute {written[0]} in its step, which is "
            f"lost inside torch.compile. {_OUTSIDE}"
        )


def _twin(optimizer: Optimizer) -> Any:
    twin: Any = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer))
    kind: Any = type(optimizer)
    if hasattr(kind, "_init_group"):
        twin._init_group = functools.partial(_unwrapped(kind._init_group), twin)
    return twin


def _unwrapped(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _make_state(optimizer: Optimizer, groups: Groups) -> None:
    """Let torch's optimizers make their state, so that there is something to go back to."""
    _move_counters(optimizer)
    kind: Any = type(optimizer)
    if not hasattr(kind, "_init_group"):
        return
    init = _unwrapped(kind._init_group)
    if not init.__module__.startswith("torch.optim."):  # another one may count its calls
        return
    lists = init.__code__.co_argcount - 2  # besides the optimizer and the group
    for group in groups:
        init(optimizer, group, *[[] for _ in range(lists)])
        if isinstance(optimizer, SGD) and group["momentum"]:
            _make_momentum(optimizer, group)


def _move_counters(optimizer: Optimizer) -> None:
    """Put counters that eager steps keep on the CPU beside their parameters, for good."""
    for parameter in (p for group in groups_of(optimizer) for p in group["params"]):
        state = optimizer.state.get(parameter, {})
        counter = state.get("step")
        if isinstance(counter, Tensor) and counter.device != parameter.device:
            state["step"] = counter.to(parameter.device)


def _make_momentum(optimizer: Optimizer, group: dict[str, Any]) -> None:
    for parameter in group["params"]:
        state = optimizer.state[parameter]
        if parameter.grad is None or state.get("momentum_buffer") is not None:
            continue
        if group["dampening"]:
            raise LossScaleError(
                "SGD with dampening makes its first momentum of its first gradient, which a "
                "skipped step inside torch.compile cannot take back. Run one step outside first."
            )
        state["momentum_buffer"] = torch.zeros_like(parameter)


class _Before:
    """Everything that a step may change, as it was; what `changing.Inside` is outside of graphs.

    In words that Dynamo traces: nothing is known by its ``id`` here.

    Raises:
        LossScaleError: an object that cannot be looked into.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._containers: list[tuple[Any, Any, str]] = []
        self._states = _states(optimizer)
        for place, group in enumerate(groups_of(optimizer)):
            self._look(group, f"param_groups[{place}]")
        for state in self._states.values():
            self._look(state, "state[parameter]")
        if not evaluates_once(optimizer):
            for name, value in not_own(vars(optimizer)).items():
                self._look(value, f"its attribute {name}")

    def _look(self, value: Any, where: str) -> None:
        if isinstance(value, Tensor):
            self._tensors.append((value, value.detach().clone()))
        elif isinstance(value, (dict, list, tuple)):
            if not isinstance(value, tuple):
                self._containers.append((value, dict(_pairs(value)), where))
            for key, item in _pairs(value):
                self._look(item, _place(where, key))
        elif not isinstance(value, UNCHANGING):
            what = f"keeps a {type(value).__name__} in {where}"
            raise _lasting(self._optimizer, what, _OUTSIDE)

    def choose(self, found: Tensor) -> None:
        """Put back what was, where ``found`` is 1.0.

        Raises:
            LossScaleError: for what the step made, removed, or changed on the host.
        """
        self._refuse_made()
        for tensor, value in self._tensors:
            tensor.copy_(torch.where(moved(found, tensor.device) > 0, value, tensor))
        replaced: dict[tuple[Tensor, Tensor], Tensor] = {}
        for container, before, where in self._containers:
            now = dict(_pairs(container))
            for key in {**before, **now}:
                old, new = before.get(key, ABSENT), now.get(key, ABSENT)
                if same(old, new):
                    continue
                self._refuse_lasting(old, new, _place(where, key))
                if (old, new) not in replaced:  # one tensor in several places stays one
                    taken_back = moved(found, new.device) > 0
                    replaced[old, new] = torch.where(taken_back, old, new)
                container[key] = replaced[old, new]

    def _refuse_made(self) -> None:
        now = _states(self._optimizer)
        for key in {**self._states, **now}:
            old, new = self._states.get(key, ABSENT), now.get(key, ABSENT)
            if old is ABSENT and new:
                raise _lasting(self._optimizer, *_MADE)
            if old is not ABSENT and old is not new and (old or new):
                raise _lasting(self._optimizer, "replaces or removes state[parameter]", _OUTSIDE)

    def _refuse_lasting(self, old: Any, new: Any, where: str) -> None:
        if isinstance(new, Tensor) and (old is ABSENT or old is None):
            raise _lasting(self._optimizer, *_MADE)
        if isinstance(old, (int, float)) and isinstance(new, (int, float)):
            what = f"counts with Python numbers ({where})"
        elif not isinstance(old, Tensor) or not isinstance(new, Tensor):
            what = f"replaces, makes or removes {where}"
        elif isinstance(old, Parameter) or isinstance(new, Parameter):
            what = f"replaces a parameter, {where}"
        elif (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
            what = f"replaces {where} by a tensor of another shape, dtype or device"
        else:
            return
        raise _lasting(self._optimizer, what, _OUTSIDE)


def _lasting(optimizer: Optimizer, what: str, instead: str) -> LossScaleError:
    return LossScaleError(
        f"{type(optimizer).__name__} {what} inside torch.compile, where a skipped step cannot take "
        f"it back. {instead}"
    )


def _states(optimizer: Optimizer) -> dict[Any, Any]:
    """The state of each parameter that has some."""
    for key in optimizer.state:
        if not isinstance(key, Tensor):
            # Dynamo (2.13) fails inside on a dict of tensors and words
            raise _lasting(optimizer, f"keeps state under {key!r}, not a parameter,", _OUTSIDE)
    parameters = [p for group in groups_of(optimizer) for p in group["params"]]
    return {p: optimizer.state[p] for p in parameters if p in optimizer.state}


def _pairs(container: Any) -> Any:
    return container.items() if isinstance(container, dict) else enumerate(container)


def _place(where: str, key: Any) -> str:
    return f"{where}[{key!r}]" if isinstance(key, (str, int)) else where
