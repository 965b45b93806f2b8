"""What a run's results say, as the sections of its page: tables and charts, none without data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any

from . import charts
from .contexts import CONTEXTS
from .stages import BOUNDS, CORRECT, STAGES, not_staged_note
from .statistics import Estimate

Estimates = dict[str, Estimate]

_MEASURES = ("nDCG", "MRR", "MAP", "recall", "hit", "answer", "EM", "F1", "cover", "ROUGE", "judge")
_COSTS = {
    "seconds": ("seconds", "{:,.1f}"),
    "per_question": ("ms a question", "{:,.1f}"),
    "per_prompt": ("ms a prompt", "{:,.1f}"),
    "peak_memory_mb": ("peak memory, MB", "{:,.0f}"),
    "peak_gpu_mb": ("peak GPU memory, MB", "{:,.0f}"),
    "prompts": ("prompts", "{:,}"),
    "prompt_tokens": ("tokens read", "{:,}"),
    "answer_tokens": ("tokens written", "{:,}"),
}
_NOISE = re.compile(r"noise (\d+(?:\.\d+)?) %")
_DOTS = "A dot is a mean over n questions, the line its 95 % bootstrap interval."


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table: text, a smaller line below, ids, and a stage whose questions it opens."""

    text: str
    below: str = ""
    ids: Sequence[str] = ()
    stage: str = ""


@dataclass(frozen=True, slots=True)
class Block:
    """A table, with a chart of it where that helps."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    chart: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the page; `name` is its anchor."""

    name: str
    title: str
    blocks: Sequence[Block]


def sections_of(results: Mapping[str, Any]) -> list[Section]:
    """Lay out what `results.json` holds, but its settings: a section for each kind that has data.

    Raises:
        KeyError, TypeError, ValueError: it is not what `evaluate` writes.
    """
    stages = results["stages"]
    made = (
        Section("scores", "Scores", [*_scores(results)]),
        Section("stages", "Where questions were lost", [*_stages(results)] if stages else []),
        Section("contexts", "What the reader makes of its passages", [*_contexts(results)]),
        Section("probes", "General ability", [*_probes(results["probes"])]),
        Section("costs", "Costs", [*_costs(results["costs"])]),
        Section("counts", "Counts", [*_counts(results)]),
    )
    return [section for section in made if section.blocks]


def estimates_of(values: Mapping[str, Any], known: Sequence[str] = _MEASURES) -> Estimates:
    """Read estimates by name, the known names first, and numbers within them by size."""
    estimates = {name: Estimate(**values[name]) for name in in_order(values, known)}
    for name, found in estimates.items():
        if not all(map(isfinite, (found.mean, found.low, found.high))):
            raise ValueError(f"{name} is {found}")
    return estimates


