"""`ragkit-index info` and `ragkit-index check`: what an index holds, and whether it is sound."""

from __future__ import annotations

from pathlib import Path

from ragkit.console import print_json, progress_bars
from ragkit.errors import IndexStateError

from .build import describe


def info(*, index: Path, json: bool = False) -> None:
    """Show what an index holds.

    Example: ragkit-index info --index kb

    Parameters
    ----------
    index
        The index folder.
    json
        Print it as JSON.
    """
    from ragkit.stores.index import Index

    summary = describe(Index.open(index))
    if json:
        print_json(summary)
        return
    for name, value in summary.items():
        shown = (
            ", ".join(f"{key} {item}" for key, item in value.items() if item not in (None, ""))
            if isinstance(value, dict)
            else ", ".join(value)
            if isinstance(value, list)
            else value
        )
        print(f"{name:<12} {shown}")


def check(*, index: Path, json: bool = False) -> None:
    """Compare every file of an index with its checksum, and its stores with one another.

    Example: ragkit-index check --index kb

    Parameters
    ----------
    index
        The index folder.
    json
        Print the result as JSON.
    """
    from ragkit.stores.index import Index

    opened = Index.open(index)
    with progress_bars() as progress:
        problems = opened.check(progress)
    if json:
        print_json({"index": str(index), "sound": not problems, "problems": problems})
    if problems:
        raise IndexStateError("\n".join([*problems, "Build the index again."]))
    if not json:
        print(f"{index}: sound, {len(opened):,} documents")
