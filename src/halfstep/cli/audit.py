"""``halfstep audit``: what could go wrong with a recipe's model under a policy, or be better."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from ..core.advice import RULES, SEVERITIES, Report
from ..recipes import BUILT_IN
from .compare import quiet_checks
from .from_recipe import first_batch, one_policy, torch_recipe
from .writing import replace_file

_HELP = f"""Say what could go wrong with a model under a policy, or be better.

RECIPE is a built-in recipe ({", ".join(BUILT_IN)}) or a Python file, as for `halfstep compare`. Its
model runs one batch forward; nothing is trained.

\b
Exit status:
  0  nothing found, or nothing as bad as --fail-on
  1  a finding as bad as --fail-on, or worse
  2  the command, the recipe or the policy is wrong
"""

_NEVER = "never"


@click.command(help=_HELP)
@click.argument("recipe", metavar="RECIPE")
@click.option(
    "--policy",
    metavar="P",
    default="mixed_float16",
    show_default=True,
    help="A name, or a JSON file with a policy or a policy map.",
)
@click.option(
    "--silence",
    metavar="RULE",
    multiple=True,
    type=click.Choice(list(RULES)),
    help=f"A rule that shall say nothing; can be given again. The rules: {', '.join(RULES)}.",
)
@click.option(
    "--fail-on",
    type=click.Choice([*SEVERITIES, _NEVER]),
    default="warning",
    show_default=True,
    help="The least severity that makes the exit status 1.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights and batches.")
@click.option("--device", help="For instance cuda:1. [default: a GPU if there is one]")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write the findings.")
def audit(
    recipe: str,
    policy: str,
    silence: tuple[str, ...],
    fail_on: str,
    seed: int,
    device: str | None,
    json_file: str | None,
) -> None:
    """Read the options, look, print, write, and exit with a code that serves CI."""
    report = _look(recipe, policy, silence, seed, device)
    click.echo(_coloured(str(report)))
    if json_file is not None:
        plain = {"recipe": recipe, **report.to_plain()}
        replace_file(Path(json_file), json.dumps(plain, ensure_ascii=False, indent=1) + "\n")
    failed = fail_on != _NEVER and any(
        finding.severity in SEVERITIES[SEVERITIES.index(fail_on) :] for finding in report
    )
    sys.exit(1 if failed else 0)


def _look(
    recipe: str, policy: str, silence: tuple[str, ...], seed: int, device: str | None
) -> Report:
    chosen = one_policy(policy)
    loaded = torch_recipe(recipe)
    model, batch = first_batch(loaded, seed, device)
    import halfstep.torch as door

    def loss(model: object, batch: object) -> object:
        return loaded.call("loss", model, batch)

    with quiet_checks():
        return door.audit(model, chosen, batch, loss, silence=silence)


_COLOURS = {"error": "red", "warning": "yellow", "hint": "cyan"}


def _coloured(text: str) -> str:
    """Colour the severities; click takes the colours out again where nobody sees them."""
    lines = text.split("\n")
    for index, line in enumerate(lines):
        word, rest = line[:8].rstrip(), line[8:]
        if word in _COLOURS:
            lines[index] = click.style(f"{word:8}", fg=_COLOURS[word], bold=True) + rest
    return "\n".join(lines)
