"""Errors and casts of policies on models of ``transformers``, and ``docs/torch-models.md``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .machine import sentence
from .measures import Observer
from .styles import LOW, Style
from .tables import Table
from .zoo import ZOO, Case

Row = dict[str, Any]

LOSS_SCALE = 1024.0
"""Of every run, so that both sides of a comparison lose the same small gradients."""


def measure(device: str, say: Callable[[str], None]) -> Row:
    """Compare every model, in every style, with itself in float32."""
    rows: list[Row] = []
    for case in ZOO:
        say(case.name)
        for attention in case.attentions or (None,):
            exact, exact_gradient, _ = _run(case, attention, Style("float32"), device)
            for style in _styles():
                output, gradient, observer = _run(case, attention, style, device)
                rows.append(
                    {
                        "model": case.name,
                        "class": case.model,
                        "attention": attention,
                        "dtype": str(style.dtype).removeprefix("torch."),
                        "side": style.functional or "torch.amp",
                        "output_error": _error(output, exact),
                        "gradient_error": _error(gradient, exact_gradient),
                        "casts": len(observer.casts),
                        "cast_bytes": sum(cast.moved for cast in observer.casts),
                        "groups": len(observer.groups),
                        "group_bytes": sum(cast.moved for cast in observer.groups),
                    }
                )
    return {"loss_scale": LOSS_SCALE, "rows": rows}


def _styles() -> Iterator[Style]:
    for dtype in LOW:
        yield Style("torch.amp", dtype)
        yield Style("halfstep", dtype, "autocast")
        yield Style("halfstep", dtype, "compute")


def _run(
    case: Case, attention: str | None, style: Style, device: str
) -> tuple[Tensor, Tensor, Observer]:
    model: nn.Module = style.prepare(case.build(attention).to(device))
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
    return result[case.output].detach().float(), torch.cat(gradients) / LOSS_SCALE, observer


def _error(low: Tensor, exact: Tensor) -> float:
    return float((low - exact).norm() / exact.norm())


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
        for words, sides in _by_model([r for r in results["rows"] if r["dtype"] == dtype])
    ]
    return Table(f"mixed_{dtype}: errors relative to float32", head, rows, words=2)


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
    yield _casts(results)


PAGE = """\
# Models of transformers under a policy

Seventeen models of [transformers](https://huggingface.co/docs/transformers), built from small
configs with random weights (two layers of width 32; `benchmarks/zoo.py`), take a forward and a
backward pass in float32, under `torch.autocast`, and with `apply_policy` in both meanings of its
argument `functional`. The tests (`tests/torch/test_transformers.py`) hold each of them below
bounds near these numbers, step an optimizer, and go through padding, generation, activation
checkpointing, saving and loading.

This page is written by `python -m benchmarks models`. Its numbers: {machine}

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
  `torch.autocast` keeps it in float32. That is where the fewer casts come from. It costs a factor
  of up to 2 in the error of most models; where a model needs the digits,
  `apply_policy(model, policy, {{"path.of.the.embedding": "float32"}})` keeps them.
- *T5* has ReLUs: a value that rounding moves over zero changes a gradient by a jump. With GELUs
  (T5 1.1) its error in float16 falls from 1.3e-2 to 2.0e-3.
- *CLIP*'s loss contrasts two pairs, whose logits differ little: its gradient is what is left of
  two almost equal numbers.
- *ResNet*'s batch norms see two images each: their gradient, too, is a difference of almost equal
  numbers. `torch.autocast` does the same arithmetic here, to the last bit.

## Casts

A cast changes the dtype of a float tensor; grouped casts take all weights, or all their gradients,
in one call. KB (1,000 bytes) are read and written by both together. The lists of
`torch.autocast` are those of this device.

{casts}
"""


def page(results: Row) -> str:
    """Return ``docs/torch-models.md``."""
    return PAGE.format(
        machine=sentence(results["machine"]),
        float16=_errors(results, "float16").markdown(),
        bfloat16=_errors(results, "bfloat16").markdown(),
        casts=_casts(results).markdown(),
    )