def in_order(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """Sort names: known ones (or what begins with one) first, in that order; numbers by size."""

    def key(name: str) -> tuple[int, list[tuple[int, str]]]:
        # "gold" begins "gold+distractors": the longest that fits is meant.
        fits = [place for place, start in enumerate(known) if name.startswith(start)]
        place = max(fits, key=lambda place: len(known[place]), default=len(known))
        parts = re.findall(r"\d{1,9}|\D+|\d", name)
        return place, [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]

    return sorted(names, key=key)


def _scores(results: Mapping[str, Any]) -> Iterable[Block]:
    for name, title in (("retrieval", "Retrieval"), ("answers", "Answers")):
        if found := estimates_of(results[name]):
            yield _measured(title, _DOTS, "measure", found)


def _measured(title: str, note: str, kind: str, estimates: Estimates) -> Block:
    name = title.lower().replace(" ", "-")
    caption = f"{title}: means with their intervals, as in the table"
    chart = charts.intervals([*estimates.items()], name, caption)
    return Block(title, note, _head(kind), [_row(*item) for item in estimates.items()], chart)


def _head(*kinds: str) -> tuple[str, ...]:
    return (*kinds, "mean", "95 % interval", "n")


def _row(label: str, estimate: Estimate) -> list[Cell]:
    texts = (label, _fixed(estimate.mean), _interval(estimate), f"{estimate.n:,}")
    return [Cell(text) for text in texts]


def _stages(results: Mapping[str, Any]) -> Iterable[Block]:
    stages = results["stages"]
    counts = [(name, int(stages["counts"][name])) for name in in_order(stages["counts"], STAGES)]
    total = sum(count for _, count in counts)
    if total:
        note = "Each question counts at the first stage that lost it, in the order of the stages."
        yield Block(
            "Questions by stage",
            f"{note} {not_staged_note(results['counts'].get('not_staged', 0))}".strip(),
            ("stage", "questions", "share"),
            [
                [Cell(stage, stage=stage), Cell(f"{count:,}"), Cell(f"{count / total:.1%}")]
                for stage, count in counts
            ],
            charts.bars(counts, [CORRECT], "by-stage", "Questions by the stage that lost them"),
        )
    if bounds := estimates_of(stages["bounds"], BOUNDS):
        note = (
            "The share of questions whose evidence survives so far, which no later stage can "
            "exceed but by chance or by heart; “answer” is the share answered rightly."
        )
        yield _measured("Oracle bounds", note, "up to", bounds)
    if gains := estimates_of(stages["gains"], ()):
        gains = dict(sorted(gains.items(), key=lambda item: -item[1].mean))
        note = "What a perfect part would add to the share of right answers."
        yield _measured("Gains within reach", note, "part", gains)


def _contexts(results: Mapping[str, Any]) -> Iterable[Block]:
    contexts = {
        name: estimates_of(results["contexts"][name])
        for name in in_order(results["contexts"], CONTEXTS)
    }
    noise = {float(match[1]): name for name in contexts if (match := _NOISE.fullmatch(name))}
    plain = {name: of for name, of in contexts.items() if name not in noise.values() and of}
    swept = {share: contexts[noise[share]] for share in sorted(noise) if contexts[noise[share]]}
    if plain:
        note = "The same questions and the same reader, given other passages. " + _DOTS
        caption = "Scores by what the reader is given, as in the table"
        yield _crossed("By context", note, "context", plain, partial(charts.groups, plain), caption)
    if figures := estimates_of(results["figures"], ("context gain",)):
        note = (
            "Over the questions that both contexts have. Context gain: retrieved − none. "
            "Distraction loss: gold − gold+distractors. Over-reliance: wrong answers that rest on "
            "a wrong passage. Order gain: retrieved − shuffled; position sensitivity: scores that "
            "change with the order."
        )
        yield _measured("Figures", note, "figure", figures)
    if swept:
        note = (
            "Answers as more of the passages are distractors, each share within 5 points, of the "
            "questions that can have all of them; bands are 95 % intervals."
        )
        caption = "Scores by the share of distractors, as in the table"
        axis = "distractors among the passages"
        table = {f"{share:g} %": of for share, of in swept.items()}
        draw = partial(charts.sweep, swept, axis)
        yield _crossed("Noise sweep", note, "distractors", table, draw, caption)


def _crossed(
    title: str,
    note: str,
    kind: str,
    table: Mapping[str, Estimates],
    draw: Callable[[str, str], str],
    caption: str,
) -> Block:
    """Lay out a table with a row for each context and a column for each measure."""
    measures = in_order({measure for of in table.values() for measure in of}, _MEASURES)
    rows = []
    for name, of in table.items():
        cells = [
            Cell(_fixed(of[m].mean), below=_interval(of[m])) if m in of else Cell("")
            for m in measures
        ]
        rows.append([Cell(name), *cells, Cell(f"{max(e.n for e in of.values()):,}")])
    chart = draw(title.lower().replace(" ", "-"), caption)
    return Block(title, note, (kind, *measures, "n"), rows, chart)


def _probes(probes: Mapping[str, Any]) -> Iterable[Block]:
    found = {
        f"{probe}, {measure}": estimate
        for probe in in_order(probes, ())
        for measure, estimate in estimates_of(probes[probe]).items()
    }
    if found:
        rows = [_row(*item) for item in found.items()]
        shares = [item for item in found.items() if item[1].low >= 0 and item[1].high <= 1]
        chart = charts.intervals(shares, "probes", "Shares of the table") if shares else ""
        note = "What the generator can do without passages."
        yield Block("Probes", note, _head("probe"), rows, chart)


def _costs(costs: Mapping[str, Any]) -> Iterable[Block]:
    kinds = [kind for kind in _COSTS if any(kind in cost for cost in costs.values())]
    rows = []
    for stage in in_order(costs, ("retrieve", "rerank", "read")):
        cost = dict(costs[stage])
        cost |= {name: 1000 * cost[name] for name in ("per_question", "per_prompt") if name in cost}
        cells = [Cell(_COSTS[k][1].format(cost[k]) if k in cost else "") for k in kinds]
        rows.append([Cell(stage), *cells])
    if rows:
        note = "Over all questions and contexts; loading on first use is part of it."
        yield Block("By stage", note, ("stage", *(_COSTS[kind][0] for kind in kinds)), rows)


def _counts(results: Mapping[str, Any]) -> Iterable[Block]:
    rows = [
        [
            Cell(name.replace("_", " ")),
            Cell(f"{results['counts'][name]:,}"),
            Cell("", ids=results["listed"].get(name, ())),
        ]
        for name in in_order(results["counts"], ("questions", "judged", "with_gold"))
    ]
    if rows:
        note = "What the scores leave out or that needs a look, with the first ids of each kind."
        head = ("what", "count", "first ids")
        yield Block("Questions and documents", note, head, rows)


def _fixed(value: float) -> str:
    return f"{value:,.3f}".replace("-", "−")


def _interval(estimate: Estimate) -> str:
    return f"{_fixed(estimate.low)} – {_fixed(estimate.high)}"
