"""Hard negatives: documents that a retriever finds for a question and that do not answer it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from random import Random
from typing import Any, TypeAlias

from ..errors import DataError, SettingsError
from ..evaluation.answers import cover_match, telling
from ..evaluation.duplicates import normalize_text, shingles
from ..splitting import parent_of
from ..types import Document, Example, Hit, Qrels
from .negative_rules import Rules

Score: TypeAlias = Callable[[Sequence[tuple[str, str]]], Sequence[float]]
"""A cross-encoder: scores of (query, title and text)."""

Weigh: TypeAlias = Callable[
    [Sequence[tuple[Example, Sequence[Document]]]], Sequence[Sequence[float]]
]
"""A generator: how much each document of a question helps its answer, in nats a token."""


def mine(
    examples: Sequence[Example],
    hits: Sequence[Sequence[Hit]],
    rules: Rules,
    *,
    retriever: str,
    judged: Qrels | None = None,
    score: Score | None = None,
    weigh: Weigh | None = None,
) -> tuple[list[Example], Counter[str]]:
    """Choose each question's negatives among its hits.

    What is known of a document lies in its `metadata["mined"]`: `retriever`, `rank` (from 1) and
    `score` there; for a negative the `margin` to the best relevant document found, and its
    `similarity` to the nearest positive; by a cross-encoder `cross_encoder`, and a negative's
    `cross_encoder_margin` to the best positive; by a generator its `utility`. Negatives that came
    with an example are replaced.

    A cross-encoder is asked about as many candidates as are still needed, a generator about those
    that it leaves, then both about the next ones in place of those that they refused.

    Args:
        examples: questions with their positives.
        hits: what was found for each, best first.
        rules: which hits are taken.
        retriever: what found them; kept with them.
        judged: documents that qrels judge relevant are no negatives of that question.
        score: a cross-encoder; needed for `max_score` and `score_margin`.
        weigh: a generator; needed for `max_utility`.

    Returns:
        The examples in their order, with as many negatives as were found; and how many hits were
        looked at (`seen`), kept (`kept`), and taken away by each of `FILTERS`.

    Raises:
        DataError: an example without positives.
        SettingsError: the rules need a cross-encoder or a generator.
    """
    if score is None and rules.scored:
        raise SettingsError("max_score and score_margin need a cross-encoder")
    if weigh is None and rules.max_utility is not None:
        raise SettingsError("max_utility needs a generator")
    counts: Counter[str] = Counter()
    searches = [
        _Search(example, found, rules, retriever, (judged or {}).get(example.query.id, {}), counts)
        for example, found in zip(examples, hits, strict=True)
    ]
    left = searches
    while left:
        asked = [(search, search.more()) for search in left]
        asked = [(search, candidates) for search, candidates in asked if candidates]
        if score is not None:
            _score(asked, score)
        asked = [(search, search.unrefused(candidates)) for search, candidates in asked]
        if weigh is not None:
            _weigh(asked, weigh)
        for search, candidates in asked:
            search.keep(candidates)
        left = [search for search, _ in asked if search.lacks]
    return [search.example() for search in searches], counts


class Relevant:
    """The documents that are relevant to a question, and so are none of its negatives.

    Args:
        positives: those of the question.
        grades: document id -> grade; what is graded above 0 is relevant too.
    """

    def __init__(self, positives: Sequence[Document], grades: Mapping[str, int]) -> None:
        self._ids = {document for document, grade in grades.items() if grade > 0}
        for positive in positives:
            self._ids |= {positive.id, parent_of(positive) or positive.id}
        self._texts = {each.text for each in positives}

    def __contains__(self, document: Document) -> bool:
        """Tell whether a document, its parent or its text is relevant."""
        known = document.id in self._ids or parent_of(document) in self._ids
        return known or document.text in self._texts

    @cached_property
    def _shingles(self) -> list[frozenset[str]]:
        return [shingles(normalize_text(text)) for text in self._texts]

    def similarity(self, document: Document) -> float:
        """Return the Jaccard similarity of a document's shingles to the nearest positive's."""
        own = shingles(normalize_text(document.text))
        return max(
            (len(own & other) / max(1, len(own | other)) for other in self._shingles), default=0.0
        )


@dataclass(slots=True)
class _Candidate:
    document: Document
    mined: dict[str, Any]


class _Search:
    """The search for one question's negatives."""

    def __init__(
        self,
        example: Example,
        hits: Sequence[Hit],
        rules: Rules,
        retriever: str,
        grades: dict[str, int],
        counts: Counter[str],
    ) -> None:
        if not example.positives:
            raise DataError(f"question {example.query.id!r} has no positives")
        self.query = example.query.text
        self.positives = [_Candidate(each, {"retriever": retriever}) for each in example.positives]
        self.asked, self._rules, self._counts = example, rules, counts
        self._relevant = Relevant(example.positives, grades)
        self._telling = [] if rules.allow_answers else telling(example.answers)
        self._kept: list[_Candidate] = []
        best = next((hit.score for hit in hits if hit.document in self._relevant), None)
        self._best = best
        places = {hit.document.id: (rank, hit.score) for rank, hit in enumerate(hits, 1)}
        for each in self.positives:
            if each.document.id in places:
                each.mined["rank"], each.mined["score"] = places[each.document.id]
        self._candidates = self._pass(hits, retriever)

    @property
    def lacks(self) -> int:
        """How many negatives are still to be found."""
        return self._rules.negatives - len(self._kept)

    def more(self) -> list[_Candidate]:
        """Return the next candidates, as many as are still to be found."""
        return list(islice(self._candidates, self.lacks))

    def unrefused(self, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        """Return the candidates that the cross-encoder does not refuse, if it was asked."""
        left = []
        least, most = self._rules.score_margin, self._rules.max_score
        best = max(each.mined.get("cross_encoder", -math.inf) for each in self.positives)
        for each in candidates:
            score = each.mined.get("cross_encoder")
            if score is not None:
                margin = each.mined["cross_encoder_margin"] = best - score
                if (most is not None and score > most) or (least is not None and margin < least):
                    self._counts["cross_encoder"] += 1
                    continue
            left.append(each)
        return left

    def keep(self, candidates: Sequence[_Candidate]) -> None:
        """Keep the candidates that do not help the generator too much, if it was asked."""
        most = self._rules.max_utility
        for each in candidates:
            helps = most is not None and each.mined["utility"] > most
            self._counts["utility" if helps else "kept"] += 1
            if not helps:
                self._kept.append(each)

    def example(self) -> Example:
        """Return the example with what was found."""

        def told(each: _Candidate) -> Document:
            return replace(
                each.document, metadata={**each.document.metadata, "mined": dict(each.mined)}
            )

        return replace(
            self.asked,
            positives=tuple(map(told, self.positives)),
            negatives=tuple(map(told, self._kept)),
        )

    def _pass(self, hits: Sequence[Hit], retriever: str) -> Iterator[_Candidate]:
        ranked = list(enumerate(hits, 1))
        if self._rules.seed is not None:
            Random(f"{self._rules.seed} {self.asked.query.id}").shuffle(ranked)
        for rank, hit in ranked:
            self._counts["seen"] += 1
            alike = 0.0
            reason = self._reason(rank, hit)
            if reason is None:
                alike = self._relevant.similarity(hit.document)
                reason = self._reason_in_text(hit.document, alike)
            if reason is not None:
                self._counts[reason] += 1
                continue
            mined: dict[str, Any] = {"retriever": retriever, "rank": rank, "score": hit.score}
            if self._best is not None:
                mined["margin"] = self._best - hit.score
            yield _Candidate(hit.document, mined | {"similarity": round(alike, 4)})

    def _reason(self, rank: int, hit: Hit) -> str | None:
        rules, best = self._rules, self._best
        if rank < rules.from_rank:
            return "rank"
        if hit.document in self._relevant:
            return "relevant"
        if hit.document.id in rules.held_out or parent_of(hit.document) in rules.held_out:
            return "held_out"
        if rules.margin is None and rules.relative_margin is None:
            return None
        if best is None:
            return "unfound"
        margin = max(rules.margin or 0.0, (rules.relative_margin or 0.0) * abs(best))
        return "margin" if hit.score > best - margin else None

    def _reason_in_text(self, document: Document, alike: float) -> str | None:
        if alike >= self._rules.similarity:
            return "duplicate"
        return "answer" if cover_match(document.contents, self._telling) else None


def _score(asked: Sequence[tuple[_Search, Sequence[_Candidate]]], score: Score) -> None:
    """Have the cross-encoder score candidates, and positives that it has not scored yet."""
    new = [
        (search.query, each)
        for search, candidates in asked
        for each in (*search.positives, *candidates)
        if "cross_encoder" not in each.mined
    ]
    scores = score([(query, each.document.contents) for query, each in new])
    for (_, each), value in zip(new, scores, strict=True):
        each.mined["cross_encoder"] = float(value)


def _weigh(asked: Sequence[tuple[_Search, Sequence[_Candidate]]], weigh: Weigh) -> None:
    """Have the generator tell how much candidates help it."""
    some = [(search, candidates) for search, candidates in asked if candidates]
    values = weigh([(search.asked, [each.document for each in of]) for search, of in some])
    for (_, candidates), helped in zip(some, values, strict=True):
        for each, value in zip(candidates, helped, strict=True):
            each.mined["utility"] = float(value)
