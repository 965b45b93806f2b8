"""`ragkit-index`: build, change and inspect index folders."""

from __future__ import annotations

import sys

from cyclopts import App

from ragkit import __version__
from ragkit.console import run

from .build import build
from .grow import add, compact, delete, update
from .info import check, info
from .refresh import refresh

app = App(
    name="ragkit-index",
    help="Build, change and inspect ragkit indexes.",
    version=__version__,
    help_format="plaintext",
)
for command in (build, add, update, delete, compact, refresh, info, check):
    app.command(command)


def main() -> None:
    """Run the command line."""
    sys.exit(run(app))


if __name__ == "__main__":
    main()
