"""How each kind of module runs under a policy: data, one row a kind, each with its reason.

A module in no row is a *layer* if it owns weights, or tensors computed from weights, and plain
code otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.loss import _Loss
from torch.nn.utils.parametrizations import _Orthogonal
from torch.nn.utils.parametrize import ParametrizationList

Inputs = Literal["keep", "cast", "cast finite", "float32", "float32 on cpu"]
Weights = Literal[
    "low", "low on cpu", "low off cpu", "low off cpu or transformed", "rows", "float32", "unchanged"
]
Inside = Literal["as it is", "functional", "on", "off"]


@dataclass(frozen=True)
class Rule:
    """How a kind of module runs in a 16-bit compute dtype.

    Attributes:
        name: a word for it.
        why: the reason, for the summary; ``{compute}`` stands for the compute dtype.
        inputs: what happens to floating arguments: kept, cast to the compute dtype, cast so that
            finite constants stay finite (for what may take masks), or cast to float32,
            everywhere or on a CPU, and to the compute dtype elsewhere.
        weights: where its weights are read in the compute dtype. ``"rows"``: only what is
            gathered from them; ``"float32"``: nowhere, and they stay float32 variables under
            every policy; ``"unchanged"``: nowhere, and they keep the dtype that they have.
        inside: how autocast is inside: as it is, on if functional="autocast", on, or off.
        result: whether what it returns is cast to the compute dtype.
        covers: whether it reads its children's weights without calling them.
    """

    name: str
    why: str
    inputs: Inputs = "keep"
    weights: Weights = "low"
    inside: Inside = "as it is"
    result: bool = False
    covers: bool = False


PLAIN = Rule("plain", "no weights: functional={functional!r}", inside="functional")
LEFT_ALONE = "left alone"
"""The name of the rule for what no policy can be given to."""

TRANSPARENT = Rule("transparent", PLAIN.why)
HOLDER = Rule("holder", "holds modules and is never called")
SEALED = Rule("scripted", "left alone: a scripted module is sealed", weights="unchanged")
PARAMETERS = Rule("parameters", "{compute} where the module that holds them reads them")
PARAMETRIZATION = Rule("parametrization", "computes a weight in its variable dtype")
LAYER = Rule("layer", "{compute} weights", inputs="cast finite", inside="functional")
LEAF = Rule("layer", "{compute} weights", inputs="cast")

# what is cast are the weights of a bag's examples, which must have the dtype of the rows
_EMBEDDING = Rule(
    "embedding", "gathers float32 rows, gives {compute}",
    inputs="float32", weights="rows", result=True,
)  # fmt: skip
# The CPU kernel keeps its statistics in the dtype of the weights, CUDA's always in float32 but
# it wants weights in its input's dtype (measured; torch 2.13, aten/native/layer_norm.cpp).
_LAYER_NORM = Rule(
    "norm", "{compute} in and out, float32 statistics",
    inputs="cast", weights="low off cpu or transformed", inside="off",
)  # fmt: skip
# A CPU has no kernel for it: torch.rms_norm is made of operations in float32 there, and casts 16
# bits to it and back, forward and backward; elsewhere one kernel does it in its registers. Both
# want one dtype, and warn of two (torch 2.13, aten/native/layer_norm.cpp).
_RMS_NORM = Rule(
    "norm", "{compute} out, float32 inside",
    inputs="float32 on cpu", weights="low off cpu", inside="off", result=True,
)  # fmt: skip
_BATCH_NORM = Rule(
    "norm", "{compute} in and out, float32 weights and statistics",
    inputs="cast", weights="float32", inside="off",
)  # fmt: skip
# CUDA's group_norm keeps its statistics in its input's dtype, a local response norm squares
_UPCAST = Rule(
    "norm", "{compute} in and out, computes in float32",
    inputs="float32", weights="float32", inside="off", result=True,
)  # fmt: skip
_LOSS = Rule("loss", "a loss computes in float32", inputs="float32", inside="off")
_ATTENTION = Rule(
    "attention", "{compute} weights, its projections' too",
    inputs="cast finite", inside="functional", covers=True,
)  # fmt: skip
# cuDNN wants all weights of a recurrent layer in one buffer, which torch.autocast casts whole
_RECURRENT = Rule(
    "recurrent", "{compute} weights", inputs="cast", weights="low on cpu", inside="on"
)

RULES: tuple[tuple[tuple[type[nn.Module], ...], Rule], ...] = (
    ((nn.ModuleList, nn.ModuleDict), HOLDER),
    ((nn.ParameterList, nn.ParameterDict), PARAMETERS),
    ((nn.Embedding, nn.EmbeddingBag), _EMBEDDING),
    ((_NormBase,), _BATCH_NORM),  # BatchNorm*, SyncBatchNorm, InstanceNorm*
    ((nn.LayerNorm,), _LAYER_NORM),
    ((nn.RMSNorm,), _RMS_NORM),
    ((nn.GroupNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d), _UPCAST),
    ((_Loss,), _LOSS),
    ((nn.MultiheadAttention,), _ATTENTION),
    ((nn.RNNBase,), _RECURRENT),
)
"""Classes and the rule for them; subclasses follow, the first row that fits applies."""

FLOAT32_WHOLE: tuple[type[nn.Module], ...] = (nn.AdaptiveLogSoftmaxWithLoss,)
"""Losses that own layers: all of them compute in float32, unless an override names them."""

LEAVES: frozenset[type[nn.Module]] = frozenset(
    (
        nn.Linear, nn.Bilinear, nn.PReLU,
        nn.Conv1d, nn.Conv2d, nn.Conv3d,
        nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        nn.LSTMCell, nn.GRUCell, nn.RNNCell,
    )
)  # fmt: skip
"""Layers of torch's own whose one operation meets only its inputs and weights: autocast has nothing
to add. (A subclass may compute more in its forward, so only these very classes are here.)"""


SWITCHES: tuple[tuple[type[nn.Module], str, object], ...] = (
    (nn.TransformerEncoder, "use_nested_tensor", False),
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
)
"""Attributes that a class shows otherwise under a policy: these two switch off the fused paths for
inference, which take the float32 weights of every layer below without asking the layer."""


def _is_called(module: nn.Module) -> bool:
    """Whether a list or dictionary of modules is of a class that has a ``forward``."""
    return type(module).forward is not nn.Module.forward


def rule_for(module: nn.Module, weights: Sequence[str]) -> Rule:
    """Return how a module that owns these weights runs under a 16-bit policy."""
    if isinstance(module, torch.jit.ScriptModule):
        return SEALED
    for classes, rule in RULES:
        if isinstance(module, classes) and not (rule is HOLDER and _is_called(module)):
            return rule
    if not weights:
        return PLAIN
    return LEAF if type(module) in LEAVES else LAYER


Untouchable = tuple[Callable[[nn.Module], bool], str]

UNTOUCHABLE: tuple[Untouchable, ...] = (
    (
        lambda module: any(p.is_complex() for p in module.parameters(recurse=False)),
        "it has complex parameters, which no 16-bit format can hold",
    ),
    (
        lambda module: any(p.dtype is torch.float64 for p in module.parameters(recurse=False)),
        "it has float64 parameters: somebody wanted the digits",
    ),
    (
        lambda module: any(
            p.dtype.is_floating_point and p.dtype.itemsize == 1
            for p in module.parameters(recurse=False)
        ),
        "it has float8 parameters, which mean nothing without their scales",
    ),
)
"""What is left alone, with the reason that the summary gives."""


KEEPS_DTYPE: tuple[tuple[Callable[[nn.Module], bool], str], ...] = (
    (lambda module: isinstance(module, _Orthogonal), "torch has no 16-bit kernels for this"),
    (
        # spectral_norm multiplies them with the weight, and torch wants one dtype of both
        lambda module: any(
            buffer.is_floating_point() and buffer.dim() > 0
            for buffer in module.buffers(recurse=False)
        ),
        "its buffers have that",
    ),
)
"""Parametrizations whose originals no policy casts, with the reason that the summary gives."""


def rule_for_parametrization(parametrizations: ParametrizationList) -> Rule:
    """Return how a parametrized tensor is computed from what is stored of it."""
    for test, reason in KEEPS_DTYPE:
        if any(map(test, parametrizations.modules())):
            why = f"computes a weight in the dtype that it has: {reason}"
            return replace(PARAMETRIZATION, why=why, weights="unchanged")
    return PARAMETRIZATION


def left_alone(module: nn.Module) -> str | None:
    """Return why a module must be left alone, ``None`` if it need not be."""
    for test, reason in UNTOUCHABLE:
        if test(module):
            return reason
    return None
