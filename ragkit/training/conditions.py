"""Asking questions in several conditions at once, and scoring what each makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from ..evaluation.answers import ANSWER_MEASURES, answer_measures
from ..evaluation.statistics import bootstrap_means, paired_differences
from ..models.generator import Generator
from ..models.virtual_tokens import VirtualTokens
from ..prompts import Prompt, abstains, without_citations
from ..types import Example, Progress, quiet

_MEASURES = (*ANSWER_MEASURES, "abstained")


@dataclass(frozen=True, slots=True)
class Condition:
    """One way to answer: its prompts, and the virtual tokens in them, one list for each seed."""

    name: str
    prompts: Sequence[Prompt]
    tokens: Sequence[VirtualTokens | None] = (None,)


def measured(
    generator: Generator,
    examples: Sequence[Example],
    conditions: Sequence[Condition],
    *,
    max_new_tokens: int = 32,
    seed: int = 0,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Answer questions in all conditions at once, and score them; passages are read once.

    Returns:
        what `scored` does, and the texts under `answers`.
    """
    answers = answered(generator, conditions, max_new_tokens=max_new_tokens, progress=progress)
    return scored(examples, answers, seed=seed) | {"answers": answers}


def answered(
    generator: Generator,
    conditions: Sequence[Condition],
    *,
    max_new_tokens: int = 32,
    progress: Progress = quiet,
) -> dict[str, list[list[str]]]:
    """Answer all conditions' prompts in one call: condition -> texts [seeds, questions]."""
    prompts: list[Prompt] = []
    plugged: list[VirtualTokens | None] = []
    for condition in conditions:
        for tokens in condition.tokens:
            prompts += condition.prompts
            plugged += [tokens] * len(condition.prompts)
    progress("answer", 0, len(prompts))
    texts = iter(
        generator.generate(
            prompts,
            max_new_tokens=max_new_tokens,
            virtual_tokens=plugged,
            progress=lambda done: progress("answer", done, len(prompts)),
        )
    )
    return {
        condition.name: [list(islice(texts, len(condition.prompts))) for _ in condition.tokens]
        for condition in conditions
    }


def scored(
    examples: Sequence[Example], answers: Mapping[str, Sequence[Sequence[str]]], *, seed: int = 0
) -> dict[str, Any]:
    """Score the answers of conditions, texts [seeds, questions] each.

    Returns:
        under `conditions`: condition -> measure (the share of abstentions is one) -> estimate over
        questions and seeds; under
        `differences` the last condition minus each other one, paired by question.
    """
    scores = {
        name: [
            [_scores(text, example) for text, example in zip(texts, examples, strict=True)]
            for texts in of
        ]
        for name, of in answers.items()
    }

    def matrix(name: str, measure: str) -> list[list[float]]:
        return [[value[measure] for value in of] for of in scores[name]]

    *others, last = answers
    found: dict[str, Any] = {"conditions": {}, "differences": {}}
    for name in answers:
        estimates = bootstrap_means([matrix(name, m) for m in _MEASURES], seed=seed)
        found["conditions"][name] = dict(zip(_MEASURES, map(asdict, estimates), strict=True))
    for other in others if len(examples) > 1 else []:
        pairs = [(matrix(other, m), matrix(last, m)) for m in _MEASURES]
        differences = map(asdict, paired_differences(pairs, seed=seed))
        named = dict(zip(_MEASURES, differences, strict=True))
        found["differences"][f"{last} - {other}"] = named
    return found


def _scores(text: str, example: Example) -> dict[str, float]:
    said, abstained = without_citations(text), abstains(text)
    measures = answer_measures(said, example.answers, abstained=abstained)
    return {**measures, "abstained": float(abstained)}
