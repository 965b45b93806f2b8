"""Systems compared question by question with the first of them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, SettingsError
from .gold import LISTED, sample
from .statistics import ALPHA, Difference, Estimate, bootstrap_means, holm, paired_differences
from .systems import RunFolder, System, check_comparable

Questions = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SystemScore:
    """A system's mean of one measure.

    Attributes:
        estimate: over the questions that all of its runs have a score for.
        sd: the standard deviation of its runs' means; None for a single run.
        lowest, highest: those of its runs' means.
    """

    estimate: Estimate
    sd: float | None
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True)
class SystemScores:
    """A system's means: measure -> score, over runs of so many seeds in these folders."""

    name: str
    seeds: int
    folders: tuple[str, ...]
    measures: dict[str, SystemScore]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a system compares with the baseline by one measure.

    Attributes:
        system: the system's name.
        measure: the measure's name.
        baseline_mean, system_mean: over the questions that are compared.
        difference: of the system to the baseline.
        holm_p: the permutation p, adjusted for all outcomes of the comparison.
        left_out: how many questions are not compared, since only some of the runs score them.
        listed: the first of those.
    """

    system: str
    measure: str
    baseline_mean: float
    system_mean: float
    difference: Difference
    holm_p: float
    left_out: int
    listed: tuple[str, ...]

    @property
    def significant(self) -> bool:
        """Whether the difference stands out after Holm's adjustment."""
        return self.holm_p <= ALPHA


@dataclass(frozen=True, slots=True)
class Comparison:
    """Systems, the first of them the baseline, how the others differ, and what to know about it."""

    systems: tuple[SystemScores, ...]
    outcomes: tuple[Outcome, ...]
    remarks: tuple[str, ...]
    resamples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        significant = [{"significant": outcome.significant} for outcome in self.outcomes]
        values = asdict(self)
        outcomes = [a | b for a, b in zip(values["outcomes"], significant, strict=True)]
        head = {"ragkit": version("ragkit"), "baseline": self.systems[0].name}
        return head | values | {"outcomes": outcomes}


