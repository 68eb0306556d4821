"""The float32 side of an optimizer whose parameters have 16 bits.

Between steps an optimizer is as its user made it: its groups hold the model's parameters, and its
state stands under them. For a step it is lent float32 values instead, so that any optimizer runs
unchanged, in float32; afterwards they are rounded into the parameters.

Many weights are lent at a time, but not all: what is float32 only for a step is at most
``PART_BYTES`` large, however large the model is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ...core.policy import Policy
from ...core.policy_names import Update
from ...errors import LossScaleError, LossScaleWarning
from ..bare_steps import lending
from ..casting import LOW
from ..masters import CLOSE, OPEN, Kept, beside, kept_before, kept_of, recall, widened_all
from ..registry import policy_of_parameter, tell
from .closures import evaluates_once
from .gradients import groups_of
from .guards import is_hooked

_SCALE_WANTED = (
    "{policy} wants a loss scale, and the LossScaleOptimizer of these parameters was made without "
    "one: small gradients are lost. Wrap the optimizer after apply_policy, or pass loss_scale=."
)

PART_BYTES = 64 * 2**20
"""How many bytes of float32 gradients there are at most, while parts of the model step in turn."""

Groups = list[list[Tensor]]


class WideSide:
    """Lends an optimizer float32 values of its 16-bit parameters.

    Args:
        optimizer: the inner optimizer. Parameters without a policy, or whose policy is not about
            memory, are left to it as they are.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._own: list[Tensor] = []
        self._ids: list[int] = []  # of tensors that are held here: no other one has such an id
        self._dtypes: list[torch.dtype] = []
        self._managed: dict[int, Update] = {}
        self._kept: dict[int, Kept] = {}
        self._state_dtypes: dict[int, torch.dtype] = {}
        self._unsettled: dict[int, Kept | None] = {}
        self._lazy = False  # some have no values yet, and so nothing that is kept
        self._parts: list[Groups] = []
        self._widened: list[Tensor] = []
        self.settled_scale = True  # there is a loss scale, or the user wanted none
        self.follow()
        tell(self)

    def __bool__(self) -> bool:
        return bool(self._managed or self._unsettled)

    def follow(self) -> None:
        """Look again at the parameters: groups are added, and dtypes change.

        Of policies it is told by `policy_changed`.

        Raises:
            LossScaleError: inside ``torch.compile``, where it cannot look.
        """
        own = [p for group in groups_of(self._optimizer) for p in group["params"]]
        ids, dtypes = [id(p) for p in own], [p.dtype for p in own]
        same = ids == self._ids and dtypes == self._dtypes
        if same and not self._unsettled and not self._lazy:
            return
        if torch.compiler.is_compiling():
            self._refuse_in_graph(dtypes)
            return
        self._own, self._ids, self._dtypes, self._parts = own, ids, dtypes, []
        self._lazy = any(map(is_lazy, own))
        for key in self._state_dtypes.keys() - set(ids):
            del self._state_dtypes[key]
            self._leave(key)
        for parameter in own:
            self._see(parameter, policy_of_parameter(parameter))
        self._unsettled.clear()

    def policy_changed(self, parameter: Tensor, policy: Policy | None) -> None:
        """Follow another policy of a parameter at once: a graph could not."""
        key = id(parameter)
        if key not in self._state_dtypes:
            return
        self._dtypes[self._ids.index(key)] = parameter.dtype
        if policy is not None:
            self._see(parameter, policy)
            self._unsettled.pop(key, None)
            return
        kept = self._kept.get(key)
        self._leave(key)
        if self._state_dtypes[key] is not parameter.dtype:
            # another policy may come at once, and want the state and the digits as they are
            self._unsettled[key] = kept

    def _refuse_in_graph(self, dtypes: list[torch.dtype]) -> None:
        if self._managed or self._unsettled or any(dtype in LOW for dtype in dtypes):
            raise LossScaleError(
                f"The parameters of {type(self._optimizer).__name__}, or their dtypes, are others "
                "than at the last step, which cannot be followed inside torch.compile. Take one "
                "step outside first."
            )

    def _leave(self, key: int) -> None:
        self._managed.pop(key, None)
        self._kept.pop(key, None)

    def _see(self, parameter: Tensor, policy: Policy | None) -> None:
        if policy is not None and policy.loss_scale.skips and not self.settled_scale:
            self.settled_scale = True  # said once
            warnings.warn(_SCALE_WANTED.format(policy=policy), LossScaleWarning, stacklevel=2)
        key, dtype = id(parameter), parameter.dtype
        managed = key in self._managed
        self._leave(key)
        if policy is not None and policy.update != "plain" and dtype in LOW:
            if (left := self._unsettled.get(key)) is not None:
                recall(parameter, left)
            self._managed[key] = policy.update
            if not is_lazy(parameter):
                self._kept[key] = kept_of(parameter)
            dtype = torch.float32
        before = self._state_dtypes.get(key)
        self._state_dtypes[key] = dtype
        if key in self._managed and not managed:
            # of steps that were taken before this: an average in 16 bits loses updates as a weight
            self._cast_state(parameter, LOW, torch.float32)
        elif before not in (None, dtype) and (policy is not None or key in self._unsettled):
            self._cast_state(parameter, (before,), dtype)

    def _cast_state(
        self, parameter: Tensor, before: Collection[torch.dtype | None], dtype: torch.dtype
    ) -> None:
        state = self._optimizer.state.get(parameter, {})
        for name, value in state.items():
            if name != "step" and isinstance(value, Tensor) and value.dtype in before:
                state[name] = value.to(dtype)

    def refuse_closure(self) -> None:
        """Raise for an optimizer that evaluates its closure itself.

        Raises:
            LossScaleError: it changes parameters between evaluations, which must be the model's.
        """
        if self._managed:
            raise LossScaleError(
                f"{type(self._optimizer).__name__} evaluates its closure itself, on the model's "
                "own parameters, so it cannot step on float32 values of 16-bit ones. Use "
                "'mixed_float16' or 'mixed_bfloat16', whose parameters are float32."
            )

    # ------------------------------------------------------------------ lending

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Lend the optimizer everything at once, to save, load or look at its state.

        What is float32 for a step only has no values then, but dtype and device.
        """
        if not self._managed:
            yield
            return
        groups = self._all()
        pairs = [(low, self._stand_in(low)) for low in self._of(groups)]
        with self._in_place_of(groups, pairs):
            yield

    def _stand_in(self, low: Tensor) -> Tensor:
        if self._managed[id(low)] == "master" and not is_lazy(low):
            return kept_of(low).rest
        return torch.empty(0, dtype=torch.float32, device=low.device)

    def step(self, take: Callable[[], Any], found: Tensor | None) -> Any:
        """Let the optimizer step on float32 values and gradients, a part of the model at a time.

        Args:
            take: steps with the gradients that the optimizer's parameters have then, or skips.
            found: 1.0 if it skips, 0.0 if it does not, None if it never does.
        """
        result = None
        for groups in self._split():
            lows = [low for low in self._of(groups) if low.grad is not None]
            kept: dict[Update, tuple[list[Tensor], list[Kept]]] = {u: ([], []) for u in OPEN}
            for low in lows:
                kept[self._managed[id(low)]][0].append(low)
                kept[self._managed[id(low)]][1].append(self._kept_of(low))
            result = self._step_part(groups, kept, take, found)
        return result

    def _kept_of(self, low: Tensor) -> Kept:
        if torch.compiler.is_compiling():  # Dynamo does not trace dictionaries of weak references
            return beside(low, self._kept[id(low)])
        return kept_before(low)

    def _step_part(
        self,
        groups: Groups,
        kept: dict[Update, tuple[list[Tensor], list[Kept]]],
        take: Callable[[], Any],
        found: Tensor | None,
    ) -> Any:
        opened = {update: OPEN[update](*both) for update, both in kept.items() if both[0]}
        pairs = [
            p for update, wide in opened.items() for p in zip(kept[update][0], wide, strict=True)
        ]
        grads = widened_all([low.grad for low, _ in pairs if low.grad is not None])
        for (_, wide), grad in zip(pairs, grads, strict=True):
            wide.grad = grad
        try:
            with self._in_place_of(groups, pairs), lending(self._optimizer):
                result = take()
        finally:
            for _, wide in pairs:
                wide.grad = None
        for update, wides in opened.items():
            lows, rests = kept[update]
            CLOSE[update](lows, rests, wides, found)
        return result

    @contextmanager
    def _in_place_of(self, groups: Groups, pairs: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
        optimizer = self._optimizer
        own = [group["params"] for group in groups_of(optimizer)]
        wide = {id(low): value for low, value in pairs}
        _rename(optimizer.state, pairs)
        for group, lows in zip(groups_of(optimizer), groups, strict=True):
            group["params"] = [wide.get(id(low), low) for low in lows]
        try:
            yield
        finally:
            for group, lows in zip(groups_of(optimizer), own, strict=True):
                group["params"] = lows
            _rename(optimizer.state, [(value, low) for low, value in pairs])

    def _of(self, groups: Groups) -> list[Tensor]:
        return [low for lows in groups for low in lows if id(low) in self._managed]

    def _all(self) -> Groups:
        return [list(group["params"]) for group in groups_of(self._optimizer)]

    def _split(self) -> list[Groups]:
        """The parameters by group, in parts; one part where the optimizer might mind.

        Those of torch update each parameter by itself; of others, and of hooks, nothing is known.
        """
        whole = torch.compiler.is_compiling()  # a graph says itself what is in memory, and when
        if whole or not evaluates_once(self._optimizer) or is_hooked(self._optimizer):
            return [self._all()]
        if not self._parts:
            self._parts = list(_parts(self._all()))
        return self._parts

    # ------------------------------------------------------------------ gradients

    def unscaled(self, divide: Callable[[], Any]) -> None:
        """Put the float32 values of 16-bit gradients in their place, and divide those.

        In 16 bits an unscaled gradient would lose what it was scaled for.

        Raises:
            LossScaleError: inside ``torch.compile``.
        """
        if torch.compiler.is_compiling():
            raise LossScaleError(
                "unscale_() inside torch.compile: the gradients of 16-bit parameters would become "
                "float32 ones in their place, which Dynamo does not trace. Leave it out: step() "
                "unscales by itself, and clips with max_norm=."
            )
        for low in self._of(self._all()):
            if low.grad is not None and low.grad.dtype in LOW:
                _put_as(low, torch.float32)
                self._widened.append(low)
        divide()

    def narrow_again(self) -> None:
        """Let gradients come back in 16 bits, and what is left of the unscaled ones have 16 too.

        DDP and FSDP2 know one dtype of a gradient, and what clears one does not tell of it.
        """
        if torch.compiler.is_compiling():  # which takes no gradient of another dtype
            return
        for low in self._widened:
            _put_as(low, low.dtype)
        self._widened = []


def gradient_dtype(parameter: Tensor) -> torch.dtype | None:
    """Return ``.grad_dtype``, which Dynamo does not trace: in a graph it stays what it is."""
    return None if torch.compiler.is_compiling() else parameter.grad_dtype


def put_gradient(parameter: Tensor, grad: Tensor | None, dtype: torch.dtype | None) -> None:
    """Set ``.grad``, which may have another dtype than the parameter, and ``.grad_dtype``."""
    if torch.compiler.is_compiling():
        parameter.grad = grad
        return
    parameter.grad = None
    if parameter.grad_dtype is not dtype:
        parameter.grad_dtype = dtype
    parameter.grad = grad


def _put_as(parameter: Tensor, dtype: torch.dtype) -> None:
    """Cast ``.grad`` in its place; a ``.grad_dtype`` of None takes any, and stays."""
    grad, kept = parameter.grad, parameter.grad_dtype
    put_gradient(
        parameter, None if grad is None else grad.to(dtype), None if kept is None else dtype
    )


def _rename(state: Any, pairs: list[tuple[Tensor, Tensor]]) -> None:
    for old, new in pairs:
        if old in state:
            state[new] = state.pop(old)


def _parts(groups: Groups) -> Iterator[Groups]:
    part: Groups = [[] for _ in groups]
    size = 0
    for place, lows in enumerate(groups):
        for low in lows:
            bytes_here = 0 if is_lazy(low) else 4 * low.numel()
            if size and size + bytes_here > PART_BYTES:
                yield part
                part, size = [[] for _ in groups], 0
            part[place].append(low)
            size += bytes_here
    yield part
