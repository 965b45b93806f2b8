"""`ragkit-index`: build and inspect index folders."""

from __future__ import annotations

import sys
from dataclasses import fields

from cyclopts import App

from ragkit import __version__
from ragkit.console import run

from .build import BuildSettings, build
from .info import check, info

app = App(name="ragkit-index", help="Build and inspect ragkit indexes.", version=__version__)
for command in (build, info, check):
    app.command(command)


def main() -> None:
    """Run the command line."""
    sys.exit(run(app, known=[field.name for field in fields(BuildSettings)]))


if __name__ == "__main__":
    main()