def compare(
    systems: Sequence[System],
    *,
    measures: Sequence[str] = (),
    other_corpus: bool = False,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare systems with the first of them, by every measure that both have for each question.

    Intervals and tests are those of `paired_differences`; Holm's adjustment is over all systems
    and measures. Ratios over all questions, such as abstention precision, are not compared.

    Args:
        systems: at least two, as `group_runs` gives them.
        measures: compare by these alone: the fewer tests, the less Holm's adjustment costs.
        other_corpus: whether systems may have searched different corpora.
        resamples: draws of each interval and test.
        seed: of the draws.

    Raises:
        SettingsError: a measure that no run has, fewer than two systems, one without runs, a name
            twice, or a run twice within a system.
        DataError: runs of different questions, qrels, or corpora, or no measure to compare.
    """
    remarks = check_comparable(systems, other_corpus=other_corpus)
    if measures:
        systems = _only(systems, measures)
    scores = _system_scores(systems, resamples, seed)
    outcomes = _outcomes(systems, remarks, resamples, seed)
    if not outcomes:
        raise DataError(f"nothing can be compared: {'; '.join(remarks)}")
    adjusted = holm([outcome.difference.permutation_p for outcome in outcomes])
    outcomes = [replace(o, holm_p=p) for o, p in zip(outcomes, adjusted, strict=True)]
    seeds = {system.name: max(len(systems[0].runs), len(system.runs)) for system in systems}
    for outcome in outcomes:
        held = outcome.difference.low <= 0 <= outcome.difference.high
        if outcome.significant and held and seeds[outcome.system] > 1:
            remarks.append(
                f"{outcome.measure} of {outcome.system}: the difference is significant for these "
                "seeds, but its interval, which speaks of other seeds as well, holds 0"
            )
    return Comparison(tuple(scores), tuple(outcomes), tuple(remarks), resamples, seed)


def _only(systems: Sequence[System], measures: Sequence[str]) -> list[System]:
    known = {measure for system in systems for run in system.runs for measure in run.scores}
    if unknown := sorted(set(measures) - known):
        names = ", ".join(sorted(known, key=_order))
        raise SettingsError(f"no run has the measures {', '.join(unknown)}; they have {names}")
    return [
        replace(
            system,
            runs=tuple(
                replace(run, scores={m: run.scores[m] for m in measures if m in run.scores})
                for run in system.runs
            ),
        )
        for system in systems
    ]


def _measures(runs: Sequence[RunFolder]) -> list[str]:
    """Return the measures that all runs have: recall@5 before recall@10, other contexts last."""
    shared = set.intersection(*(set(run.scores) for run in runs))
    return sorted(shared, key=_order)


def _order(measure: str) -> tuple[bool, list[str | int]]:
    pieces = re.split(r"(\d+)", measure)
    natural = [int(piece) if place % 2 else piece for place, piece in enumerate(pieces)]
    return measure.endswith(")"), natural


def _scored(runs: Sequence[RunFolder], measure: str) -> tuple[Questions, Questions]:
    """Return the questions that all runs score by a measure, and those that only some do."""
    counts = Counter(query for run in runs for query in run.scores[measure])
    asked = list(counts)
    shared = tuple(query for query in asked if counts[query] == len(runs))
    return shared, tuple(query for query in asked if counts[query] < len(runs))


def _values(runs: Sequence[RunFolder], measure: str, questions: Questions) -> NDArray[np.float64]:
    """Return a measure's values [runs, questions]."""
    return np.array([[run.scores[measure][query] for query in questions] for run in runs])


def _system_scores(systems: Sequence[System], resamples: int, seed: int) -> list[SystemScores]:
    jobs: dict[Questions, list[tuple[System, str]]] = defaultdict(list)
    for system in systems:
        for measure in _measures(system.runs):
            if questions := _scored(system.runs, measure)[0]:
                jobs[questions].append((system, measure))
    found: dict[tuple[str, str], SystemScore] = {}
    for questions, columns in jobs.items():
        values = [_values(system.runs, measure, questions) for system, measure in columns]
        estimates = bootstrap_means(values, resamples=resamples, seed=seed)
        for (system, measure), matrix, estimate in zip(columns, values, estimates, strict=True):
            means = matrix.mean(axis=1)
            sd = float(means.std(ddof=1)) if len(means) > 1 else None
            score = SystemScore(estimate, sd, float(means.min()), float(means.max()))
            found[system.name, measure] = score
    return [
        SystemScores(
            system.name,
            len(system.runs),
            tuple(str(run.path) for run in system.runs),
            {m: found[system.name, m] for m in _measures(system.runs) if (system.name, m) in found},
        )
        for system in systems
    ]


def _outcomes(
    systems: Sequence[System], remarks: list[str], resamples: int, seed: int
) -> list[Outcome]:
    """Compare by every shared measure; p values are not adjusted yet."""
    baseline = systems[0]
    jobs: dict[Questions, list[tuple[System, str]]] = defaultdict(list)
    left_out: dict[tuple[str, str], Questions] = {}
    for system in systems[1:]:
        runs = [*baseline.runs, *system.runs]
        remarks += _not_shared(baseline, system)
        for measure in _measures(runs):
            questions, left_out[system.name, measure] = _scored(runs, measure)
            if len(questions) > 1:
                jobs[questions].append((system, measure))
            else:
                remarks.append(
                    f"{measure} of {system.name} is not compared: {len(questions)} questions have "
                    "it in all runs, at least 2 are needed"
                )
        remarks += _left_out_remarks(baseline, system, left_out)
    found: dict[tuple[str, str], Outcome] = {}
    for questions, columns in jobs.items():
        pairs = [
            (_values(baseline.runs, measure, questions), _values(system.runs, measure, questions))
            for system, measure in columns
        ]
        differences = paired_differences(pairs, resamples=resamples, seed=seed)
        for (system, measure), (a, b), difference in zip(columns, pairs, differences, strict=True):
            out = left_out[system.name, measure]
            means = float(a.mean()), float(b.mean())
            found[system.name, measure] = Outcome(
                system.name, measure, *means, difference, 1.0, len(out), out[:LISTED]
            )
    return [found[key] for key in left_out if key in found]


def _not_shared(a: System, b: System) -> list[str]:
    """Tell which measures some runs of two systems have and others have not."""
    runs = [*a.runs, *b.runs]
    having: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for measure in sorted({measure for run in runs for measure in run.scores}, key=_order):
        if without := tuple(str(run.path) for run in runs if measure not in run.scores):
            having[without].append(measure)
    return [
        f"{', '.join(measures)} of {b.name} against {a.name}: not compared, since "
        f"{', '.join(without)} has no such scores"
        for without, measures in having.items()
    ]


def _left_out_remarks(
    baseline: System, system: System, left_out: dict[tuple[str, str], Questions]
) -> list[str]:
    """Tell which questions were left out, once for all measures that leave out the same."""
    measures: dict[Questions, list[str]] = defaultdict(list)
    for (name, measure), questions in left_out.items():
        if name == system.name and questions:
            measures[questions].append(measure)
    return [
        f"{', '.join(names)}: {len(questions)} questions are left out of {system.name} against "
        f"{baseline.name}, since only some runs score them: {sample(questions)}"
        for questions, names in measures.items()
    ]
