"""``halfstep compare``: train the same model under several policies and show what came of it."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import click

from ..recipes import BUILT_IN, TEMPLATES
from .writing import replace_file

if TYPE_CHECKING:
    from rich.console import Console

    from ..compare import Settings, Summary

INTERRUPTED = 130
"""What a shell expects of a program that Ctrl-C ended."""

_EXIT_CODES = {"finished": 0, "interrupted": INTERRUPTED}

_HELP = f"""Train the same model under several policies, side by side.

RECIPE is a built-in recipe ({", ".join(BUILT_IN)}) or a Python file; several are run one after the
other. Every policy starts from the same weights and sees the same batches; the first one is what
the others are compared with.
"""


@click.command(help=_HELP)
@click.argument("recipes", metavar="RECIPE...", nargs=-1)
@click.option(
    "--policies",
    metavar="P,P,...",
    help="Names, or JSON files with a policy or a policy map. "
    "[default: float32,mixed_float16,mixed_bfloat16]",
)
@click.option("--steps", type=click.IntRange(min=1), help="Training steps. [default: the recipe's]")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the training data.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights and batches.")
@click.option("--device", help="For instance cuda:1. [default: a GPU if there is one]")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads; small models are steadier with 1. [default: the framework's]",
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write the summary.")
@click.option("--html", "html_file", type=click.Path(dir_okay=False), help="Write the page.")
@click.option(
    "--record",
    type=click.Path(dir_okay=False),
    help="Where the record goes, line by line while it runs. [default: beside --json or --html "
    "with the ending .jsonl, else runs/compare-TIME.jsonl]",
)
@click.option(
    "--numerics",
    type=click.IntRange(min=1),
    metavar="N",
    help="Record the numbers of every N-th step, layer by layer, and link their pages.",
)
@click.option("--memory/--no-memory", default=True, help="Whether to measure peak memory.")
@click.option("--new", type=click.Path(dir_okay=False), help="Write a commented recipe and stop.")
@click.option(
    "--framework",
    type=click.Choice(list(TEMPLATES)),
    help="Whose recipe --new writes. [default: torch]",
)
def compare(
    recipes: tuple[str, ...],
    policies: str | None,
    steps: int | None,
    epochs: int | None,
    seed: int,
    device: str | None,
    threads: int | None,
    json_file: str | None,
    html_file: str | None,
    record: str | None,
    numerics: int | None,
    memory: bool,
    new: str | None,
    framework: str | None,
) -> None:
    """Read the options, run, write, and exit with a code that says how it went."""
    if steps is not None and epochs is not None:
        raise click.UsageError("--steps and --epochs say the same thing; give one of them.")
    if (new is None) == (not recipes):
        raise click.UsageError(
            f"Give a RECIPE ({', '.join(BUILT_IN)}, or a Python file), or --new FILE to write one."
        )
    if framework is not None and new is None:
        raise click.UsageError("--framework is for --new; a recipe says which framework it is of.")
    try:
        if new is not None:
            _write_new(new, framework or "torch")
            return
        from ..compare import Settings

        settings = Settings(steps, epochs, seed, device, memory, threads, numerics)
        at = _record_path(record, json_file, html_file)
        code = _run(recipes, policies, settings, at, json_file, html_file)
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def _write_new(path: str, framework: str) -> None:
    from ..compare import write_template

    written = write_template(path, framework)
    click.echo(f"Wrote {written}. It runs as it is: halfstep compare {shlex.quote(str(written))}")


def _record_path(record: str | None, json_file: str | None, html_file: str | None) -> Path:
    if record is not None:
        return Path(record)
    beside = json_file or html_file
    if beside is not None:
        path = Path(beside)
        # --json run.jsonl must not share its file with the record
        return path.with_suffix(".record.jsonl" if path.suffix == ".jsonl" else ".jsonl")
    return Path("runs") / f"compare-{datetime.now(UTC):%Y%m%d-%H%M%S}.jsonl"


def _run(
    recipes: tuple[str, ...],
    policies: str | None,
    settings: Settings,
    record: Path,
    json_file: str | None,
    html_file: str | None,
) -> int:
    from rich.console import Console

    from ..compare import compare as run
    from ..compare.display import Progress, print_summary

    if html_file is not None:
        # what the page needs and is not installed is told before the training, not after it
        from .. import report as report
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    with quiet_checks(), Progress(console) as progress:
        summary = run(
            recipes, policies, settings, record=record, on_event=progress, command=command
        )
    print_summary(summary, console)
    _write(summary, record, json_file, html_file, console)
    return _EXIT_CODES.get(summary["status"], 1)


@contextmanager
def quiet_checks() -> Iterator[None]:
    """Keep the compatibility check out of the tables: the verdict, the doctor say it all."""
    logger = logging.getLogger("halfstep")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _write(
    summary: Summary, record: Path, json_file: str | None, html_file: str | None, console: Console
) -> None:
    if json_file is not None:
        replace_file(Path(json_file), json.dumps(summary, ensure_ascii=False) + "\n")
    if html_file is not None:
        _write_pages(summary, record.parent, Path(html_file))
    if summary["status"] == "interrupted":
        console.print("Interrupted; this is what there was.", style="yellow")
    places = {"record": record, "summary": json_file, "page": html_file}
    for what, path in places.items():
        if path is not None:
            console.print(f"{what:>8}: {os.path.abspath(path)}", soft_wrap=True, markup=False)


def _write_pages(summary: Summary, records: Path, at: Path) -> None:
    """Write the page, and beside it those of the runs whose numbers were recorded."""
    from .. import report

    files = [
        policy["numerics"]
        for recipe in summary["recipes"]
        for policy in recipe["policies"].values()
    ]
    links = {}
    for file in (file for file in files if file is not None):
        name = f"{at.stem}.{file.partition('.')[2]}".removesuffix(".jsonl") + ".html"
        replace_file(at.with_name(name), report.page(records / file))
        links[file] = quote(name)
    replace_file(at, report.render(summary, links))
