"""The command line: ``halfstep doctor``, ``halfstep compare``, ...

Importing this package imports neither click nor rich; they are the extra ``cli``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

_PARTS = ("click", "rich")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: the words after ``halfstep``; left out, those of this process.
    """
    try:
        from .group import halfstep
    except ModuleNotFoundError as error:
        if error.name not in _PARTS:
            raise
        sys.stderr.write(
            f"halfstep: the command line needs {' and '.join(_PARTS)}, and {error.name} is not "
            "installed: pip install 'halfstep[cli]'\n"
        )
        sys.exit(1)
    halfstep(None if arguments is None else list(arguments), prog_name="halfstep")
