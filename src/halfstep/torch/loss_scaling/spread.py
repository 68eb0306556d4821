"""Gradients that lie on several ranks: who must agree about a step, and their norm together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ...errors import LossScaleError
from ..shards import is_dtensor
from .gradients import Bucket, Gradients, Verdict, clipping_divisor, norms_of


class Flag(NamedTuple):
    """What the ranks say of a step together; 0-dim tensors.

    Attributes:
        found: 1.0 if a gradient is not finite on any rank, else 0.0.
        taken: whether any rank has a gradient; None: this one has.
        scaled: whether any rank has gradients of a loss that it scaled; None: nobody was asked.
    """

    found: Tensor
    taken: Tensor | None = None
    scaled: Tensor | None = None


@dataclass(frozen=True)
class Ranks:
    """The process groups of a step; each is one ``all_reduce``, in this order.

    Attributes:
        norms: the ranks that hold the parts of the gradients; none for plain tensors.
        flags: those that must agree on skipping, beyond ``norms``.
        only_flags: those that must agree where no norm is measured.
        count: how many ranks ``norms`` reach together.
        dtype: in which norms are added.
    """

    norms: tuple[dist.ProcessGroup, ...] = ()
    flags: tuple[dist.ProcessGroup, ...] = ()
    only_flags: tuple[dist.ProcessGroup, ...] = ()
    count: int = 1
    dtype: torch.dtype = torch.float32

    def __bool__(self) -> bool:
        return bool(self.norms or self.flags)


ALONE = Ranks()
"""Nobody to agree with."""


class Agreement:
    """Knows the `Ranks` of an optimizer, and looks again when its parameters are others.

    Args:
        optimizer: the inner optimizer.
        process_group: what the user said; None leaves it to the parameters, if they are DTensors.
    """

    def __init__(self, optimizer: Optimizer, process_group: dist.ProcessGroup | None) -> None:
        self._optimizer = optimizer
        self._group = process_group
        self._seen: Any = None
        self._ranks = ALONE

    def ranks(self, skips: bool) -> Ranks:
        """Return the groups to agree with.

        Args:
            skips: whether a step can be skipped, so that all must know.

        Raises:
            LossScaleError: DTensors that do not say who must agree, and no ``process_group``.
        """
        if self._group is None and not (dist.is_available() and dist.is_initialized()):
            return ALONE
        if self._seen is not None and torch.compiler.is_compiling():
            return self._ranks
        groups = self._optimizer.param_groups
        first = next((p for group in groups for p in group["params"]), None)
        seen = skips, id(first), type(first), [len(group["params"]) for group in groups]
        if seen != self._seen:
            own = [p for group in groups for p in group["params"]]
            self._ranks = _ranks_of(own, self._group, skips)
            self._seen = seen
        return self._ranks


def _ranks_of(parameters: Iterable[Tensor], group: dist.ProcessGroup | None, skips: bool) -> Ranks:
    meshes: dict[Any, None] = {}
    dtype = torch.float32
    for parameter in parameters:
        if parameter.dtype in (torch.float64, torch.complex128):
            dtype = torch.float64  # on every rank alike: they exchange it
        if is_dtensor(parameter):
            sharded: Any = parameter
            meshes[sharded.device_mesh] = None
    if not meshes:
        return ALONE if group is None else Ranks((), (group,), (group,), 1, dtype)
    widest = max(meshes, key=lambda mesh: int(mesh.size()))
    holders = set(widest.mesh.flatten().tolist())
    for mesh in meshes:
        if not set(mesh.mesh.flatten().tolist()) <= holders:
            raise LossScaleError(
                f"The parameters are DTensors on the meshes {mesh} and {widest}, neither of which "
                "holds all ranks of the other: their gradients cannot be judged together. Use one "
                "optimizer for each."
            )
    return _groups(widest, holders, group, skips, dtype)


def _groups(
    mesh: Any, holders: set[int], group: dist.ProcessGroup | None, skips: bool, dtype: torch.dtype
) -> Ranks:
    told = set() if group is None else set(dist.get_process_group_ranks(group))
    if group is None and skips and len(holders) < dist.get_world_size():
        raise LossScaleError(
            f"The parameters are DTensors on {mesh}, which holds {len(holders)} of the "
            f"{dist.get_world_size()} processes: pass process_group=, the group of all that must "
            "skip a step together (torch.distributed.group.WORLD for all)."
        )
    if len(holders) == 1:
        flags = (group,) if group is not None else ()
        return Ranks((), flags, flags, 1, dtype)
    everybody = dist.group.WORLD
    norms: tuple[dist.ProcessGroup, ...]
    if group is not None and told == holders:
        norms = (group,)
    elif everybody is not None and len(holders) == dist.get_world_size():
        norms = (everybody,)
    else:
        norms = tuple(mesh.get_group(place) for place in range(mesh.ndim) if mesh.size(place) > 1)
    flags = () if group is None or told <= holders else (group,)
    only_flags = flags if holders <= told and flags else (*norms, *flags)
    return Ranks(norms, flags, only_flags, len(holders), dtype)


def agree(ranks: Ranks, found: Tensor, present: bool, scaled: bool = True) -> Flag:
    """Take the largest flag of all ranks; a rank without gradients has nothing against it."""
    if not ranks.only_flags:
        return Flag(found)
    flags = torch.stack([found, *(torch.full_like(found, float(x)) for x in (present, scaled))])
    for group in ranks.only_flags:
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return Flag(flags[0], flags[1] > 0, flags[2] > 0)


def judge_together(
    ranks: Ranks,
    grads: Gradients,
    scale: Tensor,
    max_norm: float,
    home: torch.device,
    before: Tensor | None = None,
    told: tuple[bool, bool] = (True, True),
) -> tuple[Verdict, Flag]:
    """Measure gradients that lie on several ranks: `judge` and `agree` in one exchange.

    ::

        squares = sum of |part|^2 * copies               # of the parts of this rank, one pass
        squares, found, present, scaled = all_reduce(sum)  # four numbers
        norm    = sqrt(squares)

    A part that is whole on n ranks counts for 1/n on each of them.

    Args:
        ranks: with ``norms``.
        grads: what `gather` returned: the parts of this rank.
        scale: what they were scaled by, 0-dim float32.
        max_norm: the largest norm of the unscaled gradients.
        home: the device of the verdict.
        before: 1.0 if unscaling saw, on this rank, what is not finite.
        told: whether this rank has gradients, and whether of a loss that it scaled.
    """
    numbers = torch.zeros(4, dtype=ranks.dtype, device=home)
    for key, norms in norms_of(grads):
        each = norms.to(home, ranks.dtype) / scale
        numbers[0] += each.square().sum() * (_ways(key) / ranks.count)
    if before is not None:
        numbers[1] = before
    numbers[2], numbers[3] = map(float, told)
    for group in ranks.norms:
        dist.all_reduce(numbers, group=group)
    norm = numbers[0].sqrt()
    bad = torch.isfinite(norm).logical_not_() | (numbers[1] > 0)
    flags = torch.stack([bad, *(numbers[2:] > 0)]).to(torch.float32)
    for group in ranks.flags:
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    divisor = clipping_divisor(norm, scale, max_norm)
    return Verdict(flags[0], divisor, norm), Flag(flags[0], flags[1] > 0, flags[2] > 0)


def _ways(key: Bucket) -> int:
    """In how many parts the gradients of a bucket are cut; 1 for what every rank has whole."""
    return key[2] if len(key) == 3 else 1
