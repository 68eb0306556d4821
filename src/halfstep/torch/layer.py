"""The class that a module gets when a policy is applied to it.

It is a subclass of the module's own class, made on the fly, with the same name: ``isinstance``
holds, hooks fire, and ``remove_policy`` sets the old class back. It replaces ``forward`` and turns
the names of the module's weights into properties, which give the copy in the compute dtype inside
the module's own forward and the float32 variable everywhere else. The parameters themselves stay
where they are, so ``state_dict``, optimizers and everything else that asks for them see float32.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

from ..errors import PolicyError, PolicyWarning
from . import registry
from .casting import LOW, cast_call, cast_nested
from .copies import WeightCopies, calls, copies_for, entry_of, forget_entry, is_selective
from .plan import ATTRIBUTE, LayerPlan, plan_of, traced
from .region import leave
from .rules import LEFT_ALONE, PARAMETERS, SWITCHES

Forward = Callable[..., Any]

_BASE = "_halfstep_base"
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


def register_parameters(module: nn.Module, plan: LayerPlan) -> None:
    """Write down for loss scaling which policy the module's own parameters have."""
    if plan.rule == LEFT_ALONE:
        return
    for parameter in module._parameters.values():
        tied = None if parameter is None else registry.policy_of_parameter(parameter)
        if parameter is not None and not (tied is not None and tied.is_low):
            registry.register(parameter, plan.policy)


def attach(module: nn.Module, plan: LayerPlan, policied: type | None) -> None:
    """Give the module its plan and, unless it keeps its own, the class that follows it."""
    module.__dict__[ATTRIBUTE] = plan
    if policied is not None:
        module.__class__ = policied
    forget_entry(module)


def detach(module: nn.Module) -> None:
    """Give the module its own class back."""
    module.__dict__.pop(ATTRIBUTE, None)
    module.__class__ = plain_class(type(module))
    forget_entry(module)


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
        "__setstate__": _setstate(base),
        "register_parameter": _register_parameter(base),
    }
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
        # (reconstruct, arguments, state, ...): same state, but the object gets our class
        return (_rebuild, (base, reads), *made[2:])

    return reduce


def _rebuild(base: type, reads: tuple[str, ...]) -> nn.Module:
    module: nn.Module = object.__new__(base)
    module.__class__ = policied_class(base, reads)
    return module


def _shown(name: str, value: object) -> property:
    """A property that shows ``value``, whatever is stored under its name."""

    def set_(self: nn.Module, stored: object) -> None:
        self.__dict__[name] = stored

    return property(lambda self: value, set_)


def _flat_weights() -> property:
    """The list of weights that a recurrent layer reads instead of its weights."""

    def get(self: nn.Module) -> list[Any]:
        return [read(self, weight) for weight in self.__dict__["_flat_weights"]]

    def set_(self: nn.Module, weights: list[Any]) -> None:
        self.__dict__["_flat_weights"] = weights

    return property(get, set_)


