"""The class that a module gets when a policy is applied to it.

It is a subclass of the module's own class, made on the fly, with the same name: ``isinstance``
holds, hooks fire, and ``remove_policy`` sets the old class back. It replaces ``forward`` and turns
the names of the module's weights into properties, which give the copy in the compute dtype inside
the module's own forward and the float32 variable everywhere else. The parameters themselves stay
where they are, so ``state_dict``, optimizers and everything else that asks for them see float32.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

from . import masters, registry
from .casting import cast_call, cast_nested
from .copies import calls, forget_entries
from .direct import has_short_way, short_way
from .plan import ATTRIBUTE, LayerPlan, plan_of, traced, transformed
from .rules import LEFT_ALONE, SWITCHES
from .running import (
    Forward,
    inside,
    read,
    run,
    run_compiling,
    run_outermost,
    self_device,
)
from .writes import Return, returns

_BASE = "_halfstep_base"
_KEPT = "_halfstep_kept"
_FSDP_INDEX = "_orig_cls_mro_index"
# weakly on both sides: every parametrized module brings a class of its own, which knows the module
_classes: WeakKeyDictionary[type, WeakValueDictionary[tuple[str, ...], type]] = WeakKeyDictionary()


def is_policied(module: nn.Module) -> bool:
    """Whether the module's class is one of ours."""
    return _BASE in type(module).__dict__


def plain_class(cls: type) -> type:
    """Return the class that a module had before a policy was applied to it."""
    base: type = cls.__dict__.get(_BASE, cls)
    return base


def policied_class(base: type, reads: tuple[str, ...]) -> type:
    """Return the subclass of ``base`` that follows a plan and has ``reads`` as properties."""
    known = _classes.setdefault(base, WeakValueDictionary())
    made = known.get(reads)
    if made is None:
        made = known[reads] = _make_class(base, reads)
    return made


def register_parameters(module: nn.Module) -> None:
    """Write down for loss scaling which policy the module's own parameters have, if any."""
    plan = plan_of(module)
    if plan is None or plan.rule == LEFT_ALONE:
        return
    registry.register_module(module, plan.policy)
    masters.follow(module)


def attach(module: nn.Module, plan: LayerPlan, policied: type | None) -> None:
    """Give the module its plan and, unless it keeps its own, the class that follows it."""
    module.__dict__[ATTRIBUTE] = plan
    if policied is not None:
        module.__class__ = policied
    forget_entries()


def detach(module: nn.Module) -> None:
    """Give the module its own class back."""
    module.__dict__.pop(ATTRIBUTE, None)
    module.__class__ = plain_class(type(module))
    forget_entries()


def _make_class(base: type, reads: tuple[str, ...]) -> type:
    body: dict[str, Any] = {name: _weight(base, name) for name in reads}
    body |= {name: _shown(name, value) for cls, name, value in SWITCHES if issubclass(base, cls)}
    if issubclass(base, nn.RNNBase):
        body["_flat_weights"] = _flat_weights()
    body |= {
        _BASE: base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__init__": _init(base),
        "__reduce_ex__": _reduce(base, reads),
        "forward": _forward(base),
        "_apply": _apply(base),
        "_load_from_state_dict": _load(base),
        "__setstate__": _setstate(base),
        "register_parameter": _register_parameter(base),
    }
    if has_short_way(base):
        body["forward"] = short_way(base, body["forward"])
    if hasattr(base, _FSDP_INDEX):
        # fully_shard came first: it counts the classes before the one that a slice is made with
        body[_FSDP_INDEX] = getattr(base, _FSDP_INDEX) + 1
    if issubclass(base, nn.modules.lazy.LazyModuleMixin) and base.cls_to_become is not None:
        # at its first call a lazy module becomes another class: that class under the policy
        body["cls_to_become"] = policied_class(base.cls_to_become, reads)
    return type(base)(base.__name__, (base,), body)


def _init(base: type) -> Callable[..., None]:
    # code like Sequential.__getitem__ makes another module with type(self)(...): a plain one
    @functools.wraps(base.__init__)  # type: ignore[misc]
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)  # type: ignore[misc]
        if plan_of(self) is None:
            self.__class__ = plain_class(type(self))

    return init


def _reduce(base: type, reads: tuple[str, ...]) -> Callable[..., tuple[Any, ...]]:
    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        made: Any = base.__reduce_ex__(self, protocol)  # type: ignore[call-arg, arg-type]
        if len(made) < 3:
            return tuple(made)  # a class that makes a new object of itself, and no state
        state = made[2]
        kept = masters.by_name(self)
        if kept and isinstance(state, dict):
            state = {**state, _KEPT: kept}
        # (reconstruct, arguments, state, ...): same state, but the object gets our class
        return (_rebuild, (base, reads), state, *made[3:])

    return reduce


def _rebuild(base: type, reads: tuple[str, ...]) -> nn.Module:
    module: nn.Module = object.__new__(base)
    module.__class__ = policied_class(base, reads)
    return module


