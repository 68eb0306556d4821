"""Operations that a user names in ``allow=`` and ``deny=``."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ...core.paint import ON_NO_LIST, Kind
from ...errors import PolicyError
from .operations import OPERATIONS

_PRODUCTS = "mm, addmm, bmm, baddbmm"
_TAKEN_APART = {
    "linear": _PRODUCTS,
    "matmul": _PRODUCTS,
    "einsum": _PRODUCTS,
    "cross_entropy": "_log_softmax, nll_loss_forward",
}
_ATTENTIONS = tuple(
    name
    for name in sorted(OPERATIONS.names)
    if name.startswith("_scaled_dot_product_") and not name.endswith("_backward")
)
_CONVOLUTIONS = (
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
)  # fmt: skip
_ALSO_CALLED = {
    "softmax": ("_softmax",),
    "log_softmax": ("_log_softmax",),
    "layer_norm": ("native_layer_norm",),
    "group_norm": ("native_group_norm",),
    "rms_norm": ("_fused_rms_norm",),
    "dropout": ("native_dropout",),
    "adaptive_avg_pool2d": ("_adaptive_avg_pool2d",),
    "adaptive_avg_pool3d": ("_adaptive_avg_pool3d",),
    "nll_loss": ("nll_loss_forward",),
    "logsigmoid": ("log_sigmoid_forward",),
    "prelu": ("_prelu_kernel",),
    "scaled_dot_product_attention": _ATTENTIONS,
    **dict.fromkeys(_CONVOLUTIONS, ("convolution",)),
    "batch_norm": tuple(
        name
        for name in sorted(OPERATIONS.names)
        if "batch_norm" in name and not name.endswith("_backward")
    ),
}
_BACKWARD = ("_backward", "_backward_data", "_dense_backward")


def requests(argument: str, given: Iterable[object]) -> dict[str, tuple[str, ...]]:
    """Return the operations on the lists that each request is for, by the name in the request.

    Args:
        argument: ``"allow"`` or ``"deny"``; a denied operation takes its derivative along.
        given: names, or operations such as ``torch.ops.aten.mm``.

    Raises:
        PolicyError: a request for no operation, for one that must stay as it is, or for one that
            is taken apart into others before it is painted.

    >>> requests("deny", ["softmax", torch.ops.aten.gelu])
    {'softmax': ('_softmax', '_softmax_backward_data'), 'gelu': ('gelu', 'gelu_backward')}
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        wanted = f"[{given!r}]" if isinstance(given, str) else "[] for none"
        raise PolicyError(f"autocast({argument}={given!r}): give a list of names, {wanted}.")
    found = {}
    for name in (_name(argument, each) for each in given):
        if name in _TAKEN_APART:
            raise PolicyError(
                f"autocast({argument}=...{name!r}...): it is taken apart before the graph is "
                f"painted. Its parts are {_TAKEN_APART[name]}; or name its module in a PolicyMap."
            )
        names = _ALSO_CALLED.get(name, (name,))
        unlisted = [each for each in names if hasattr(torch.ops.aten, each)]
        OPERATIONS.check_known(f"autocast({argument}", names, unlisted)
        found[name] = names + (_derivatives(names) if argument == "deny" else ())
        for each in names if argument == "allow" else ():
            kind, because = OPERATIONS.kind(each)
            if kind is Kind.OPAQUE and because != ON_NO_LIST:
                raise PolicyError(f"autocast(allow=...{name!r}...): it must stay: {because}.")
    return found


def _name(argument: str, given: object) -> str:
    if isinstance(given, torch._ops.OpOverload):
        given = given.overloadpacket
    if isinstance(given, torch._ops.OpOverloadPacket):
        return str(given.__name__)
    if not isinstance(given, str):
        raise PolicyError(
            f"autocast({argument}=...{given!r}...): give names of ATen's operations, such as "
            "'gelu', or the operations themselves, such as torch.ops.aten.gelu."
        )
    return given.removeprefix("torch.ops.").removeprefix("aten.")


def _derivatives(names: tuple[str, ...]) -> tuple[str, ...]:
    roots = (name.removesuffix("_forward") for name in names)
    made = (f"{root}{suffix}" for root in roots for suffix in _BACKWARD)
    return tuple(name for name in made if hasattr(torch.ops.aten, name))
