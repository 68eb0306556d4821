"""What Keras' layers get wrong in 16 bits, found in a model before it is trained.

One function a rule: it takes a layer and yields findings. What depends on the version or the
backend of Keras is tried out on a tiny layer, so that a rule is silent where Keras was repaired.

===================== ======================================================================
rule                  what it finds
===================== ======================================================================
lost-update           torch: a call assigns to a variable, and the value is lost
rounded-update        JAX, TensorFlow: a call updates a variable from its 16-bit rounding
masked-attention      attention that gives NaN for a row that is masked as a whole
attention-overflow    attention whose scores are not scaled down before they can overflow
dot-overflow          a dot product of float16 inputs whose sum can overflow
unit-normalization    norms whose squares overflow, or vanish, in float16
normalization-range   a mean or variance that the compute dtype cannot hold
foreign-module        a torch module whose float32 weights meet 16-bit inputs
low-output            an output of the model in 16 bits, a softmax above all
policy-set-late       layers made before the global policy was set
unmatched-key         a key of a policy map that names no layer
===================== ======================================================================
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeAlias

import keras
import ml_dtypes  # noqa: F401  (gives NumPy its bfloat16)
import numpy as np

from ..core.advice.findings import Finding, Report, ordered
from ..core.formats import format_of
from . import _internals
from ._internals import path_of as _path_of
from .assignments import assigned_in_call
from .compiling import (
    late_layers,
    late_message,
    low_outputs,
    output_cure,
    seen_outputs,
    unmatched_keys,
)

Rule: TypeAlias = Callable[[Any, str], Iterator[Finding]]

LOW = ("float16", "bfloat16")
_FLOAT32 = 'give the layer dtype="float32"'


def check_model(model: Any) -> Report:
    """Find the layers of a model that Keras gets wrong under their policies, on this backend.

    The rules are named in this module's text and in the page about Keras.

    It reads the model and its weights' dtypes, runs no data through it, and changes nothing.

    Args:
        model: a Keras model; of one that is not built, the layers that exist.

    Returns:
        The findings, the worst first. It prints, iterates, and turns into JSON.

    >>> from halfstep.keras import policy_scope
    >>> with policy_scope("mixed_bfloat16"):
    ...     end = keras.layers.Softmax(name="end")
    ...     model = keras.Sequential([keras.Input((4,)), end], name="m")
    >>> print(check_model(model))
    Under mixed_bfloat16: 1 warning
    <BLANKLINE>
    warning  low-output  m/end
             the model ends in a softmax in bfloat16, which keeps 8 bits of each probability
             -> give the layer dtype="float32", or set model.get_layer('end').dtype_policy =
                "float32" before training
    """
    findings = [*_of_model(model)]
    for layer, path in _internals.parts_of(model).items():
        for rule in RULES:
            findings += rule(layer, path)
    return Report(_internals.own_policy(model).name, ordered(findings))


def _of_model(model: Any) -> Iterator[Finding]:
    for layer, dtype, softmax in low_outputs(model):
        what = f"ends in a softmax in {dtype}" if softmax else f"has an output in {dtype}"
        loses = f"the model {what}, {_kept(dtype, 'probability' if softmax else 'value')}"
        yield Finding("low-output", "warning", _path_of(layer), loses, output_cure(layer))
    for dtype in seen_outputs(model):
        loses = f"the model has an output in {dtype}, {_kept(dtype, 'value')}"
        yield Finding(
            "low-output", "warning", model.name, loses, 'give its last layer dtype="float32"'
        )
    late = late_layers(model)
    if late:
        yield Finding("policy-set-late", "warning", model.name, *late_message(model, late))
    for key, near in unmatched_keys(model):
        yield Finding(
            "unmatched-key",
            "error",
            model.name,
            f"the key {key!r} of the policy map names no layer of this model",
            near.strip() or "write the key as a layer's path, or as an expression that matches one",
        )


def _kept(dtype: str, what: str) -> str:
    return f"which keeps {format_of(dtype).mantissa_bits + 1} bits of each {what}"


def _updates(layer: Any, path: str) -> Iterator[Finding]:
    assigned = assigned_in_call(layer)
    if not assigned:
        return
    names = ", ".join(dict.fromkeys(variable.name for variable, _ in assigned))
    low = layer.compute_dtype
    here = f"its call assigns to {names}, which it reads in {low}"
    theirs = type(layer).__module__.startswith("keras.")
    cure = _FLOAT32 if theirs else f"make it with add_weight(..., autocast=False), or {_FLOAT32}"
    if keras.backend.backend() == "torch":
        lost = "; on the torch backend the new value goes into the cast copy, and is lost"
        yield Finding("lost-update", "error", path, here + lost, cure)
    elif any(from_itself for _, from_itself in assigned):
        stuck = int(2 ** (format_of(low).mantissa_bits + 1))
        rounded = f": what is added is added to a rounded value ({stuck} + 1 stays {stuck})"
        yield Finding("rounded-update", "warning", path, here + rounded, cure)
    else:
        rounded = ": if the new value is made from the old one, it starts from a rounded one"
        yield Finding("rounded-update", "hint", path, here + rounded, cure)


def _attention(layer: Any, path: str) -> Iterator[Finding]:
    if not isinstance(layer, keras.layers.Attention) or layer.compute_dtype not in LOW:
        return
    if masked_rows_are_nan(layer.compute_dtype):
        yield Finding(
            "masked-attention",
            "error",
            path,
            f"a row that is masked as a whole (a sample of padding alone) gives NaN in "
            f"{layer.compute_dtype} on the {keras.backend.backend()} backend",
            f"{_FLOAT32}, use MultiHeadAttention, or leave one position unmasked",
        )
    if layer.compute_dtype == "float16" and layer.score_mode == "dot" and _is_dot(layer):
        yield Finding(
            "attention-overflow",
            "hint",
            path,
            "queries times keys are summed before any scaling; a score past 65504 is infinite, "
            "and its row NaN",
            "divide the queries by the square root of their last size first, or use "
            "MultiHeadAttention, which does",
        )


def _is_dot(layer: Any) -> bool:
    return not isinstance(layer, keras.layers.AdditiveAttention)


@cache
def masked_rows_are_nan(dtype: str) -> bool:
    """Whether the attention of this Keras gives NaN where a whole row is masked."""
    layer = keras.layers.Attention(dtype=dtype, name="halfstep_masked")
    two = np.zeros((1, 2, 1), np.float32)
    out = layer([two, two], mask=[None, np.zeros((1, 2), bool)])
    return bool(np.isnan(_float32(out)).any())


@cache
def unit_norm_of(dtype: str, value: float) -> bool:
    """Whether the unit normalization of this Keras is right for four inputs of this size."""
    layer = keras.layers.UnitNormalization(dtype=dtype, name="halfstep_norm")
    out = _float32(layer(np.full((1, 4), value, np.float32)))
    return bool(np.allclose(out, 0.5, rtol=0.05))


def _float32(tensor: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    with warnings.catch_warnings():
        # Keras on torch, under NumPy 2
        warnings.simplefilter("ignore", DeprecationWarning)
        return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32")))


def _unit_normalization(layer: Any, path: str) -> Iterator[Finding]:
    dtype = layer.compute_dtype
    if not isinstance(layer, keras.layers.UnitNormalization) or dtype not in LOW:
        return
    wrong = [
        says
        for value, says in (
            (1000.0, "rows of norm above 255 become zero, as their squares overflow"),
            (1e-4, "rows of norm below 2.4e-4 are not finite, as their squares are 0"),
        )
        if not unit_norm_of(dtype, value)
    ]
    if wrong:
        yield Finding(
            "unit-normalization", "warning", path, f"in {dtype} {'; '.join(wrong)}", _FLOAT32
        )


def _normalization(layer: Any, path: str) -> Iterator[Finding]:
    dtype = layer.compute_dtype
    if not isinstance(layer, keras.layers.Normalization) or layer.mean is None or dtype not in LOW:
        return
    # what it computes with is rounded already
    given = layer.input_mean is not None
    kept = (
        (layer.input_mean, layer.input_variance)
        if given
        else (layer.adapt_mean, layer.adapt_variance)
    )
    mean, variance = np.broadcast_arrays(*(_float32(array).ravel() for array in kept))
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        held = np.sqrt(variance.astype(dtype)).astype(np.float32)
        off = np.abs(held / np.sqrt(variance) - 1)
        # how far apart neighbours are near the mean, in standard deviations
        apart = np.abs(mean) * 2.0 ** -format_of(dtype).mantissa_bits / np.sqrt(variance)
    lost = (variance > 0) & ((off > 0.05) | np.isnan(off) | (np.abs(mean) > format_of(dtype).max))
    coarse = (variance > 0) & (apart > 0.25) & ~lost
    if lost.any() or coarse.any():
        worst = int(np.argmax(lost)) if lost.any() else int(np.argmax(np.where(coarse, apart, 0)))
        says = (
            f"{int(lost.sum() + coarse.sum())} of {mean.size} features; one has mean "
            f"{mean[worst]:.4g} and variance {variance[worst]:.4g}, which {dtype} "
            + ("cannot hold" if lost.any() else "cannot tell from its neighbours")
        )
        yield Finding("normalization-range", "warning", path, says, _FLOAT32)


def _dot(layer: Any, path: str) -> Iterator[Finding]:
    if isinstance(layer, keras.layers.Dot) and layer.compute_dtype == "float16":
        squares = "the squares of its normalization" if layer.normalize else "its sum of products"
        yield Finding(
            "dot-overflow",
            "hint",
            path,
            f"{squares} can pass 65504, which is infinite in float16",
            _FLOAT32,
        )


def _foreign(layer: Any, path: str) -> Iterator[Finding]:
    if keras.backend.backend() != "torch":
        return
    if not isinstance(layer, keras.layers.TorchModuleWrapper) or layer.compute_dtype not in LOW:
        return
    dtypes = {str(p.dtype).removeprefix("torch.") for p in layer.module.parameters()}
    other = sorted(dtype for dtype in dtypes - {layer.compute_dtype} if "float" in dtype)
    if other:
        yield Finding(
            "foreign-module",
            "error",
            path,
            f"the inputs of this torch module are cast to {layer.compute_dtype}, and Keras does "
            f"not cast its {' and '.join(other)} weights: the call fails",
            'wrap it with TorchModuleWrapper(module, dtype="float32"), or give the module itself '
            "a policy with halfstep.torch.apply_policy",
        )


RULES: tuple[Rule, ...] = (
    _updates,
    _attention,
    _unit_normalization,
    _normalization,
    _dot,
    _foreign,
)
"""Every rule about one layer."""
