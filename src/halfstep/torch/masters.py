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

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..core.policy_names import Update
from .casting import LOW
from .registry import policy_of_parameter

_PLAIN = (Tensor, nn.Parameter)


@dataclass
class Kept:
    """What is kept of one parameter.

    Attributes:
        update: ``"master"`` or ``"kahan"``.
        rest: the master, or what rounding cut off.
        version: ``_version`` of the parameter when the two were last made to agree.
    """

    update: Update
    rest: Tensor
    version: int


# by identity, because tensors compare elementwise; weakly, because a model may go away
_kept: MutableMapping[Tensor, Kept] = WeakIdKeyDictionary()


def update_of(parameter: Tensor) -> Update:
    """Return how an optimizer writes into a parameter: ``"plain"`` unless it has 16 bits."""
    policy = policy_of_parameter(parameter) if parameter.dtype in LOW else None
    return "plain" if policy is None else policy.update


@torch.no_grad()
def keep(parameter: Tensor, exact: Tensor, update: Update) -> Kept:
    """Keep the digits of ``exact``, a float32 tensor of the parameter's shape.

    It may be the master from now on: nobody else may write to it.
    """
    rest = exact if update == "master" else _cut_off(parameter, exact)
    kept = _kept[parameter] = Kept(update, rest, parameter._version)
    return kept


def adopt(parameter: Tensor, update: Update, rest: Tensor) -> None:
    """Keep what was kept of the parameter that this one is a copy of."""
    _kept[parameter] = Kept(update, rest, parameter._version)


def by_name(module: nn.Module) -> dict[str, tuple[Update, Tensor]]:
    """Return what is kept of a module's own parameters, by their names, for a copy of it."""
    return {
        name: (kept.update, kept.rest)
        for name, parameter in module._parameters.items()
        if parameter is not None and (kept := _agreeing(parameter)) is not None
    }


def _agreeing(parameter: Tensor) -> Kept | None:
    return None if _kept.get(parameter) is None else kept_of(parameter)


def forget(parameter: Tensor) -> None:
    """Keep nothing of ``parameter`` any more."""
    _kept.pop(parameter, None)


def known(parameter: Tensor) -> Kept | None:
    """Return what is kept of ``parameter``, or None if nothing is yet."""
    return _kept.get(parameter)


def kept_of(parameter: Tensor) -> Kept:
    """Return what is kept of ``parameter``, in agreement with it and beside it on its device.

    A weight that somebody has written to since (``load_state_dict``, an average of weights) holds
    what counts: a digit is kept only where the weight is still what it was rounded to.
    """
    kept = _kept.get(parameter)
    update = update_of(parameter)
    if kept is None or kept.update != update or kept.rest.shape != parameter.shape:
        return keep(parameter, parameter.detach().to(torch.float32), update)
    if kept.rest.device != parameter.device:
        kept.rest = kept.rest.to(parameter.device)
    if kept.version != parameter._version:
        add_digits(parameter, _joined(parameter, kept))
        kept = _kept[parameter]
    return kept


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
    """Copy tensors into tensors, whatever their dtypes, with one launch for each device."""
    buckets: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(into, out_of, strict=True):
        if type(target) in _PLAIN and type(source) in _PLAIN:
            targets, sources = buckets.setdefault(target.device, ([], []))
            targets.append(target)
            sources.append(source)
        else:  # DTensors
            target.copy_(source)
    for targets, sources in buckets.values():
        torch._foreach_copy_(targets, sources)


def widened_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors in float32, with one launch for each device; sparse ones by themselves."""
    dense = [t for t in tensors if t.dtype is not torch.float32 and t.layout is torch.strided]
    wide = {id(t): torch.empty_like(t, dtype=torch.float32) for t in dense}
    copy_all(list(wide.values()), dense)
    return [wide[id(t)] if id(t) in wide else t.to(torch.float32) for t in tensors]


def open_masters(lows: Sequence[Tensor], kept: Sequence[Kept]) -> list[Tensor]:
    """Return the float32 values to update: the masters themselves."""
    return [each.rest for each in kept]


def close_masters(
    lows: Sequence[Tensor], kept: Sequence[Kept], wide: Sequence[Tensor], found: Tensor | None
) -> None:
    """Round the masters into the weights. What was skipped is as it was, and rounds to that."""
    copy_all(lows, wide)


def open_sums(lows: Sequence[Tensor], kept: Sequence[Kept]) -> list[Tensor]:
    """Return the float32 values to update: weights and what was cut off them, together."""
    wide = widened_all(lows)
    torch._foreach_add_(wide, widened_all([each.rest for each in kept]))
    return wide


def close_sums(
    lows: Sequence[Tensor], kept: Sequence[Kept], wide: Sequence[Tensor], found: Tensor | None
) -> None:
    """Split the float32 values again, unless ``found`` says that they were not updated.

    It is asked because a sum can lie half-way between two roundings, and split the other way.
    """
    rounded = [torch.empty_like(low) for low in lows]
    copy_all(rounded, wide)
    rests = [each.rest for each in kept]
    cut = list(torch._foreach_sub(list(wide), widened_all(rounded)))
    if found is not None:
        taken = [found.to(low.device) == 0 for low in lows]
        rounded = list(map(torch.where, taken, rounded, lows))
        cut = list(map(torch.where, taken, cut, widened_all(rests)))
    copy_all([*lows, *rests], [*rounded, *cut])


OPEN: dict[Update, Callable[..., list[Tensor]]] = {"master": open_masters, "kahan": open_sums}
CLOSE: dict[Update, Callable[..., None]] = {"master": close_masters, "kahan": close_sums}
