"""``halfstep explain``: which operations or layers of a recipe's model run in 16 bits, and why."""

from __future__ import annotations

import click

from ..errors import PolicyError
from ..recipes import BUILT_IN
from .compare import quiet_checks

_HELP = f"""Say what a policy does to a model: what runs in 16 bits, what does not, and why.

RECIPE is a built-in recipe ({", ".join(BUILT_IN)}) or a Python file. A JAX recipe is explained
operation by operation, a recipe of torch or Keras layer by layer. It fails when nothing runs in
16 bits.
"""


@click.command(help=_HELP)
@click.argument("recipe", metavar="RECIPE")
@click.option(
    "--policy",
    metavar="P",
    default="mixed_bfloat16",
    show_default=True,
    help="A name, or a JSON file with a policy or a policy map.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights and batches.")
def explain(recipe: str, policy: str, seed: int) -> None:
    """Load the recipe, ask what trains it, and print."""
    from ..compare import load_recipe, parse_policies
    from ..compare.run import set_up
    from ..compare.trainers import trainer_of

    chosen = parse_policies(policy, option="--policy")
    if len(chosen) != 1:
        raise PolicyError(f"--policy {policy}: one policy at a time.")
    loaded = load_recipe(recipe)
    trainer = trainer_of(loaded)
    set_up(loaded, seed, trainer.pick_device())
    (only,) = chosen.values()
    with quiet_checks():
        table = trainer.explain(loaded, only, seed)
    click.echo(table)
