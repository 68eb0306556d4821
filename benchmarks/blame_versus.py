"""``blame`` beside ``torch.autograd.detect_anomaly`` and Hugging Face's ``DebugUnderflowOverflow``.

``python -m benchmarks.blame_versus`` runs all three on every planted fault of ``fault_zoo``, under
``mixed_float16``, and times a healthy step under each of them. It writes a JSON file into
``benchmarks/results`` and the tables of ``docs/blame.md``.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from halfstep.torch import apply_policy, blame

from .fault_zoo import FAULTS, Fault
from .machine import describe, sentence, slug

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "blame.md"
POLICY = "mixed_float16"
ROUNDS = 15

Row = dict[str, Any]

# ---------------------------------------------------------------------- what each one finds


def by_blame(fault: Fault) -> Row:
    """What blame says."""
    found = blame(fault.prepare(POLICY), fault.loss_fn, fault.batch(0), loss_scale=fault.loss_scale)
    if found is None:
        return {"said": "", "right": False}
    right = found.path == fault.path and fault.operation in found.operation
    return {
        "said": f"{found.place}: {found.operation}",
        "cause": found.cause,
        "cure": found.cure,
        "source": found.source.partition(",")[0],
        "right": right and found.direction == fault.direction,
    }


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def by_anomaly(fault: Fault, source: str) -> Row:
    """What detect_anomaly says; it is right if its traceback ends in the line that blame names."""
    model = fault.prepare(POLICY)
    with warnings.catch_warnings(record=True) as caught, torch.autograd.detect_anomaly():
        warnings.simplefilter("always")
        loss = fault.loss_fn(model, fault.batch(0))
        try:
            (loss.float() * fault.loss_scale).backward()
        except RuntimeError as error:
            said = str(error).partition(" in its")[0].replace("Function ", "")
        else:
            return {"said": "", "right": False}
    trace = "\n".join(str(each.message) for each in caught if "Error detected in" in str(each))
    frames = [f"{Path(m['file']).name}:{m['line']}" for m in _FRAME.finditer(trace)]
    own = [frame for frame in frames if frame.startswith("fault_zoo.py")]
    right = bool(own) and bool(source) and own[-1] == Path(source).name
    return {"said": said, "right": right}


_MODULE = re.compile(r"^ +(?P<path>\S+) [A-Z]\w+$", re.MULTILINE)


def by_hugging_face(fault: Fault) -> Row:
    """What DebugUnderflowOverflow prints last; it is right if that is the module to blame."""
    from transformers.debug_utils import DebugUnderflowOverflow

    model = fault.prepare(POLICY)
    DebugUnderflowOverflow(model)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            loss = fault.loss_fn(model, fault.batch(0))
            (loss.float() * fault.loss_scale).backward()
    except ValueError:
        path = _MODULE.findall(printed.getvalue())[-1]
        inside = bool(fault.path) and path.startswith(f"{fault.path}.")
        into_the_first = fault.operation == "batch" and path == "stem"
        return {"said": path, "right": path == fault.path or into_the_first, "inside": inside}
    return {"said": "", "right": False, "inside": False}


def finds() -> list[Row]:
    """All three on every fault."""
    rows = []
    for fault in FAULTS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mine = by_blame(fault)
            rows.append(
                {
                    "fault": fault.name,
                    "what": fault.what,
                    "blame": mine,
                    "anomaly": by_anomaly(fault, mine.get("source", "")),
                    "hugging_face": by_hugging_face(fault),
                }
            )
        print(
            f"{fault.name:20} {mine['right']!s:6} {rows[-1]['anomaly']} {rows[-1]['hugging_face']}"
        )
    return rows


# ---------------------------------------------------------------------- what each one costs

WIDTH, LAYERS, EXAMPLES, LENGTH = 128, 4, 4, 64


def encoder(policy: str) -> nn.Module:
    """An encoder of four layers, no dropout."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    return model if policy == "float32" else apply_policy(model, policy)


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(model(batch).float(), batch)


def methods(policy: str) -> dict[str, Callable[[], object]]:
    """One training step without an optimizer, under each tool."""
    from transformers.debug_utils import DebugUnderflowOverflow

    plain = encoder(policy)
    hooked = copy.deepcopy(plain)
    DebugUnderflowOverflow(hooked)  # for good: its hooks cannot be removed
    batch = torch.randn(EXAMPLES, LENGTH, WIDTH)

    def step(model: nn.Module) -> None:
        model.zero_grad()
        loss_fn(model, batch).backward()

    def anomaly() -> None:
        with warnings.catch_warnings(), torch.autograd.detect_anomaly():
            warnings.simplefilter("ignore")
            step(plain)

    return {
        "plain step": lambda: step(plain),
        "detect_anomaly": anomaly,
        "DebugUnderflowOverflow": lambda: step(hooked),
        "blame": lambda: blame(plain, loss_fn, batch),
    }


