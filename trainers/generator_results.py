"""What a run of a generator reports: what it gained on dev, what it forgot, and a model card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ragkit.types import Progress

from .runs import json_values, loop_settings

if TYPE_CHECKING:
    from ragkit.evaluation.probes import ProbeScores
    from ragkit.models.generator import Generator
    from ragkit.training.generator_runs import GeneratorRun
    from ragkit.training.keeper import History, LoopSettings

    from .generator_settings import Checked, GeneratorSettings

_CHOSEN_BY = "F1"
_RATES = {False: 2e-3, True: 5e-5}  # of an adapter, and of all weights
_LOST = {"choices": "accuracy", "answers": "answer nats per token", "texts": "bits per byte"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run.

    Attributes:
        results: the report.
        folders: the model of each seed, at the share of learnt weights that was taken.
        forgetting: the most that a probe has lost in a seed; 0 without probes.
        worst: that probe.
    """

    results: dict[str, Any]
    folders: Sequence[Path]
    forgetting: float
    worst: str


@dataclass(frozen=True, slots=True)
class _Tried:
    """One share of the learnt weights: its models, their answers [seeds, questions], its probes."""

    folders: list[Path]
    answers: list[list[str]]
    probes: list[list[ProbeScores]]


def outcome_of(
    run: GeneratorRun,
    settings: GeneratorSettings,
    checked: Checked,
    learnt: Sequence[tuple[Path, History]],
    said: tuple[list[str], list[ProbeScores]],
    state: Path,
    progress: Progress,
) -> Outcome:
    """Ask what was learnt what the base was asked (`said`), and choose among averages."""
    from ragkit.training.conditions import scored

    examples, (before, probes) = run.dev.examples, said
    tried: dict[float, _Tried] = {}
    told: dict[float, dict[str, Any]] = {}
    for share in checked.shares:
        folders = [_folder(run, folder, share, state) for folder, _ in learnt]
        found = [
            said_by(loaded(str(folder), run, settings), run, settings, checked, progress)
            for folder in folders
        ]
        tried[share] = _Tried(folders, [texts for texts, _ in found], [of for _, of in found])
        scores = scored(examples, {"before": [before], "after": tried[share].answers})
        told[share] = scores | forgotten(probes, tried[share].probes)
    taken = _taken(told, settings.max_forgetting)
    best = tried[taken]
    gains = [_f1(examples, texts) for texts in best.answers]
    place = gains.index(max(gains))
    results = told[taken] | {
        "average": {
            "taken": taken,
            "tried": {str(share): _told_of(of) for share, of in told.items()},
        },
        "seeds": {
            str(seed): asdict(history)
            for seed, (_, history) in zip(checked.seeds, learnt, strict=True)
        },
        "best_seed": str(checked.seeds[place]),
        "settings": json_values(settings),
        "rank": run.rank,
        "mix": _drawn(run, settings, checked.seeds),
        "citations": {
            title: cited(run, checked, texts)
            for title, texts in (("before", [before]), ("after", best.answers))
        }
        if settings.citations
        else {},
        "examples": [
            {
                "question": example.query.text,
                "gold": list(example.answers),
                "before": before[number],
                "after": best.answers[place][number],
            }
            for number, example in enumerate(examples[:10])
        ],
    }
    return Outcome(results, best.folders, told[taken]["forgetting"], told[taken]["worst"])


