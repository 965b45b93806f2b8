"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .results import Results
from .statistics import Estimate

HEADLINES = ("nDCG@10", "recall@10", "answer@10", "EM", "F1")
"""The measures that `results_table` shows unless told otherwise."""


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


def run_tables(results: Results, title: str = "") -> list[Table | str]:
    """Lay out all that one run shows: measures, contexts, losses, costs, and what to do next."""
    shown: list[Table | str] = [measures_table(results, title)]
    if results.contexts:
        shown.append(_contexts_table(results))
    if results.stages:
        table = Table(title="Where questions were lost")
        table.add_column("stage")
        table.add_column("questions", justify="right")
        for stage, count in results.stages.counts.items():
            table.add_row(stage, str(count))
        shown += [table, results.stages.advice]
    if results.costs:
        shown.append(_costs_table(results))
    return shown


def _contexts_table(results: Results) -> Table:
    table = Table(title="What the reader makes of its passages")
    table.add_column("context")
    measures = list(next(iter(results.contexts.values())))
    for name in (*measures, "n"):
        table.add_column(name, justify="right")
    for context, estimates in results.contexts.items():
        sizes = {estimate.n for estimate in estimates.values()}
        table.add_row(context, *map(str, estimates.values()), str(max(sizes)))
    table.add_section()
    for figure, estimate in results.figures.items():
        table.add_row(figure, str(estimate), *[""] * (len(measures) - 1), str(estimate.n))
    return table


def _costs_table(results: Results) -> Table:
    table = Table(title="Costs")
    table.add_column("stage")
    heads = ("seconds", "ms a question", "peak memory, MB", "tokens read", "tokens written")
    for name in heads:
        table.add_column(name, justify="right")
    for stage, cost in results.costs.items():
        tokens = (cost.prompt_tokens, cost.answer_tokens)
        table.add_row(
            stage,
            f"{cost.seconds:.1f}",
            f"{1000 * cost.seconds / results.counts['questions']:.1f}",
            f"{cost.peak_memory_mb:,.0f}",
            *("" if count is None else f"{count:,}" for count in tokens),
        )
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


def _cell(value: Estimate | None) -> str:
    return str(value).replace(" ", "\n", 1) if value else ""
