"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from .comparison import Comparison, Outcome
from .leaks import KINDS, Leaks
from .results import Results
from .stages import not_staged_note
from .statistics import ALPHA, Estimate

HEADLINES = ("nDCG@10", "recall@10", "answer@10", "EM", "F1")
"""The measures that `results_table` shows unless told otherwise."""

_LEGEND = (
    "p: permutation test; * significant at {alpha} after Holm's adjustment of all {tests} p; "
    "w/t/l: questions that B wins, ties, loses; seen: the difference that so many questions show 4 "
    "times in 5."
)
_CONTEXT_MEASURES = ("EM", "F1", "cover")
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


def run_tables(results: Results, title: str = "") -> list[Table | str]:
    """Lay out all that one run shows: measures, contexts, losses, costs, and what to do next."""
    shown: list[Table | str] = [measures_table(results, title)]
    if results.contexts:
        shown += _contexts_tables(results)
    if results.stages:
        table = Table(title="Where questions were lost")
        table.add_column("stage")
        table.add_column("questions", justify="right")
        for stage, count in results.stages.counts.items():
            table.add_row(stage, str(count))
        notes = [not_staged_note(results.counts.get("not_staged", 0)), results.stages.advice]
        shown += [table, *filter(None, notes)]
    if results.costs:
        shown.append(_costs_table(results))
    return shown


def _contexts_tables(results: Results) -> Iterator[Table]:
    table = Table(title="What the reader makes of its passages")
    table.add_column("context")
    for name in (*_CONTEXT_MEASURES, "n"):
        table.add_column(name, justify="right")
    for context, estimates in results.contexts.items():
        shown = [estimates[name] for name in _CONTEXT_MEASURES]
        table.add_row(context, *map(_cell, shown), str(shown[0].n))
    yield table
    if results.figures:
        table = Table(title="How it uses them")
        for name, justify in (("figure", "left"), ("95 % interval", "right"), ("n", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for figure, estimate in results.figures.items():
            table.add_row(figure, str(estimate), str(estimate.n))
        yield table


def _costs_table(results: Results) -> Table:
    table = Table(title="Costs")
    table.add_column("stage")
    heads = ("seconds", "ms each", "peak memory, MB", "tokens read", "tokens written")
    for name in heads:
        table.add_column(name, justify="right")
    for stage, cost in results.costs.items():
        tokens = (cost.prompt_tokens, cost.answer_tokens)
        each = cost.each(results.counts["questions"])
        kind = "question" if cost.prompts is None else "prompt"
        table.add_row(
            stage,
            f"{cost.seconds:.1f}",
            "" if each is None else f"{1000 * each:.1f} a {kind}",
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


def comparison_tables(comparison: Comparison) -> list[Table | Text]:
    """Lay out a comparison: a table for each system against the baseline, remarks, a conclusion.

    A star marks what is significant after Holm's adjustment. A further table tells how the runs of
    systems of several seeds spread. Tables fit into 110 columns.
    """
    shown: list[Table | Text] = [
        _outcomes_table(comparison, system.name) for system in comparison.systems[1:]
    ]
    if any(system.seeds > 1 for system in comparison.systems):
        shown.append(_seeds_table(comparison))
    notes = [f"Note: {remark}." for remark in comparison.remarks]
    notes += [_LEGEND.format(alpha=ALPHA, tests=len(comparison.outcomes)), _conclusion(comparison)]
    return [*shown, *map(Text, notes)]  # names are data, never markup


def _outcomes_table(comparison: Comparison, name: str) -> Table:
    seeds = {system.name: system.seeds for system in comparison.systems}
    baseline = comparison.systems[0].name
    sides = [
        f"{side} ({seeds[side]} seeds)" if seeds[side] > 1 else side for side in (baseline, name)
    ]
    table = Table(
        title=Text(f"A = {sides[0]}, B = {sides[1]}"),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column("measure", min_width=9, overflow="fold")
    for head in ("A", "B", "B − A", "95 % interval", "p", "Holm p", "w/t/l", "seen"):
        table.add_column(head, justify="right", no_wrap=True)
    for outcome in comparison.outcomes:
        if outcome.system == name:
            table.add_row(Text(outcome.measure), *_outcome_cells(outcome))
    return table


def _outcome_cells(outcome: Outcome) -> list[str]:
    found = outcome.difference
    return [
        f"{outcome.baseline_mean:.3f}",
        f"{outcome.system_mean:.3f}",
        f"{found.mean:+.3f}",
        f"{found.low:+.3f}, {found.high:+.3f}",
        _p(found.permutation_p),
        _p(outcome.holm_p) + ("*" if outcome.significant else " "),
        f"{found.wins}/{found.ties}/{found.losses}",
        "" if found.detectable is None else f"{found.detectable:.3f}",
    ]


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _seeds_table(comparison: Comparison) -> Table:
    table = Table(title="Seeds", box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("system")
    table.add_column("measure")
    for head in ("mean", "seeds", "sd", "lowest", "highest"):
        table.add_column(head, justify="right", no_wrap=True)
    for system in comparison.systems:
        if system.seeds == 1:
            continue
        for measure, score in system.measures.items():
            table.add_row(
                Text(system.name),
                Text(measure),
                str(score.estimate),
                str(system.seeds),
                "" if score.sd is None else f"{score.sd:.3f}",
                f"{score.lowest:.3f}",
                f"{score.highest:.3f}",
            )
        table.add_section()
    return table


def _conclusion(comparison: Comparison) -> str:
    """Say in words what a comparison found."""
    baseline, said = comparison.systems[0].name, []
    for system in comparison.systems[1:]:
        outcomes = [outcome for outcome in comparison.outcomes if outcome.system == system.name]
        found = [outcome for outcome in outcomes if outcome.significant]
        better = [outcome.measure for outcome in found if outcome.difference.mean > 0]
        worse = [outcome.measure for outcome in found if outcome.difference.mean < 0]
        sides = [
            f"{word} than {baseline} on {', '.join(measures)}"
            for word, measures in (("better", better), ("worse", worse))
            if measures
        ]
        said.append(f"{system.name} is {' and '.join(sides) or _unseen(baseline, outcomes)}")
    return f"After Holm's adjustment, {'; '.join(said)}."


def _unseen(baseline: str, outcomes: Sequence[Outcome]) -> str:
    if not any(outcome.difference.wins + outcome.difference.losses for outcome in outcomes):
        return f"no different from {baseline} in any question"
    sizes = [o.difference.detectable for o in outcomes if o.difference.detectable is not None]
    known = f" (detectable were {min(sizes):.3f} to {max(sizes):.3f})" if sizes else ""
    return f"not told apart from {baseline} on any measure{known}"
