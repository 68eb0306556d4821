"""Errors and casts of policies on models of ``transformers``, and ``docs/torch-models.md``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .machine import sentence
from .measures import Observer
from .styles import LOW, Style
from .tables import Table
from .zoo import SEED, ZOO, Case, case_named

Row = dict[str, Any]

LOSS_SCALE = 1024.0
"""Of every run, so that both sides of a comparison lose the same small gradients."""


def measure(device: str, say: Callable[[str], None]) -> Row:
    """Compare every model, in every style, with itself in float32."""
    rows: list[Row] = []
    for case in ZOO:
        say(case.name)
        for attention in case.attentions or (None,):
            exact = _run(case, attention, Style("float32"), device)
            rows += [
                _label(case, attention, style)
                | _compare(_run(case, attention, style, device), exact)
                for style in _styles()
            ]
    return {
        "loss_scale": LOSS_SCALE,
        "rows": rows,
        "variants": list(_variant_errors(device)),
        "residual": [_with_float32_stream(name, device) for name in FLOAT32_STREAM],
    }


@dataclass(frozen=True)
class AveragePooled(Case):
    """A ResNet whose max pool, which turns on which of two values is larger, is an average."""

    def build(self, attention: str | None = None, seed: int = SEED) -> Any:
        model = super().build(attention, seed)
        model.resnet.embedder.pooler = nn.AvgPool2d(3, 2, 1)
        return model


def _variants() -> Iterator[tuple[str, Case]]:
    """Yield models without what makes their gradients jump."""
    t5, resnet = case_named("T5"), case_named("ResNet")
    gelu = {**t5.options, "feed_forward_proj": "gated-gelu"}
    yield "T5 with GELUs", replace(t5, options=gelu)
    yield "ResNet with an average pool", AveragePooled(**vars(resnet))


def _variant_errors(device: str) -> Iterator[Row]:
    for name, case in _variants():
        attention = "sdpa" if case.attentions else None
        exact = _run(case, attention, Style("float32"), device)
        for style in _styles():
            row = _label(case, attention, style) | {"model": name}
            yield row | _compare(_run(case, attention, style, device), exact)


def _label(case: Case, attention: str | None, style: Style) -> Row:
    return {
        "model": case.name,
        "class": case.model,
        "attention": attention,
        "dtype": str(style.dtype).removeprefix("torch."),
        "side": style.functional or "torch.amp",
    }


@dataclass(frozen=True)
class Pass:
    """What one forward and backward pass gave and did."""

    output: Tensor
    loss: float
    gradient: Tensor
    observer: Observer


def _compare(low: Pass, exact: Pass) -> Row:
    casts, groups = low.observer.casts, low.observer.groups
    return {
        "output_error": _error(low.output, exact.output),
        "loss_error": abs(low.loss / exact.loss - 1),
        "gradient_error": _error(low.gradient, exact.gradient),
        "casts": len(casts),
        "cast_bytes": sum(cast.moved for cast in casts),
        "groups": len(groups),
        "group_bytes": sum(cast.moved for cast in groups),
    }


FLOAT32_STREAM: dict[str, dict[str, str]] = {
    "BERT": {r".*\.embeddings": "float32", r".*\.LayerNorm": "float32"},
    "GPT-2": {r"transformer\.wte": "float32", r"transformer\.wpe": "float32"},
    "Llama": {r"model\.embed_tokens": "float32"},
}
"""Overrides that keep the sum that runs through all layers in float32, as torch.autocast does:
what it starts from, and what is applied to the sum itself."""


def _with_float32_stream(name: str, device: str) -> Row:
    case, attention = case_named(name), "sdpa"
    exact = _run(case, attention, Style("float32"), device)
    style = Style("halfstep", torch.float16, "autocast")
    kept = _run(case, attention, style, device, FLOAT32_STREAM[name])
    return {"model": name, "overrides": FLOAT32_STREAM[name]} | _compare(kept, exact)


def _styles() -> Iterator[Style]:
    for dtype in LOW:
        yield Style("torch.amp", dtype)
        yield Style("halfstep", dtype, "autocast")
        yield Style("halfstep", dtype, "compute")


def _run(
    case: Case,
    attention: str | None,
    style: Style,
    device: str,
    overrides: Mapping[str, str] | None = None,
) -> Pass:
    model: nn.Module = style.prepare(case.build(attention).to(device), overrides)
    inputs = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in case.inputs().items()
    }
    observer = Observer()
    with observer:
        with style.forward(device):
            result = model(**inputs)
        observer.phase = "backward"
        (result.loss * LOSS_SCALE).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    output = result[case.output].detach().float()
    return Pass(output, float(result.loss), torch.cat(gradients) / LOSS_SCALE, observer)


def _error(low: Tensor, exact: Tensor) -> float:
    return float((low - exact).norm() / exact.norm())


EAGER_ONLY = frozenset(case.name for case in ZOO if case.attentions == ("eager",))

SIDES = ("torch.amp", "autocast", "compute")


def _by_model(rows: list[Row]) -> Iterator[tuple[list[str], dict[str, Row]]]:
    for key in dict.fromkeys((row["model"], row["attention"]) for row in rows):
        sides = {row["side"]: row for row in rows if (row["model"], row["attention"]) == key}
        yield [key[0], key[1] or "none"], sides


def _errors(results: Row, dtype: str) -> Table:
    head = ["model", "attention"]
    head += [f"{what}, {side}" for what in ("output", "gradient") for side in SIDES]
    rows = [
        words
        + [f"{sides[side]['output_error']:.1e}" for side in SIDES]
        + [f"{sides[side]['gradient_error']:.1e}" for side in SIDES]
        for words, sides in _by_model(
            [row for row in (*results["rows"], *results["variants"]) if row["dtype"] == dtype]
        )
    ]
    return Table(f"mixed_{dtype}: errors relative to float32", head, rows, words=2)


def _losses(results: Row) -> Table:
    head = ["model", *SIDES]
    low = [row for row in results["rows"] if row["dtype"] == "bfloat16"]
    rows = [
        [words[0], *(f"{sides[side]['loss_error']:.1e}" for side in SIDES)]
        for words, sides in _by_model(low)
        if words[1] != "eager" or words[0] in EAGER_ONLY
    ]
    return Table("losses that the models compute themselves (bfloat16)", head, rows)


def _residual(results: Row) -> Table:
    head = ["model", "overrides", "output, torch.amp", "autocast", "autocast with them"]
    sides = {
        words[0]: sides
        for words, sides in _by_model([r for r in results["rows"] if r["dtype"] == "float16"])
        if words[1] == "sdpa"
    }
    rows = [
        [
            row["model"],
            ", ".join(f"`{path}`" for path in row["overrides"]),
            f"{sides[row['model']]['torch.amp']['output_error']:.1e}",
            f"{sides[row['model']]['autocast']['output_error']:.1e}",
            f"{row['output_error']:.1e}",
        ]
        for row in results["residual"]
    ]
    return Table("a float32 residual stream (mixed_float16)", head, rows, words=2)


def _casts(results: Row) -> Table:
    head = ["model", "attention", "torch.amp", "KB"]
    head += [cell for side in SIDES[1:] for cell in (side, "grouped", "KB")]
    rows = []
    for words, sides in _by_model([r for r in results["rows"] if r["dtype"] == "bfloat16"]):
        cells = [str(sides["torch.amp"]["casts"]), _kb(sides["torch.amp"])]
        for side in SIDES[1:]:
            cells += [str(sides[side]["casts"]), str(sides[side]["groups"]), _kb(sides[side])]
        rows.append(words + cells)
    return Table("casts of one step, forward and backward (bfloat16)", head, rows, words=2)


def _kb(row: Row) -> str:
    return f"{(row['cast_bytes'] + row['group_bytes']) / 1000:,.0f}"


def tables(results: Row) -> Iterator[Table]:
    """Yield the tables of the page."""
    yield from (_errors(results, dtype) for dtype in ("float16", "bfloat16"))
    yield _residual(results)
    yield _losses(results)
    yield _casts(results)


PAGE = """\
# Models of transformers under a policy

