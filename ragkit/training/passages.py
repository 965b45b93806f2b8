"""An example's passages, by what they are to its question: gold, distractors, or neither."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from random import Random
from typing import Literal, TypeAlias, get_args

from ..evaluation.answers import cover_match, telling
from ..types import Document, Example, Hit
from .negative_rules import Rules
from .negatives import Relevant

ContextKind: TypeAlias = Literal["gold", "retrieved", "distractors", "none"]
"""`gold`: gold passages among distractors. `retrieved`: the first hits, in their order.
`distractors`: passages that do not help, and a target that abstains. `none`: no passage."""

KINDS: tuple[ContextKind, ...] = get_args(ContextKind)
_SIMILAR = Rules().similarity


class Passages:
    """What a question can be shown.

    Gold are the example's positives. Without any, they are the hits that are judged relevant: those
    that hold an answer, if some do. Without those, the first hit that holds an answer. Another
    piece of a relevant document is neither gold nor a distractor.

    Args:
        example: with answers; blank ones are none.
        hits: what was retrieved, best first.
        grades: document id -> grade, of this question.

    Attributes:
        answers: the answers.
        hits: what was retrieved.
        known: whether it is known what is relevant.
        tells: whether anything tells that a passage is not: what is known, or an answer whose place
            would.
        gold: the gold passages, texts once each.
    """

    def __init__(self, example: Example, hits: Sequence[Hit], grades: Mapping[str, int]) -> None:
        self.answers = [answer for answer in example.answers if answer.strip()]
        self._telling = telling(self.answers)
        self.hits = hits
        self._negatives = example.negatives
        gold = list(example.positives)
        self.known = bool(gold) or any(grade > 0 for grade in grades.values())
        self.tells = self.known or bool(self._telling)
        if not gold:
            judged = Relevant((), grades)
            found = [hit.document for hit in hits if hit.document in judged]
            gold = [document for document in found if self.holds(document)] or found
        if not gold:
            holding = (hit.document for hit in hits if self.holds(hit.document))
            gold = list(islice(holding, 1))
        self.gold = list({document.contents: document for document in gold}.values())
        self._ids = {document.id for document in gold}
        self._texts = {document.text for document in gold}
        self._relevant = Relevant(gold, grades)

    def is_gold(self, document: Document) -> bool:
        """Tell whether a document is a gold passage, by its id or its text."""
        return document.id in self._ids or document.text in self._texts

    def holds(self, document: Document) -> bool:
        """Tell whether a document holds an answer of those whose place tells something."""
        return bool(cover_match(document.contents, self._telling))

    def has(self, kind: ContextKind) -> bool:
        """Tell whether a context of a kind can be made."""
        if kind == "distractors":
            return next(self.distractors(Random(0)), None) is not None
        return kind == "none" or bool(self.gold if kind == "gold" else self.hits)

    def distractors(self, own: Random) -> Iterator[Document]:
        """Yield each distractor once, in random order, looking at no more than are taken.

        They are among the example's negatives; where none of those can be one, among the hits.
        None is relevant, nearly the same as a gold passage, or holds an answer. There is none where
        nothing tells what is relevant.
        """
        if not self.tells:
            return
        for source in (self._negatives, [hit.document for hit in self.hits]):
            seen: set[str] = set()
            for document in own.sample(source, len(source)):
                if document.contents not in seen and self._distracts(document):
                    seen.add(document.contents)
                    yield document
            if seen:
                return

    def _distracts(self, document: Document) -> bool:
        if document in self._relevant or self.holds(document):
            return False
        return self._relevant.similarity(document) < _SIMILAR