def cited(run: GeneratorRun, checked: Checked, answers: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Estimate precision and recall of the citations in answers, texts [seeds, questions].

    As `evaluation.answers.citation_measures` has them, of the dev questions whose gold passages are
    known. What has nothing to count is left out.
    """
    from ragkit.evaluation.answers import citation_measures
    from ragkit.evaluation.statistics import bootstrap_ratio
    from ragkit.prompts import citations
    from ragkit.training.passages import Passages

    sums: dict[str, list[tuple[int, int]]] = {}
    for place, (example, hits) in enumerate(zip(run.dev.examples, run.dev.hits, strict=True)):
        known = Passages(example, hits, run.dev.judged.get(example.query.id, {}))
        if not known.known:
            continue
        given = hits[: checked.passages[1]]
        seen = [given[number].document for number in run.prompt(example.query, given).shown]
        gold = {each.id for each in (*known.gold, *filter(known.is_gold, seen))}
        of_seeds = [
            citation_measures(
                [seen[number].id for number in citations(texts[place], len(seen))],
                gold,
                [document.id for document in seen],
            )
            for texts in answers
        ]
        for name in of_seeds[0]:
            right, counted = zip(*(of[name] for of in of_seeds), strict=True)
            sums.setdefault(name, []).append((sum(right), sum(counted)))
    return {
        name: asdict(bootstrap_ratio(*zip(*of, strict=True)))
        for name, of in sums.items()
        if any(counted for _, counted in of)
    }


def _told_of(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a share of the learnt weights gains on dev, and what it forgets."""
    (changed,) = scores["differences"].values()
    after = scores["conditions"]["after"][_CHOSEN_BY]
    return {
        _CHOSEN_BY: after,
        "gain": changed[_CHOSEN_BY],
        "forgetting": scores["forgetting"],
        "worst": scores["worst"],
    }


def _drawn(run: GeneratorRun, settings: GeneratorSettings, seeds: Sequence[int]) -> dict[str, Any]:
    """Count the contexts of an epoch of each seed."""
    from ragkit.training.mixes import tally

    questions = len(run.train.examples)
    drawn = [run.draws(loop_of(run, settings, seed)) for seed in seeds]
    return tally(of[place] for of in drawn for place in range(min(len(of), questions)))


def said_by(
    model: Generator,
    run: GeneratorRun,
    settings: GeneratorSettings,
    checked: Checked,
    progress: Progress,
) -> tuple[list[str], list[ProbeScores]]:
    """Return a generator's answers to the dev questions, and its scores on the probes."""
    from ragkit.evaluation.probes import run_probe
    from ragkit.models.names import cache_folder
    from ragkit.training.conditions import Condition, answered

    prompts = [
        run.prompt(example.query, hits[: checked.passages[1]])
        for example, hits in zip(run.dev.examples, run.dev.hits, strict=True)
    ]
    conditions = [Condition("dev", prompts)]
    longest = settings.max_new_tokens
    texts = answered(model, conditions, max_new_tokens=longest, progress=progress)["dev"][0]
    cache, limit = cache_folder() / "probes", settings.probe_limit
    return texts, [
        run_probe(model, probe, limit=limit, progress=progress, cache=cache)
        for probe in checked.probes
    ]


def loaded(name: str, run: GeneratorRun, settings: GeneratorSettings) -> Generator:
    """Load a generator as it is to answer, in the precision that was asked for."""
    from ragkit.models.generator import Generator

    return Generator.load(
        name,
        device=str(run.generator.model.device),
        precision=settings.precision,
        layout=None if settings.layout == "auto" else settings.layout,
    )


def _folder(run: GeneratorRun, learnt: Path, share: float, state: Path) -> Path:
    """Return the folder of what was learnt, or of its average with the base."""
    if share == 1:
        return learnt
    folder = state / f"{learnt.parent.name}-{share:g}"
    shutil.rmtree(folder, ignore_errors=True)
    run.averaged(learnt, share, folder)
    return folder


def forgotten(
    before: Sequence[ProbeScores], after: Sequence[Sequence[ProbeScores]]
) -> dict[str, Any]:
    """Return what the probes changed by, and what the one that lost most has lost.

    A loss is the fall of the accuracy of choices, in shares of 1; or the rise of the nats a token
    of answers, or of the bits a byte of texts, as a share of what they were. Of the seeds, the one
    that lost most counts.

    Args:
        before: the base's scores.
        after: those of each seed.
    """
    from ragkit.evaluation.probes import compare_probes

    changes: dict[str, Any] = {}
    for place, base in enumerate(before):
        measure = _LOST[base.kind]
        of_seeds = [compare_probes(base, scores[place]) for scores in after]
        value = base.estimates[measure].mean
        rises = [of[measure].mean for of in of_seeds]
        losses = [-rise if base.kind == "choices" else rise / max(value, 1e-9) for rise in rises]
        changes[base.probe] = {
            "measure": measure,
            "before": asdict(base.estimates[measure]),
            "changes": [asdict(of[measure]) for of in of_seeds],
            "lost": max(losses),
        }
    worst = max(changes, key=lambda name: changes[name]["lost"], default="")
    lost = max(0.0, changes[worst]["lost"]) if worst else 0.0
    return {"probes": changes, "forgetting": lost, "worst": worst}


def _taken(told: Mapping[float, Mapping[str, Any]], most: float | None) -> float:
    """Return the share that is best on dev, of those that forget no more than they may."""
    allowed = [share for share, of in told.items() if most is None or of["forgetting"] <= most]
    if not allowed:
        return min(told, key=lambda share: told[share]["forgetting"])
    return max(allowed, key=lambda share: told[share]["conditions"]["after"][_CHOSEN_BY]["mean"])


def _f1(examples: Sequence[Any], texts: Sequence[str]) -> float:
    from ragkit.evaluation.answers import answer_measures
    from ragkit.prompts import abstains, without_citations

    return fmean(
        answer_measures(without_citations(text), example.answers, abstained=abstains(text))[
            _CHOSEN_BY
        ]
        for text, example in zip(texts, examples, strict=True)
    )


def loop_of(run: GeneratorRun, settings: GeneratorSettings, seed: int) -> LoopSettings:
    """Return how a seed is trained: an epoch sees each question once, whatever else steps hold."""
    from ragkit.models.precision import has_bf16

    half = settings.precision == "bf16" or (
        settings.precision == "auto" and has_bf16(run.generator.model.device.type)
    )
    beside = run.remedies.replay + run.remedies.keep
    questions = len(run.train.examples) * settings.batch / (settings.batch - beside)
    return loop_settings(
        settings,
        round(questions),
        seed,
        _RATES[settings.full],
        micro_batch=settings.micro_batch,
        precision="bf16" if half else "fp32",
    )


def copied(source: Path, folder: Path) -> None:
    """Copy a model's files into a folder that exists."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
