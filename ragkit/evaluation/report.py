"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .leaks import KINDS, Leaks
from .results import Results
from .statistics import Estimate

HEADLINES = ("nDCG@10", "recall@10", "answer@10", "EM", "F1")
"""The measures that `results_table` shows unless told otherwise."""

_LAST_OF_SECTION = ("near_answered", "test_duplicates")


def measures_table(results: Results, title: str = "") -> Table:
    """Lay out one run: a row per measure with its mean, interval and n."""
    table = Table(title=title or None)
    table.add_column("measure")
    for name in ("mean", "95 % interval", "n"):
        table.add_column(name, justify="right")
    for estimates in (results.retrieval, results.answers):
        for measure, value in estimates.items():
            interval = f"{value.low:.3f} – {value.high:.3f}"
            table.add_row(measure, f"{value.mean:.3f}", interval, str(value.n))
        table.add_section()
    return table


def results_table(
    systems: Sequence[tuple[str, Results]],
    measures: Sequence[str] = HEADLINES,
    title: str = "",
) -> Table:
    """Lay out runs side by side: a row per system, a column per measure that any of them has.

    A cell holds the mean and, below it, its interval; one is empty where the system was not
    measured so. The column's head says over how many questions the means are.
    """
    values = [(name, results.retrieval | results.answers) for name, results in systems]
    shown = [name for name in measures if any(name in estimates for _, estimates in values)]
    table = Table(title=title or None)
    table.add_column("system")
    for measure in shown:
        sizes = {estimates[measure].n for _, estimates in values if measure in estimates}
        numbers = ", ".join(str(size) for size in sorted(sizes))
        table.add_column(f"{measure}\nn = {numbers}", justify="right")
    for name, estimates in values:
        table.add_row(name, *(_cell(estimates.get(measure)) for measure in shown))
    return table


def leaks_table(leaks: Leaks, title: str = "") -> Table:
    """Lay out an audit: a row for each kind of leak with its count, n and share."""
    caption = f"nearly the same: a similarity of {leaks.threshold} or more"
    if leaks.one_set:
        caption += "; train is test, and no question is compared with itself"
    table = Table(title=title or None, caption=caption)
    table.add_column("leak")
    for name in ("count", "n", "share"):
        table.add_column(name, justify="right")
    for kind, share in leaks.shares.items():
        value = "" if share.share is None else f"{share.share:.2%}"
        table.add_row(KINDS[kind], str(share.count), str(share.n), value)
        if kind in _LAST_OF_SECTION:
            table.add_section()
    return table


def _cell(value: Estimate | None) -> str:
    return str(value).replace(" ", "\n", 1) if value else ""