def _weight(base: type, name: str) -> property:
    computed = getattr(base, name, None)
    if isinstance(computed, property):  # a parametrized weight: made anew at each reading
        return _parametrized_weight(computed)

    def get(self: nn.Module) -> Any:
        parameters = self._parameters
        value = parameters[name] if name in parameters else _attribute(self, name)
        return read(self, value)

    def set_(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value

    def delete(self: nn.Module) -> None:
        del self.__dict__[name]

    return property(get, set_, delete)


def _parametrized_weight(computed: property) -> property:
    compute = computed.fget
    if compute is None:
        raise TypeError("a parametrized weight that cannot be read")

    def get(self: nn.Module) -> Any:
        plan = plan_of(self)
        if plan is None or not _inside(self):
            return compute(self)
        with torch.autocast(self_device(self), enabled=False):
            value = compute(self)
        return value.to(plan.compute) if plan.casts(value) else value

    return property(get, computed.fset, computed.fdel)


def self_device(module: nn.Module) -> str:
    """Return the type of device of a module's first parameter, ``"cpu"`` if it has none."""
    for parameter in module.parameters():
        return parameter.device.type
    return "cpu"


def _attribute(module: nn.Module, name: str) -> Any:
    try:
        return module.__dict__[name]
    except KeyError:
        raise AttributeError(
            f"{type(module).__name__!r} object has no attribute {name!r}"
        ) from None


def read(module: nn.Module, value: Any) -> Any:
    """Return a module's tensor: in the compute dtype inside its own forward, else as it is."""
    plan = plan_of(module)
    if value is None or plan is None or not _inside(module):
        return value
    region = plan.region
    if region is not None and region.dtype is not None and not _autocasts(value):
        return value  # the module's own forward has switched autocast off around this
    cached = not torch.compiler.is_compiling() and not is_selective()
    copies = calls.copies if cached else None
    if copies is not None:
        low = copies.made(value, plan.compute)  # first: it answers most readings
        if low is not None:
            return low
    if not plan.casts(value):
        return value
    return value.to(plan.compute) if copies is None else copies.make(value, plan.compute)


def _autocasts(value: torch.Tensor) -> bool:
    device = value.device.type
    known = torch.compiler.is_compiling() or device in calls.devices
    return not known or torch.is_autocast_enabled(device)


def _inside(module: nn.Module) -> bool:
    """Whether this thread is in the forward of ``module``, or of the parent that acts for it."""
    stack = calls.stack
    if not stack:
        return _recomputing()
    innermost = stack[-1]
    if innermost is module:
        return True
    acting, own = plan_of(innermost), plan_of(module)
    if acting is None or own is None or not (acting.covers or own.rule == PARAMETERS.name):
        return False
    near = any(child is module for child in innermost._modules.values())
    return near or any(below is module for below in innermost.modules())


def _recomputing() -> bool:
    """Whether activation checkpointing runs a piece of some forward again.

    It does so in the middle of a backward pass with gradients enabled, which hooks on gradients
    do not have; what that piece reads must be what it read the first time.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()


def _forward(base: type) -> Forward:
    @functools.wraps(base.forward)  # type: ignore[attr-defined]
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plan = plan_of(self)
        if plan is None:
            return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        if plan.inputs is not None:
            args, kwargs = cast_call(args, kwargs, plan.inputs)
        run = _run_compiling if torch.compiler.is_compiling() else _run
        result = run(base.forward, self, plan, args, kwargs)  # type: ignore[attr-defined]
        return result if plan.result is None else cast_nested(result, plan.result)

    return forward


def _run(forward: Forward, self: nn.Module, plan: LayerPlan, args: Any, kwargs: Any) -> Any:
    if not calls.stack:
        return _run_outermost(forward, self, plan, args, kwargs)
    saved = plan.region.enter(calls.devices) if plan.region is not None else None
    calls.stack.append(self)
    try:
        return forward(self, *args, **kwargs)
    except RuntimeError as error:
        _explain(error, plan)
        raise
    finally:
        calls.stack.pop()
        leave(saved)


def _run_outermost(
    forward: Forward, self: nn.Module, plan: LayerPlan, args: Any, kwargs: Any
) -> Any:
    entry = entry_of(self)
    watch = self.training not in entry.watched and not traced()
    copies = copies_for(self, entry, watch)
    calls.copies, calls.devices = copies, entry.devices
    saved = plan.region.enter(calls.devices) if plan.region is not None else None
    calls.stack.append(self)
    try:
        result = forward(self, *args, **kwargs)
    except RuntimeError as error:
        _explain(error, plan)
        raise
    finally:
        calls.stack.clear()
        calls.copies = None
        leave(saved)
    if watch:
        _check_written(self, copies)
        _check_loss(self, plan, result)
        entry.watched.add(self.training)
    return result


def _check_written(model: nn.Module, copies: WeightCopies) -> None:
    """Raise if a layer changed a weight in its forward: the change went to a copy."""
    written = set(map(id, copies.written_to()))
    if not written:
        return
    names = [name for name, weight in model.named_parameters() if id(weight) in written]
    raise PolicyError(
        f"The forward of this {type(model).__name__} changes {', '.join(names)}, but what it "
        "sees there is a 16-bit copy: the weight itself would stay as it is. Give the layer the "
        "policy 'float32' (overrides={'<path>': 'float32'}), or change the weight outside of "
        "forward."
    )


def _check_loss(model: nn.Module, plan: LayerPlan, result: Any) -> None:
    """Warn of a loss that the model computed itself, in 16 bits: its cast to float32 is late."""
    if plan.path or plan.functional != "compute":
        return
    found: list[torch.Tensor] = []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 and tensor.dtype in LOW and tensor.requires_grad:
            found.append(tensor)
        return tensor

    cast_nested(result, look)
    if found:
        warnings.warn(
            f"This {type(model).__name__} returns a scalar in {found[0].dtype} that requires grad: "
            "a loss, computed in 16 bits. Compute it outside of the model, from outputs in "
            "float32, or use functional='autocast'.",
            PolicyWarning,
            stacklevel=5,
        )


def _run_compiling(
    forward: Forward, self: nn.Module, plan: LayerPlan, args: Any, kwargs: Any
) -> Any:
    quietly = torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer
    quietly(_push, self)
    try:
        if plan.region is None:
            return forward(self, *args, **kwargs)
        with plan.region.context(self_device(self)):
            return forward(self, *args, **kwargs)
    finally:
        quietly(_pop)


# Dynamo refuses side effects inside of a checkpointed function; these two undo each other.
def _push(module: nn.Module) -> None:
    calls.stack.append(module)


def _pop() -> None:
    calls.stack.pop()


_TWO_DTYPES = (
    "same dtype", "same scalar type", "expected scalar type", "dtypes match", "mixed dtype",
    "to have the same type", "should be the same",
)  # fmt: skip
"""What torch says, here and there, when two dtypes meet in one operation."""


def _explain(error: RuntimeError, plan: LayerPlan) -> None:
    """Add to torch's complaint about two dtypes where they met and what helps."""
    mixed = any(words in str(error) for words in _TWO_DTYPES)
    if not mixed or getattr(error, "__notes__", None):
        return
    advice = (
        "keep what this module makes itself in its inputs' dtype, give it a policy of its own, "
        "or use functional='autocast'"
        if plan.functional == "compute"
        else "cast one of them, or give this module a policy of its own"
    )
    error.add_note(
        f"halfstep: two dtypes met in {plan.path or 'the model'!r}, which computes in "
        f"{plan.policy.compute_dtype}: {advice}."
    )


def _register(module: nn.Module) -> None:
    plan = plan_of(module)
    if plan is not None:
        register_parameters(module, plan)


def _apply(base: type) -> Forward:
    def apply(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forget_entry(self)  # .to(), .cuda(), .half(): weights move or change
        result = base._apply(self, *args, **kwargs)  # type: ignore[attr-defined]
        _register(self)
        return result

    return apply


def _setstate(base: type) -> Callable[[nn.Module, Any], None]:
    def setstate(self: nn.Module, state: Any) -> None:
        base.__setstate__(self, state)  # type: ignore[attr-defined]
        _register(self)  # a deep copy, or one from a file: its parameters are new

    return setstate


def _register_parameter(base: type) -> Callable[..., None]:
    @functools.wraps(base.register_parameter)  # type: ignore[attr-defined]
    def register_parameter(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        base.register_parameter(self, *args, **kwargs)  # type: ignore[attr-defined]
        _register(self)

    return register_parameter
