"""``halfstep report``: the page of what a run left behind."""

from __future__ import annotations

import os
from pathlib import Path

import click

from .writing import replace_file


@click.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False), help="The page. [default: FILE with .html]"
)
def report(file: str, output: str | None) -> None:
    """Write the page of a run: one HTML file that needs no network.

    FILE is the record of a numerics monitor (run.jsonl), the record of `halfstep compare`, or
    what that wrote with --json.
    """
    from .. import report as pages

    at = Path(file).with_suffix(".html") if output is None else Path(output)
    replace_file(at, pages.page(file))
    click.echo(f"page: {os.path.abspath(at)}")
