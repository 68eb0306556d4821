"""What is kept of a 16-bit weight besides its 16 bits: a float32 master, or what rounding cut off.

`apply_policy` writes it down here where it rounds a float32 weight, `LossScaleOptimizer` keeps it
up to date, and `remove_policy` gives the weight its digits back from it.

::

    master:  weight = round(master)                        # master: float32
    kahan:   weight + rest = what float32 would hold       # rest: the weight's own 16-bit dtype

Source: masters are those of Micikevicius et al. 2017, arXiv:1710.03740, section 3.1; the
compensation is Kahan's sum as Zamirai et al. 2020, arXiv:2010.06192, use it for weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..core.policy_names import Update
from .casting import LOW, PLAIN
from .registry import forget as forget_policy
from .registry import policy_of_parameter, register
from .shards import cut_like, local, locals_of


@dataclass
class Kept:
    """What is kept of one parameter.

    Attributes:
        update: ``"master"`` or ``"kahan"``.
        rest: the master, or what rounding cut off.
    """

    update: Update
    rest: Tensor


# by identity, because tensors compare elementwise; weakly, because a model may go away
_kept: MutableMapping[Tensor, Kept] = WeakIdKeyDictionary()

# what was kept when the policy was applied, for shards of the weight that take its place later
_whole: MutableMapping[nn.Module, dict[str, Kept]] = WeakIdKeyDictionary()


def update_of(parameter: Tensor) -> Update:
    """Return how an optimizer writes into a parameter: ``"plain"`` unless it has 16 bits."""
    policy = policy_of_parameter(parameter) if parameter.dtype in LOW else None
    return "plain" if policy is None else policy.update


@torch.no_grad()
def keep(parameter: Tensor, exact: Tensor, update: Update) -> Kept:
    """Keep the digits of ``exact``, a float32 tensor of the parameter's shape.

    It may be the master from now on: nobody else may write to it.
    """
    return _keep_rest(
        parameter, exact if update == "master" else _cut_off(parameter, exact), update
    )


def _keep_rest(parameter: Tensor, rest: Tensor, update: Update) -> Kept:
    kept = _kept.get(parameter)
    if kept is None:
        kept = _kept[parameter] = Kept(update, rest)
    else:  # the same object: `_whole` must not keep an old master alive
        kept.update, kept.rest = update, rest
    return kept


def keep_for_shards(module: nn.Module, name: str) -> None:
    """Let what is kept of a module's parameter pass on to the shards that may take its place.

    ``fully_shard`` and ``parallelize_module`` put another parameter there, and the old one goes.
    """
    parameter = module._parameters[name]
    kept = None if parameter is None else _kept.get(parameter)
    if kept is not None:
        _whole.setdefault(module, {})[name] = kept


def follow(module: nn.Module) -> None:
    """Pass on what is kept of parameters that were replaced by shards; forget that of others."""
    wholes = _whole.get(module, {})
    for name, whole in list(wholes.items()):
        own = module._parameters.get(name)
        if own is None or (_kept.get(own) is not whole and type(own) in PLAIN):
            del wholes[name]
        elif type(own) not in PLAIN and own not in _kept:
            _pass_on(own, whole)
            wholes[name] = _kept.get(own, whole)  # it may be cut once more


def all_swap() -> bool:
    """Whether torch was asked to let parameters trade places in ``.to`` and ``load_state_dict``."""
    return torch.__future__.get_swap_module_params_on_conversion()


@contextmanager
def let_go(module: nn.Module) -> Iterator[None]:
    """Hold nothing of a module's that may trade places inside a ``with`` block, even weakly.

    ``nn.Module.to`` lets a DTensor trade places with another, which a weak reference forbids; and
    so do ``.to`` and ``load_state_dict`` with every parameter, where torch is asked for it.
    """
    swaps = all_swap()
    present = {name: p for name, p in module._parameters.items() if p is not None}
    own = {name: p for name, p in present.items() if swaps or type(p) not in PLAIN}
    kept = {name: _kept.pop(parameter) for name, parameter in own.items() if parameter in _kept}
    policies = {name: policy_of_parameter(parameter) for name, parameter in own.items()}
    for parameter in own.values():
        forget_policy(parameter)
    try:
        yield
    finally:
        for name, policy in policies.items():
            there = module._parameters[name]
            if there is not None and policy is not None:
                if name in kept:  # first: who is told of the policy asks for it
                    _kept[there] = kept[name]
                register(there, policy)


def adopt(parameter: Tensor, update: Update, rest: Tensor) -> None:
    """Keep what was kept of the parameter that this one is a copy of."""
    _keep_rest(parameter, rest, update)


def by_name(module: nn.Module) -> dict[str, tuple[Update, Tensor]]:
    """Return what is kept of a module's own parameters, by their names, for a copy of it."""
    return {
        name: (kept.update, kept.rest)
        for name, parameter in module._parameters.items()
        if parameter is not None and (kept := _agreeing(parameter)) is not None
    }


