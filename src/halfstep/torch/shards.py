"""DTensors, seen from one rank: its own part of each, and how a whole tensor is cut for it.

``torch.distributed.tensor`` takes seconds to import, so that it is imported here only where
there is a DTensor, which has imported it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PolicyError
from . import registry
from .casting import PLAIN


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is one rank's view of a tensor that several ranks hold.

    >>> is_dtensor(torch.ones(2))
    False
    """
    return type(tensor) not in PLAIN and hasattr(tensor, "_local_tensor")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, without a copy; any other tensor as it is."""
    if type(tensor) in PLAIN:
        return tensor
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's part of each tensor."""
    return [local(tensor) for tensor in tensors]


def placed_like(part: Tensor, pattern: Tensor) -> Tensor:
    """Return a DTensor of which ``part`` is this rank's, with the shape and ranks of another."""
    from torch.distributed.tensor import DTensor

    shaped: Any = pattern
    return DTensor.from_local(
        part,
        shaped.device_mesh,
        shaped.placements,
        run_check=False,
        shape=shaped.shape,
        stride=shaped.stride(),
    )


def cut_like(whole: Tensor, pattern: Tensor) -> Tensor | None:
    """Return a tensor that every rank has, placed as a DTensor is; nothing is sent.

    Where tensor parallelism has cut it already, FSDP2 cuts the part. It marks such a cut as
    strided, and that it comes after the plain ones.

    Args:
        whole: a plain tensor, or a DTensor on some of the pattern's dimensions.
        pattern: the DTensor.

    Returns:
        None where the parts do not come out as those of ``pattern``: an own way of sharding.
    """
    shaped: Any = pattern
    given: Any = whole
    if whole.shape != pattern.shape:
        return None
    names = shaped.device_mesh.mesh_dim_names or ()
    done = given.device_mesh.mesh_dim_names or () if is_dtensor(whole) else ()
    if is_dtensor(whole) and not set(done) < set(names):
        return None
    placements = list(enumerate(shaped.placements))
    plain = [p for p in placements if not hasattr(p[1], "split_factor")]
    strided = [p for p in placements if hasattr(p[1], "split_factor")]
    part = local(whole)
    for place, placement in [*plain, *reversed(strided)]:
        if placement.is_replicate() or (names and names[place] in done):
            continue
        if not hasattr(placement, "dim"):
            return None  # partial sums
        part = _chunk(part, placement.dim, shaped.device_mesh, place)
    if part.shape != local(pattern).shape:
        return None
    return placed_like(part.clone().to(local(pattern).device), pattern)


def _chunk(tensor: Tensor, dim: int, mesh: Any, place: int) -> Tensor:
    """Cut out this rank's part as ``torch.chunk`` does: the last ranks may have less, or none."""
    length = tensor.shape[dim]
    size = -(-length // mesh.size(place))
    start = min(size * mesh.get_local_rank(place), length)
    return tensor.narrow(dim, start, min(size, length - start))


def set_values(parameter: Tensor, values: Tensor) -> None:
    """Give a parameter other values, which may have another dtype; it stays the same object.

    ``Tensor.data`` does that for a plain one. Of a DTensor it would change the outside alone: it
    trades places with a new one, as in ``nn.Module.to``.

    Raises:
        PolicyError: something holds on to the DTensor as it is.
    """
    if not is_dtensor(parameter):
        parameter.data = values
        return
    policy = registry.policy_of_parameter(parameter)
    registry.forget(parameter)  # by a weak reference, and nothing may refer to what trades places
    other = nn.Parameter(values, parameter.requires_grad)
    try:
        torch.utils.swap_tensors(parameter, other)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise PolicyError(
            f"apply_policy: a sharded weight of shape {tuple(parameter.shape)} cannot change its "
            f"dtype now ({error}). Apply the policy before anything else looks at the weights, or "
            "before fully_shard and parallelize_module."
        ) from None
    finally:
        if policy is not None:
            registry.register(parameter, policy)


def refuse_after_forward(modules: Iterable[nn.Module]) -> None:
    """Raise if FSDP2 has gathered one of these modules already: it took note of the dtypes then.

    Raises:
        PolicyError: with what to do.
    """
    for module in modules:
        find: Any = getattr(module, "_get_fsdp_state", None)
        if find is not None and find()._is_root is not None:
            raise PolicyError(
                f"The dtype of the weights of this {type(module).__name__} cannot change any more: "
                "fully_shard fixes it at the first forward pass. Apply or remove a policy that "
                "stores weights in 16 bits ('master_bfloat16', 'bfloat16', ...) before that; "
                "later, load its state dict into a new model."
            )


def part_of_gradient(parameter: Tensor, grad: Tensor) -> tuple[Tensor, int]:
    """Return this rank's part of a DTensor gradient, and in how many parts the whole is cut.

    A gradient that is placed otherwise than its parameter (sums that are not made yet: that of a
    norm under sequence parallelism) is placed alike first, in ``.grad`` too. The optimizer would
    do it, and what counts is the sum.
    """
    sharded: Any = grad
    own: Any = parameter
    if is_dtensor(parameter) and sharded.placements != own.placements:
        sharded = sharded.redistribute(placements=own.placements)
        parameter.grad = sharded
    ways = 1
    for place, placement in enumerate(sharded.placements):
        if not placement.is_replicate():
            ways *= sharded.device_mesh.size(place)
    return sharded.to_local(), ways