Seventeen models of [transformers](https://huggingface.co/docs/transformers), built from small
configs with random weights (two layers of width 32; `benchmarks/zoo.py`), take a forward and a
backward pass in float32, under `torch.autocast`, and with `apply_policy` in both meanings of its
argument `functional`. The tests (`tests/torch/test_transformers.py`) hold each of them below
bounds near these numbers, step an optimizer, and go through padding, generation, activation
checkpointing, saving and loading.

This page is written by `python -m benchmarks models`. Its numbers:
{machine}

## Errors

An error is |x - y| / |y|, y being what the same model gives in float32: over all logits, and over
the gradients of all parameters together. Losses are scaled by 1,024 everywhere. Half a unit in the
last place is 4.9e-4 in float16 and 3.9e-3 in bfloat16.

### mixed_float16

{float16}

### mixed_bfloat16

{bfloat16}

What is larger than the rest, and why:

- *Between torch.amp and a policy.* Under a policy, what embeddings and normalisations give is
  rounded to 16 bits, so the sum that runs through all layers is kept in 16 bits, where
  `torch.autocast` keeps it in float32. Fewer casts and less memory come from that, and errors up
  to twice as large in most models. Where a model needs the digits, overrides keep them, see below.
- *T5* has ReLUs: a value that rounding moves over zero changes a gradient by a jump. With GELUs, as
  in T5 1.1, the error in float16 is a sixth of that.
- *ResNet* has a max pool, whose gradient jumps to another pixel where rounding makes that one the
  largest; with an average pool, float16 errs like elsewhere. What remains in bfloat16 is not
  explained. `functional="autocast"` does the same arithmetic as `torch.autocast` here, to the last
  bit.
- *CLIP*'s loss contrasts two pairs, and its gradients are differences of their embeddings, which an
  untrained model makes almost equal.

### A float32 residual stream

With these overrides (all `"float32"`) and `functional="autocast"`, the sum starts in float32 and
stays there, and the error is that of `torch.autocast`. (`functional="compute"` casts the arguments
of every module, the sum too.)

{residual}

### Losses inside the model

Given labels, these models compute their loss in their own `forward`. `functional="autocast"`
computes it in float32, as `torch.autocast` does. `functional="compute"` computes it in 16 bits
where the model calls a loss function on its 16-bit logits and does not cast them: its last digits
are then those of the 16-bit format, and in float16 a loss scale above 65,504 overflows in it.
A `PolicyWarning` says so at the first call. Compute the loss outside of the model, from its float32
logits, or use `functional="autocast"`.
The relative error of the loss in bfloat16:

{losses}

## Casts

A cast changes the dtype of a float tensor; grouped casts take all weights, or all their gradients,
in one call. KB (1,000 bytes) are read and written by both together. The lists of
`torch.autocast` are those of this device.

Most casts that remain are in the models' own code or in torch's: RMS norms of Llama, Mistral,
Qwen3, Gemma2 and T5 cast to float32 and back by themselves; attention with a learned bias (T5)
takes a path of torch that computes in float32. *Mixtral* moves more bytes under a policy because
its experts run in 16 bits there: their operation is on none of the lists of `torch.autocast`, which
leaves them, the larger part of the model, in float32.

{casts}
"""


def page(results: Row) -> str:
    """Return ``docs/torch-models.md``."""
    return PAGE.format(
        machine=sentence(results["machine"]),
        float16=_errors(results, "float16").markdown(),
        bfloat16=_errors(results, "bfloat16").markdown(),
        casts=_casts(results).markdown(),
        residual=_residual(results).markdown(),
        losses=_losses(results).markdown(),
    )
