"""``halfstep tune``: find the layers that must stay out of 16 bits, and write the policy."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..core.tracking import TOLERANCE
from ..recipes import BUILT_IN
from .compare import quiet_checks
from .from_recipe import set_up, torch_recipe
from .writing import replace_file

if TYPE_CHECKING:
    from ..core.tuning import Trial, Tuning

_HELP = f"""Find the fewest layers that must stay out of 16 bits, and write the policy.

RECIPE is a built-in recipe ({", ".join(BUILT_IN)}) or a Python file, as for `halfstep compare`.
It is trained in float32 and then under --target, in short runs, until the loss tracks float32's
with as few layers kept as can be; every claim is run again on another seed. The file that is
written is what `halfstep compare --policies` takes, and PolicyMap.from_config.

\b
Exit status:
  0  found, or none needed; the policy was written
  1  no choice of layers makes the loss track float32's; nothing was written
  2  the command or the recipe is wrong, or float32 itself does not train
"""


@click.command(help=_HELP)
@click.argument("recipe", metavar="RECIPE")
@click.option(
    "--target",
    type=click.Choice(["mixed_float16", "mixed_bfloat16"]),
    default="mixed_float16",
    show_default=True,
    help="What every layer shall follow that can.",
)
@click.option(
    "--keep",
    type=click.Choice(["float32", "mixed_bfloat16"]),
    default="float32",
    show_default=True,
    help="What the others follow.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=TOLERANCE,
    show_default=True,
    help="The share of float32's loss by which it may differ, beside the noise of float32.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Of each run: enough for the fault to show.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="The next one proves it.")
@click.option("--device", help="For instance cuda:1. [default: a GPU if there is one]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: torch's]")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False),
    default="tuned.json",
    show_default=True,
    help="Where the policy goes.",
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write every run.")
def tune(
    recipe: str,
    target: str,
    keep: str,
    tolerance: float,
    steps: int,
    seed: int,
    device: str | None,
    threads: int | None,
    output: str,
    json_file: str | None,
) -> None:
    """Read the options, search, print, write, and exit with a code that says how it went."""
    if keep == target:
        raise click.UsageError(f"--keep {keep}: that is what the layers are to be kept from.")
    loaded = torch_recipe(recipe)
    chosen = set_up(loaded, seed, device)
    from ..compare.torch_device import threads as with_threads
    from ..torch import tune as find

    with quiet_checks(), with_threads(threads):
        found = find(
            loaded.module, target, keep=keep, tolerance=tolerance, steps=steps, seed=seed,
            device=chosen, on_trial=lambda trial: click.echo(_said(trial), err=True),
        )  # fmt: skip
    click.echo(str(found))
    _write(found, recipe, output, json_file)
    sys.exit(0 if found.enough else 1)


def _write(found: Tuning, recipe: str, output: str, json_file: str | None) -> None:
    if json_file is not None:
        plain = {"recipe": recipe, **found.to_plain()}
        replace_file(Path(json_file), json.dumps(plain, ensure_ascii=False) + "\n")
    if found.enough:
        config = json.dumps(found.policy.get_config(), ensure_ascii=False, indent=1)
        replace_file(Path(output), config + "\n")
        click.echo(
            f"Wrote {output}. Compare: halfstep compare {recipe} --policies float32,{output}"
        )


def _said(trial: Trial) -> str:
    """A run in one line."""
    if trial.kept is None:
        words = {"baseline": "float32", "noise": "float32 with 16-bit digits: its noise"}
        return f"seed {trial.seed}: {words.get(trial.purpose, trial.purpose)}"
    kept = f"{len(trial.kept)} kept" if len(trial.kept) != 1 else f"kept {trial.kept[0]!r}"
    if trial.tracks:
        how = f"tracks, {trial.deviation:.2%} off of {trial.allowed:.2%} allowed"
    else:
        how = f"does not track: {trial.reason}"
    return f"seed {trial.seed}: {kept}: {how}"
