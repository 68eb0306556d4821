"""The click group behind ``halfstep``: its commands are imported when they run, not before."""

from __future__ import annotations

import importlib
import sys
from typing import Any, NamedTuple

import click
import rich  # noqa: F401  # every command prints with it, so its absence is told at once

from .. import __version__
from ..errors import HalfstepError, nearest


class Entry(NamedTuple):
    """Where a command lives, and its line in the group's help."""

    target: str
    help: str


COMMANDS = {
    "doctor": Entry(
        "halfstep.cli.doctor:doctor",
        "Say what this machine has and which policy pays on it.",
    ),
    "compare": Entry(
        "halfstep.cli.compare:compare",
        "Train the same model under several policies, side by side.",
    ),
    "explain": Entry(
        "halfstep.cli.explain:explain",
        "Say what a policy does to a model, operation by operation, and why.",
    ),
    "audit": Entry(
        "halfstep.cli.audit:audit",
        "Say what could go wrong with a model under a policy, or be better.",
    ),
    "tune": Entry(
        "halfstep.cli.tune:tune",
        "Find the layers that must stay out of 16 bits, and write the policy.",
    ),
    "report": Entry(
        "halfstep.cli.report:report",
        "Write the page of what a run left behind.",
    ),
}
"""Every command by name."""

_EXTRAS = {
    "torch": "torch",
    "jax": "jax",
    "optax": "jax",
    "keras": "keras",
    "jinja2": "report",
    "plotly": "report",
    "sklearn": "demo",
    "psutil": "demo",
}
"""Which extra of the distribution brings a module."""


class UsageProblem(click.ClickException):
    """An error of halfstep's own, or something that is not installed: told in one message."""

    exit_code = 2


def _missing(command: str, error: ModuleNotFoundError) -> UsageProblem:
    module = (error.name or "").partition(".")[0]
    extra = _EXTRAS.get(module)
    install = f"halfstep[{extra}]" if extra else module
    return UsageProblem(
        f"`halfstep {command}` needs {module}, which is not installed: pip install '{install}'"
    )


def load(name: str) -> click.Command:
    """Import the command of this name.

    Raises:
        ModuleNotFoundError: it needs something that is not installed.
    """
    module, _, attribute = COMMANDS[name].target.partition(":")
    command: click.Command = getattr(importlib.import_module(module), attribute)
    return command


class LazyGroup(click.Group):
    """A group whose commands come from :data:`COMMANDS` and are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every name in the table, and whatever was added by ``add_command``."""
        return [*COMMANDS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command."""
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        try:
            return load(cmd_name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "halfstep":
                raise
            raise _missing(cmd_name, error) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown one gets the nearest name."""
        known = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in known:
            ctx.fail(f"No such command {args[0]!r}.{nearest(args[0], known)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands from the table, so that help works whatever is installed."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run; halfstep's own errors become one message, without a traceback."""
        try:
            return super().invoke(ctx)
        except HalfstepError as error:
            raise UsageProblem(str(error)) from error
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in _EXTRAS:
                raise
            raise _missing(ctx.invoked_subcommand or "", error) from None


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(
    __version__,
    prog_name="halfstep",
    message=f"%(prog)s %(version)s (Python {sys.version.partition(' ')[0]})",
)
@click.pass_context
def halfstep(ctx: click.Context) -> None:
    """Mixed precision training: which policy pays here, and what it changes."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