def costs(policy: str) -> dict[str, Row]:
    """Processor time of each method over that of the plain step of the same round."""
    made = methods(policy)
    for method in made.values():
        method()
    took: dict[str, list[float]] = {name: [] for name in made}
    order = list(made)
    for _ in range(ROUNDS):
        for name in order:
            begin = time.process_time()
            made[name]()
            took[name].append(time.process_time() - begin)
        order.append(order.pop(0))
    base = took["plain step"]
    return {name: _ratio(times, base) for name, times in took.items()}


def _ratio(times: list[float], base: list[float]) -> Row:
    ratios = [mine / other for mine, other in zip(times, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "milliseconds": 1e3 * statistics.median(times),
        "ratio": middle,
        "low": low,
        "high": high,
    }


def proof_cost() -> Row:
    """How many steps ``blame`` takes on a fault, with and without the search for a cure."""
    fault = next(each for each in FAULTS if each.name == "attention-logits")
    model, batch = fault.prepare(POLICY), fault.batch(0)

    def step() -> None:
        model.zero_grad()
        fault.loss_fn(model, batch).backward()

    def timed(call: Callable[[], object]) -> float:
        begin = time.process_time()
        call()
        return time.process_time() - begin

    rows: dict[str, list[float]] = {"blame": [], "blame, prove=False": []}
    for _ in range(ROUNDS):
        base = timed(step)
        for name, prove in (("blame", True), ("blame, prove=False", False)):
            took = timed(lambda prove=prove: blame(model, fault.loss_fn, batch, prove=prove))
            rows[name].append(took / base)
    return {
        name: dict(zip(("low", "ratio", "high"), statistics.quantiles(ratios, n=4), strict=True))
        for name, ratios in rows.items()
    }


# ---------------------------------------------------------------------- tables


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def zoo_table(results: Row) -> str:
    """Fault, and what blame said."""
    rows = []
    for row in results["faults"]:
        place, _, operation = row["blame"]["said"].rpartition(": ")
        named = (
            f"`{place.partition(' (')[0]}`" if "." in place else place.partition(" (")[0].lower()
        )
        steps = ", ".join(f"`{part}`" for part in operation.split(" in "))
        rows.append([row["fault"], row["what"], f"{named}: {steps}", row["blame"]["cause"]])
    return _markdown(["fault", "what is planted", "`blame` names", "and says"], rows)


def versus_table(results: Row) -> str:
    """What the three say."""

    def cell(found: Row) -> str:
        if not found["said"]:
            return "nothing"
        name = found["said"].replace("'", "").removesuffix(" returned nan values")
        return f"**`{name}`**" if found["right"] else f"`{name}`"

    rows = [
        [row["fault"], *(cell(row[key]) for key in ("anomaly", "hugging_face"))]
        for row in results["faults"]
    ]
    return _markdown(["fault", "`detect_anomaly`", "`DebugUnderflowOverflow`"], rows)


def counts_table(results: Row) -> str:
    """How often each one was right, silent, or elsewhere, and what it costs."""
    faults, rows = results["faults"], []
    for key, name, timed in (
        ("anomaly", "`detect_anomaly`", "detect_anomaly"),
        ("hugging_face", "`DebugUnderflowOverflow`", "DebugUnderflowOverflow"),
        ("blame", "`blame`", "blame"),
    ):
        found = [row[key] for row in faults]
        right = sum(each["right"] for each in found)
        silent = sum(not each["said"] for each in found)
        cost = [results["cost"][policy][timed] for policy in ("float32", POLICY)]
        rows.append(
            [name, str(right), str(len(found) - right - silent), str(silent)]
            + [f"{c['ratio']:.2f} ({c['low']:.2f} - {c['high']:.2f})" for c in cost]
        )
    head = ["", "named it", "named another", "said nothing", "step, float32", f"step, {POLICY}"]
    return _markdown(head, rows)


def proof_sentence(results: Row) -> str:
    """What a fault costs."""
    full, quick = results["proof"]["blame"], results["proof"]["blame, prove=False"]
    return (
        f"On the fault `attention-logits`, `blame` took {full['ratio']:.0f} steps' time "
        f"(quartiles {full['low']:.0f} and {full['high']:.0f}), with the replays that prove its "
        f"cure; with `prove=False` {quick['ratio']:.0f} ({quick['low']:.0f} and "
        f"{quick['high']:.0f})."
    )


def write_page(results: Row) -> None:
    """Put the tables between their marks in the page."""
    text = PAGE.read_text(encoding="utf-8")
    for name, made in (
        ("machine", sentence(results["machine"])),
        ("zoo", zoo_table(results)),
        ("counts", counts_table(results)),
        ("versus", versus_table(results)),
        ("proof", proof_sentence(results)),
    ):
        begin, end = f"<!-- {name}: made -->", f"<!-- {name}: end -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n{made}\n{end}{tail}"
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    results: Row = {"machine": describe("cpu"), "policy": POLICY, "rounds": ROUNDS}
    results["faults"] = finds()
    results["cost"] = {policy: costs(policy) for policy in ("float32", POLICY)}
    results["proof"] = proof_cost()
    file = ROOT / "benchmarks" / "results" / f"blame-{slug(results['machine'])}.json"
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_page(results)
    print(counts_table(results))
    print(proof_sentence(results))


if __name__ == "__main__":
    main()