def _storing(name: str) -> Callable[[nn.Module, Any], None]:
    """The setter of a property that keeps what is assigned where the plain attribute would be."""

    def set_(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value

    return set_


def _shown(name: str, value: object) -> property:
    """A property that shows ``value``, whatever is stored under its name."""
    return property(lambda self: value, _storing(name))


def _flat_weights() -> property:
    """The list of weights that a recurrent layer reads instead of its weights."""

    def get(self: nn.Module) -> list[Any]:
        return [read(self, weight) for weight in self.__dict__["_flat_weights"]]

    return property(get, _storing("_flat_weights"))


def _weight(base: type, name: str) -> property:
    computed = getattr(base, name, None)
    if isinstance(computed, property):  # a parametrized weight: made anew at each reading
        return _parametrized_weight(computed)

    def get(self: nn.Module) -> Any:
        parameters = self._parameters
        value = parameters[name] if name in parameters else _attribute(self, name)
        return read(self, value)

    def delete(self: nn.Module) -> None:
        del self.__dict__[name]

    return property(get, _storing(name), delete)


def _parametrized_weight(computed: property) -> property:
    compute = computed.fget
    if compute is None:
        raise TypeError("a parametrized weight that cannot be read")

    def get(self: nn.Module) -> Any:
        plan = plan_of(self)
        if plan is None or not inside(self):
            return compute(self)
        with torch.autocast(self_device(self), enabled=False):
            value = compute(self)
        return value.to(plan.compute) if plan.casts(value) else value

    return property(get, computed.fset, computed.fdel)


def _attribute(module: nn.Module, name: str) -> Any:
    try:
        return module.__dict__[name]
    except KeyError:
        raise AttributeError(
            f"{type(module).__name__!r} object has no attribute {name!r}"
        ) from None


def _forward(base: type) -> Forward:
    # an activation, a pooling or the like: in a 16-bit model it finds all as it wants it
    passive = base.__module__.startswith("torch.nn.modules.")

    @functools.wraps(base.forward)  # type: ignore[attr-defined]
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plan = plan_of(self)
        if plan is None:
            return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        if (
            passive
            and calls.stack
            and len(args) == 1
            and not kwargs
            and _suits(self, plan, args[0])
        ):
            return base.forward(self, args[0])  # type: ignore[attr-defined]
        given = args, kwargs
        if plan.inputs is not None:
            args, kwargs = cast_call(args, kwargs, plan.inputs)
        if torch.compiler.is_compiling():
            result = run_compiling(base.forward, self, plan, args, kwargs)  # type: ignore[attr-defined]
        else:
            back = () if passive or plan.inputs is None else _back(given, args, kwargs)
            way = run if calls.stack else run_outermost
            result = way(base.forward, self, plan, args, kwargs)  # type: ignore[attr-defined]
            for bring in back:
                bring()
        return result if plan.result is None else cast_nested(result, plan.result)

    return forward


def _back(
    given: tuple[tuple[Any, ...], dict[str, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Return, ...]:
    """Return what brings the writes to cast arguments back to the caller."""
    same = all(map(operator.is_, given[0], args))
    if same and all(value is kwargs[name] for name, value in given[1].items()):
        return ()
    if transformed() or traced():
        return ()
    return tuple(returns(given, (args, kwargs)))


def _suits(module: nn.Module, plan: LayerPlan, x: Any) -> bool:
    """Whether the policy has nothing to do in this call."""
    return (
        type(x) is torch.Tensor
        and x.dtype is plan.compute
        and plan.region is None
        and plan.result is None
        and not plan.reads
        and not module._modules
    )


def _apply(base: type) -> Forward:
    def apply(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forget_entries()  # .to(), .cuda(), .half(): weights move or change
        with masters.let_go(self):
            result = base._apply(self, *args, **kwargs)  # type: ignore[attr-defined]
        register_parameters(self)
        return result

    return apply


def _load(base: type) -> Forward:
    def load(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        # elsewhere loading copies into the parameters, which stay in their place
        swaps = masters.all_swap()
        if swaps:
            forget_entries()  # nothing may hold a reference to what trades places
        with masters.let_go(self) if swaps else nullcontext():
            base._load_from_state_dict(self, *args, **kwargs)  # type: ignore[attr-defined]

    return load


def _setstate(base: type) -> Callable[[nn.Module, Any], None]:
    def setstate(self: nn.Module, state: Any) -> None:
        state = dict(state)
        kept = state.pop(_KEPT, {})
        base.__setstate__(self, state)  # type: ignore[attr-defined]
        register_parameters(self)  # a deep copy, or one from a file: its parameters are new
        for name, (update, rest) in kept.items():
            masters.adopt(self.get_parameter(name), update, rest)

    return setstate


def _register_parameter(base: type) -> Callable[..., None]:
    @functools.wraps(base.register_parameter)  # type: ignore[attr-defined]
    def register_parameter(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        base.register_parameter(self, *args, **kwargs)  # type: ignore[attr-defined]
        register_parameters(self)

    return register_parameter
