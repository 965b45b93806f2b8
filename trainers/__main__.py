"""`ragkit-train`: fine-tune the parts of a pipeline."""

from __future__ import annotations

import sys

from cyclopts import App

from ragkit import __version__
from ragkit.console import run

from .generator import generator
from .negatives import negatives
from .reranker import reranker
from .retriever import retriever
from .virtual_tokens import virtual_tokens

app = App(
    name="ragkit-train",
    help="Fine-tune the parts of a pipeline. A TOML file of settings: --config FILE.",
    version=__version__,
    help_format="plaintext",
)
app.command(negatives)
app.command(retriever)
app.command(reranker)
app.command(generator)
app.command(virtual_tokens)


def main() -> None:
    """Run the command line."""
    sys.exit(run(app))


if __name__ == "__main__":
    main()