def _agreeing(parameter: Tensor) -> Kept | None:
    return None if known(parameter) is None else kept_of(parameter)


def forget(parameter: Tensor) -> None:
    """Keep nothing of ``parameter`` any more."""
    _kept.pop(parameter, None)


def forget_module(module: nn.Module) -> None:
    """Keep nothing of a module's own parameters any more."""
    _whole.pop(module, None)
    for parameter in module._parameters.values():
        if parameter is not None:
            forget(parameter)


def known(parameter: Tensor) -> Kept | None:
    """Return what is kept of ``parameter``, or None if nothing is yet.

    Of a shard that is at first its part of what was kept of the whole.
    """
    if parameter not in _kept and type(parameter) not in PLAIN and _whole:
        for module in list(_whole):
            follow(module)
    return _kept.get(parameter)


@torch.no_grad()
def _pass_on(shard: Tensor, whole: Kept) -> None:
    part = cut_like(whole.rest, shard)
    if part is not None and shard.dtype in LOW and whole.update == update_of(shard):
        take_rest(shard, part)


def kept_of(parameter: Tensor) -> Kept:
    """Return what is kept of ``parameter``, in agreement with it and beside it on its device.

    A weight that somebody has written to since (``load_state_dict``, an average of weights) holds
    what counts: a digit is kept only where the weight is still what it was rounded to.
    """
    kept = kept_before(parameter)
    _fit([parameter], [kept.rest], kept.update)
    return kept


def kept_before(parameter: Tensor) -> Kept:
    """Return what is kept of ``parameter``, beside it on its device; it may have changed since."""
    kept = known(parameter)
    update = update_of(parameter)
    if kept is None or kept.update != update or kept.rest.shape != parameter.shape:
        return keep(parameter, parameter.detach().to(torch.float32), update)
    return beside(parameter, kept)


def beside(parameter: Tensor, kept: Kept) -> Kept:
    """Return ``kept`` on the parameter's device, to which the model may have moved since."""
    if kept.rest.device != parameter.device:
        kept.rest = kept.rest.to(parameter.device)
    return kept


@torch.no_grad()
def take_rest(parameter: Tensor, rest: Tensor) -> None:
    """Keep a master or a compensation, bit for bit, wherever it belongs to what the weight is."""
    update = update_of(parameter)
    rest = rest.to(parameter.device, copy=True)
    _fit([parameter], [rest], update)
    _keep_rest(parameter, rest, update)


@torch.no_grad()
def add_digits(parameter: Tensor, exact: Tensor) -> None:
    """Keep the digits of ``exact`` wherever it rounds to what the weight is.

    A float32 parameter takes them itself, where it holds the rounding to either 16-bit dtype.
    """
    low = parameter.detach()
    exact = exact.to(low.device, torch.float32)
    if low.dtype in LOW:
        fits = exact.to(low.dtype) == low
        keep(parameter, torch.where(fits, exact, low.to(torch.float32)), update_of(parameter))
    elif low.dtype is torch.float32:
        fits = (exact.bfloat16().float() == low) | (exact.half().float() == low)
        parameter.copy_(torch.where(fits, exact, low))


def recall(parameter: Tensor, before: Kept) -> None:
    """Keep the digits that were kept under another policy, unless some are kept already."""
    if known(parameter) is None:
        add_digits(parameter, _joined(parameter, before))


def float32_of(parameter: Tensor) -> Tensor | None:
    """Return the parameter with every digit that is kept of it; None if nothing is."""
    kept = _agreeing(parameter) if parameter.dtype in LOW else None
    return None if kept is None else _joined(parameter, kept)


def exact_of(parameter: Tensor) -> Tensor:
    """Return everything that an optimizer knows of a parameter, in one tensor. Not a copy."""
    if update_of(parameter) == "plain":
        return parameter.detach()
    return _joined(parameter, kept_of(parameter))


@torch.no_grad()
def _joined(parameter: Tensor, kept: Kept) -> Tensor:
    return kept.rest if kept.update == "master" else parameter.detach().float() + kept.rest.float()


def _cut_off(parameter: Tensor, exact: Tensor) -> Tensor:
    return (exact - parameter.detach().to(torch.float32)).to(parameter.dtype)


# ---------------------------------------------------------------------- many at a time


