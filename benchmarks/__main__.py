"""``python -m benchmarks``: measure, print, and write the results and the page."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import pages, suite
from .compiling import compiled_steps
from .machine import describe, sentence, slug
from .whole_steps import whole_steps

PARTS = ("host_reads", "accumulation", "host_time", "steps", "compiled", "whole_steps")
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("steps", "models", "pages"), default="steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=12.0, help="of timing, a model")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--part", choices=PARTS, help="measure one part, and print it only")
    parser.add_argument("--only", help="names of workloads, by commas; printed only")
    parser.add_argument("--no-page", action="store_true", help="leave docs/ as it is")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("halfstep").setLevel(logging.ERROR)
    {"steps": steps, "models": models, "pages": rewrite}[options.what](options)


def steps(options: argparse.Namespace) -> None:
    """Benchmarks against torch.amp."""
    begin = time.perf_counter()
    machine = describe(options.device)
    print(sentence(machine))
    only = None if options.only is None else options.only.split(",")
    measured: dict[str, Callable[[], Any]] = {
        "host_reads": lambda: suite.host_reads(options.device, print),
        "accumulation": lambda: suite.accumulation(options.device, print, only),
        "host_time": lambda: suite.host_time(options.device, options.seconds, print, only),
        "steps": lambda: suite.steps(options.device, options.seconds, print, only),
        "compiled": lambda: compiled_steps(options.device, options.seconds / 2, print, only),
        "whole_steps": lambda: whole_steps(options.device, options.seconds / 2, print, only),
    }
    parts = list(measured) if options.part is None else [options.part]
    results = {"machine": machine, "micro_batches": suite.MICRO_BATCHES}
    results |= {part: measured[part]() for part in parts}
    pages.show(results)
    if options.part is not None or only is not None:
        return  # a part of the results is no page
    name = slug(machine)
    _write(ROOT / "benchmarks" / "results" / f"{name}.json", results)
    if not options.no_page:
        _page(ROOT / "docs" / "benchmarks.md", pages.page(results, _gpus()))
    print(f"{time.perf_counter() - begin:.0f} s in all")


def models(options: argparse.Namespace) -> None:
    """Errors and casts on models of transformers."""
    from . import model_table

    machine = describe(options.device)
    results = {"machine": machine} | model_table.measure(options.device, print)
    for table in model_table.tables(results):
        table.show()
    _write(ROOT / "benchmarks" / "results" / f"{slug(machine)}-models.json", results)
    if not options.no_page:
        _page(ROOT / "docs" / "torch-models.md", model_table.page(results))


def rewrite(options: argparse.Namespace) -> None:
    """Write the pages again from the results that this machine wrote last."""
    from . import model_table

    name = slug(describe(options.device))
    results = ROOT / "benchmarks" / "results"
    for file, page, write in (
        (f"{name}.json", "benchmarks.md", lambda read: pages.page(read, _gpus())),
        (f"{name}-models.json", "torch-models.md", model_table.page),
    ):
        if (results / file).exists():
            _page(ROOT / "docs" / page, write(json.loads((results / file).read_text("utf-8"))))


def _gpus() -> list[str]:
    """The pages that runs on GPUs left."""
    found = sorted((ROOT / "benchmarks" / "results").glob("gpu-*.md"))
    return [path.read_text(encoding="utf-8") for path in found]


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(_rounded(results), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(ROOT)}")


def _page(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path.relative_to(ROOT)}")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


if __name__ == "__main__":
    main()
