"""Mixed precision for a model as it is: its compiled graphs are rewritten, not its code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ...core.loss_scale import LossScale
from ...core.policy import Policy, PolicyMap
from ...errors import PolicyError
from ..loss_scaling import LossScaleOptimizer
from .painting import Painter
from .settings import Settings, make_settings

Model = TypeVar("Model", bound=Callable[..., Any])

_settings_of: WeakKeyDictionary[Any, Settings] = WeakKeyDictionary()

_TORCHS = frozenset(("device_type", "dtype", "enabled", "cache_enabled"))
"""Arguments of `torch.autocast`."""


def _no_context(rewrite: Model) -> Model:
    """Refuse what is meant for `torch.autocast`, which has this name and is a context manager."""

    @functools.wraps(rewrite)
    def checked(*args: Any, **keywords: Any) -> Any:
        device = bool(args) and isinstance(args[0], (str, bool, torch.device))
        if device or _TORCHS & keywords.keys() or not (args or "model" in keywords):
            raise PolicyError(
                "halfstep.torch.autocast rewrites a model, autocast(model, 'mixed_float16'), and "
                "is no context manager. Instead of `with torch.autocast(...)` around each call, "
                "apply_policy(model, 'mixed_float16') once, or keep torch.autocast."
            )
        return rewrite(*args, **keywords)

    kept: Any = checked
    return kept  # type: ignore[no-any-return]


@_no_context
def autocast(
    model: Model,
    policy: Policy | PolicyMap | str = "mixed_bfloat16",
    *,
    allow: Iterable[object] = (),
    deny: Iterable[object] = (),
    level: str = "full",
    backend: str = "inductor",
    fullgraph: bool = False,
    dynamic: bool | None = None,
) -> Model:
    """Return ``torch.compile(model)`` with its matrix products, and what lies between, in 16 bits.

    The model is traced as it is, in float32, forward and backward pass together; every operation
    of the graph gets a dtype (see :mod:`halfstep.core.paint`); and the graph is compiled with
    casts where dtypes meet. Nothing is edited: parameters, gradients, inputs and outputs stay
    float32. What ``torch.autocast`` cannot take is fine here: ``autograd.Function`` without
    ``custom_fwd``, ``masked_fill`` with float32's lowest number, checkpoints, in-place code.

    Each shape and each ``train()`` or ``eval()`` is a graph of its own, as with
    ``torch.compile``. A call raises where nothing at all would run in 16 bits; the first one warns
    of modules that Dynamo did not capture, and later ones of what falls back to float32.

    Args:
        model: a module or a function.
        policy: ``"mixed_bfloat16"``, ``"mixed_float16"`` (with a
            :class:`~halfstep.torch.LossScaleOptimizer` then), or a :class:`~halfstep.PolicyMap`
            over the paths of the model's modules: ``PolicyMap("mixed_bfloat16", {"head":
            "float32"})``.
        allow: operations to run in 16 bits beside those of the list, by ATen's names (``"pow"``)
            or as they are (``torch.ops.aten.pow``).
        deny: operations to keep in float32, with their derivatives and with what Inductor makes
            of them; what computes with their results stays there.
        level: ``"full"``, or ``"matrix_products"`` for these alone, with nothing between them.
        backend: ``"inductor"``, or ``"aot_eager"``, which runs the same graph without compiling.
        fullgraph: raise at a graph break, as for ``torch.compile``.
        dynamic: whether sizes are dynamic, as for ``torch.compile``.

    Returns:
        What ``torch.compile`` returns; a module's parameters are the model's own.

    Raises:
        PolicyError: an unknown policy, operation, level, backend or path, and, in the first call,
            when nothing would run in 16 bits.

    >>> import torch
    >>> from halfstep.torch import autocast
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    >>> compiled = autocast(model, backend="aot_eager")
    >>> out = compiled(torch.ones(3, 4))
    >>> out.sum().backward()
    >>> out.dtype, model[0].weight.grad.dtype
    (torch.float32, torch.float32)
    """
    settings = make_settings(model, policy, allow, deny, level, backend)
    made: Model = _compiled(replace(settings, fullgraph=fullgraph, dynamic=dynamic))
    return made


def _compiled(settings: Settings) -> Any:
    painter = settings.painter()
    from .backend import COMPILERS  # Dynamo takes two seconds to import

    compiled: Any = torch.compile(
        settings.model,
        backend=COMPILERS[settings.backend](painter),
        fullgraph=settings.fullgraph,
        dynamic=settings.dynamic,
    )
    checked = _checked(compiled, settings, painter)
    _settings_of[checked] = settings
    return checked


def settings_of(model: Callable[..., Any]) -> Settings | None:
    """Return what :func:`autocast` was asked for, None for anything else."""
    try:
        return _settings_of.get(model)
    except TypeError:  # what cannot be referred to weakly did not come from there
        return None


def enable_mixed_precision_graph_rewrite(
    model: Model,
    optimizer: torch.optim.Optimizer,
    loss_scale: LossScale | float | str | None = "dynamic",
    *,
    backend: str = "inductor",
) -> tuple[Model, LossScaleOptimizer]:
    """Rewrite a model to float16 and give its optimizer a loss scale: two changes in one line.

    The name is that of TensorFlow's one-liner, which did this to a graph of TensorFlow.

    Args:
        model: a module or a function.
        optimizer: over its parameters.
        loss_scale: as for :class:`~halfstep.torch.LossScaleOptimizer`.
        backend: as for :func:`autocast`.

    Returns:
        The rewritten model and the wrapped optimizer.

    Raises:
        PolicyError: as for :func:`autocast`.
        LossScaleError: as for :class:`~halfstep.torch.LossScaleOptimizer`.

    >>> import torch
    >>> model = torch.nn.Linear(4, 2)
    >>> model, optimizer = enable_mixed_precision_graph_rewrite(
    ...     model, torch.optim.SGD(model.parameters(), lr=0.1), backend="aot_eager"
    ... )
    >>> optimizer.backward(model(torch.ones(3, 4)).mean())
    >>> optimizer.step()
    >>> optimizer.last_step_skipped
    False
    """
    wrapped = LossScaleOptimizer(optimizer, loss_scale)
    return autocast(model, "mixed_float16", backend=backend), wrapped


def _checked(compiled: Any, settings: Settings, painter: Painter) -> Any:
    """Look at what comes of every call, once it is over."""
    from .rewritten import become_rewritten
    from .watch import Watch, untraced

    watch = Watch(settings, painter)
    if isinstance(compiled, nn.Module):
        become_rewritten(compiled, watch, _compiled, settings)
        return compiled

    @functools.wraps(settings.model)
    def watched(*args: Any, **kwargs: Any) -> Any:
        before, around = watch.begin(), watch.around()
        if around is None:
            result = compiled(*args, **kwargs)
        else:
            with around:
                result = compiled(*args, **kwargs)
        watch.end(before)
        return result

    return untraced(watched)
