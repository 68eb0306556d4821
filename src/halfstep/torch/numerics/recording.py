"""One recorded step: what is counted during it, and the one read at its end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.numerics.bins import exponent_of, is_power_of_two
from ...core.numerics.histogram import ExponentHistogram
from ...core.numerics.rows import BINS, DIGEST, histogram_of, row
from .counting import bins_of, digest_of, plain_tensor

LOST_IN = (torch.bfloat16, torch.float16)
"""The formats in which a weight could be stored, for which lost updates are counted."""

Identify: TypeAlias = Callable[[str, str, str, Tensor], int]
"""From kind, path, name and tensor to the id under which the record knows it."""


class Scaling(Enum):
    """How the numbers of a tensor stand to the loss scale."""

    NONE = "it has nothing to do with it"
    SCALED = "they are multiplied by it"
    UNSCALED = "they were, and have been divided"


@dataclass
class _Counted:
    """What lies on one device until the step is over."""

    digests: dict[int, Tensor] = field(default_factory=dict)
    merged: dict[tuple[str, Scaling], Tensor] = field(default_factory=dict)
    lost: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepNumbers:
    """A recorded step, on the host.

    Attributes:
        rows: a row of the record for each tensor.
        merged: the exact histogram of each kind of gradients, unscaled.
        scale: what the gradients were multiplied by.
        loss: the loss, None if none was seen.
        skipped: whether the step was skipped.
    """

    rows: list[dict[str, Any]]
    merged: dict[str, ExponentHistogram]
    scale: float
    loss: float | None
    skipped: bool


class Recording:
    """Counts what one step shows it, on the devices where that lies.

    Args:
        identify: gives each tensor the id that rows refer to.
        scale: what the gradients are multiplied by, asked when the first one comes.
        divide: whether to divide them first: a scale that is no power of two moves mantissas, and
            only numbers without it can be counted exactly.
    """

    def __init__(
        self, identify: Identify, scale: Callable[[], Tensor | None], divide: bool = False
    ) -> None:
        self._identify = identify
        self._scale = scale
        self._devices: dict[torch.device, _Counted] = {}
        self._scaling: dict[int, Scaling] = {}
        self._then: Tensor | None = None
        self._divide = divide
        self.open = True

    # ------------------------------------------------------------------ on the device

    def count(
        self, kind: str, path: str, name: str, value: Any, scaling: Scaling = Scaling.NONE
    ) -> None:
        """Count a tensor's numbers; several of one step under one name add up.

        Args:
            kind: of the record's kinds.
            path: of the module.
            name: of the parameter, or of the output.
            value: what to count; it is left out where it cannot be counted.
            scaling: how it stands to the loss scale.
        """
        tensor = plain_tensor(value)
        if tensor is None:
            return
        scale = None if scaling is Scaling.NONE else self.scale_then()
        if scale is not None and self._divide:
            if scaling is Scaling.SCALED:
                tensor = tensor.float() / scale.to(tensor.device)
            scale = None
        scaling = Scaling.NONE if scale is None else scaling
        bins = bins_of(tensor)
        identity = self._identify(kind, path, name, value)
        self._scaling[identity] = scaling
        counted = self._devices.setdefault(tensor.device, _Counted())
        _add(counted.digests, identity, digest_of(bins, scale, scaling is Scaling.UNSCALED))
        if kind.endswith("_gradient"):
            _add(counted.merged, (kind, scaling), bins)

    def count_update(self, path: str, name: str, before: Tensor, value: Any) -> None:
        """Count how far a parameter moved, element by element, as a share of itself."""
        after = plain_tensor(value)
        if after is None or after.shape != before.shape:
            return
        with torch.no_grad():
            moved = after - before
            share = torch.where(moved == 0, 0, moved.abs() / before.abs())
            lost = torch.stack([_lost(before, moved, dtype) for dtype in LOST_IN])
        self.count("update", path, name, share)
        identity = self._identify("update", path, name, share)
        self._devices[after.device].lost[identity] = lost

    def set_scale(self, scale: Tensor) -> None:
        """Take the scale from who knows it, unless it is known."""
        if self._then is None:
            self._then = scale.detach().clone()

    def scale_then(self) -> Tensor | None:
        """Return the scale of this step: a copy, since the step changes it in place."""
        if self._then is None:
            scale = self._scale()
            self._then = None if scale is None else scale.detach().clone()
        return self._then

    # ------------------------------------------------------------------ on the host

    def read(self, loss: Tensor | None, found: Tensor | None) -> StepNumbers:
        """Bring everything to the host, by one read for each device."""
        scalars = [loss, found, self.scale_then()]
        # accelerators first: the scalars travel with the counts of the first device, and lie there
        order = sorted(self._devices.items(), key=lambda pair: pair[0].type == "cpu")
        read = [_read(counted, scalars, device) for device, counted in order]
        loss_value, skipped, scale = read[0][1] if read else _floats(scalars)
        scale = 1.0 if math.isnan(scale) else scale
        shift = exponent_of(scale) if is_power_of_two(scale) else None
        hosts = [host for host, _ in read]
        return StepNumbers(
            rows=self._rows(hosts, shift, skipped == 1.0),
            merged=_merged(hosts, shift),
            scale=scale,
            loss=None if loss is None else loss_value,
            skipped=skipped == 1.0,
        )

    def _rows(self, hosts: list[_Host], shift: int | None, skipped: bool) -> list[dict[str, Any]]:
        rows = []
        for host in hosts:
            for identity, digest in host.digests.items():
                scaling = self._scaling[identity]
                if (shift is None and scaling is not Scaling.NONE) or (
                    skipped and identity in host.lost
                ):
                    continue
                fields = row(digest, shift or 0, scaling.name)
                if identity in host.lost:
                    fields |= _lost_fields(host.lost[identity])
                rows.append({"id": identity, **fields})
        return sorted(rows, key=lambda fields: fields["id"])


@dataclass(frozen=True)
class _Host:
    digests: dict[int, NDArray[np.int64]]
    merged: dict[tuple[str, Scaling], NDArray[np.int64]]
    lost: dict[int, NDArray[np.int64]]


def _add(known: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    if key in known:
        known[key].add_(value)
    else:
        known[key] = value


def _lost(before: Tensor, moved: Tensor, dtype: torch.dtype) -> Tensor:
    """How many elements that moved would have stayed, had the weight been stored in ``dtype``."""
    stored = before.to(dtype)
    stays = (stored.to(moved.dtype) + moved).to(dtype) == stored
    return (stays & (moved != 0)).sum()


def _read(
    counted: _Counted, scalars: list[Tensor | None], device: torch.device
) -> tuple[_Host, list[float]]:
    groups: list[dict[Any, Tensor]] = [counted.digests, counted.merged, counted.lost]
    parts = [value for group in groups for value in group.values()]
    flat = torch.cat([*parts, _packed(scalars, device)]).cpu().numpy()
    taken: list[dict[Any, NDArray[np.int64]]] = []
    for group, size in zip(groups, (DIGEST, BINS, len(LOST_IN)), strict=True):
        rows = flat[: size * len(group)].reshape(-1, size)
        taken.append(dict(zip(group, rows, strict=True)))
        flat = flat[size * len(group) :]
    return _Host(*taken), flat.view(np.float64).tolist()


def _packed(scalars: list[Tensor | None], device: torch.device) -> Tensor:
    """The scalars in the bits of int64, NaN for None, so that they travel with the counts."""
    nan = torch.full((), math.nan, dtype=torch.float64, device=device)
    moved = [
        nan if value is None else value.detach().to(device).double().mean() for value in scalars
    ]
    return torch.stack(moved).view(torch.int64)


def _floats(scalars: list[Tensor | None]) -> list[float]:
    return [math.nan if value is None else float(value.double().mean()) for value in scalars]


def _lost_fields(counts: NDArray[np.int64]) -> dict[str, Any]:
    names = [str(dtype).removeprefix("torch.") for dtype in LOST_IN]
    found = {name: count for name, count in zip(names, counts.tolist(), strict=True) if count}
    return {"lost": found} if found else {}


def _merged(hosts: list[_Host], shift: int | None) -> dict[str, ExponentHistogram]:
    found: dict[str, ExponentHistogram] = {}
    for host in hosts:
        for (kind, scaling), bins in host.merged.items():
            histogram = histogram_of(bins)
            if scaling is not Scaling.NONE and shift is None:
                continue  # a scale that was set by hand, to no power of two
            if scaling is Scaling.SCALED and shift is not None:
                histogram = histogram.scaled(math.ldexp(1.0, -shift))
            found[kind] = found.get(kind, ExponentHistogram()) + histogram
    return found