def copy_all(into: Sequence[Tensor], out_of: Sequence[Tensor]) -> None:
    """Copy tensors into tensors, whatever their dtypes, with one launch for each device.

    DTensors are copied shard by shard: both must be placed alike.
    """
    buckets: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(into, out_of, strict=True):
        targets, sources = buckets.setdefault(target.device, ([], []))
        targets.append(local(target))
        sources.append(local(source))
    for targets, sources in buckets.values():
        torch._foreach_copy_(targets, sources)


def widened_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors in float32, with one launch for each device; sparse ones by themselves."""
    dense = [t for t in tensors if t.dtype is not torch.float32 and t.layout is torch.strided]
    wide = {id(t): torch.empty_like(t, dtype=torch.float32) for t in dense}
    copy_all(list(wide.values()), dense)
    return [wide[id(t)] if id(t) in wide else t.to(torch.float32) for t in tensors]


@torch.no_grad()
def _fit(lows: Sequence[Tensor], rests: Sequence[Tensor], update: Update) -> None:
    """Make what is kept agree with the weights, in place, whoever has written to those since.

    Every digit is looked at, on the device and with few launches: ``Tensor._version`` counts no
    write through ``.data``, and none of ``torch.distributed.broadcast``.
    """
    FIT[update](locals_of(lows), locals_of(rests))


def _fit_masters(lows: Sequence[Tensor], masters: Sequence[Tensor]) -> None:
    wide = widened_all([*lows, *_changed(lows, masters)])
    torch._foreach_lerp_(list(masters), wide[: len(lows)], wide[len(lows) :])  # exact for 0 and 1


def _fit_sums(lows: Sequence[Tensor], rests: Sequence[Tensor]) -> None:
    wide = widened_all([*lows, *rests])
    sums, inside = wide[: len(lows)], wide[len(lows) :]
    # a compensation of half the last place is a tie, which may round to the neighbour
    torch._foreach_mul_(inside, 0.99)
    torch._foreach_add_(sums, inside)
    changed = _changed(lows, sums)
    torch._foreach_neg_(changed)
    torch._foreach_add_(changed, 1.0)
    torch._foreach_mul_(list(rests), changed)


def _changed(lows: Sequence[Tensor], exact: Sequence[Tensor]) -> list[Tensor]:
    """Return 1.0 where a weight is not what an exact value rounds to, and 0.0 where it is."""
    rounded = [torch.empty_like(low) for low in lows]
    copy_all(rounded, exact)
    torch._foreach_sub_(rounded, list(lows))
    torch._foreach_sign_(rounded)
    torch._foreach_abs_(rounded)
    return rounded


def open_masters(lows: Sequence[Tensor], kept: Sequence[Kept]) -> list[Tensor]:
    """Return the float32 values to update: the masters themselves."""
    masters = [each.rest for each in kept]
    _fit(lows, masters, "master")
    return masters


def close_masters(
    lows: Sequence[Tensor], kept: Sequence[Kept], wide: Sequence[Tensor], found: Tensor | None
) -> None:
    """Round the masters into the weights. What was skipped is as it was, and rounds to that."""
    copy_all(lows, wide)


def open_sums(lows: Sequence[Tensor], kept: Sequence[Kept]) -> list[Tensor]:
    """Return the float32 values to update: weights and what was cut off them, together."""
    _fit(lows, [each.rest for each in kept], "kahan")
    wide = widened_all(lows)
    rests = widened_all([local(each.rest) for each in kept])
    torch._foreach_add_(locals_of(wide), rests)
    return wide


def close_sums(
    lows: Sequence[Tensor], kept: Sequence[Kept], wide: Sequence[Tensor], found: Tensor | None
) -> None:
    """Split the float32 values again, unless ``found`` says that they were not updated.

    It is asked because a sum can lie half-way between two roundings, and split the other way.
    """
    lows, wide = locals_of(lows), locals_of(wide)
    rounded = [torch.empty_like(low) for low in lows]
    copy_all(rounded, wide)
    rests = locals_of([each.rest for each in kept])
    cut = list(torch._foreach_sub(list(wide), widened_all(rounded)))
    if found is not None:
        taken = [found.to(low.device) == 0 for low in lows]
        rounded = list(map(torch.where, taken, rounded, lows))
        cut = list(map(torch.where, taken, cut, widened_all(rests)))
    copy_all([*lows, *rests], [*rounded, *cut])


FIT: dict[Update, Callable[..., None]] = {"master": _fit_masters, "kahan": _fit_sums}
OPEN: dict[Update, Callable[..., list[Tensor]]] = {"master": open_masters, "kahan": open_sums}
CLOSE: dict[Update, Callable[..., None]] = {"master": close_masters, "kahan": close_sums}
