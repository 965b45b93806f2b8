"""What a question needs to be answered, and which documents give it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, TypeAlias

from ..artefacts import to_json
from ..errors import SettingsError
from ..splitting import parent_of
from ..types import Document, Example, Hit, Query, Where
from .answers import cover_match
from .containment import seek
from .duplicates import answer_key
from .gold import Gold

Need: TypeAlias = Literal["any", "all"]
"""Whether one relevant document is enough for a question, or all are needed (multi-hop)."""

ANSWER = "an answer"
"""The one thing that a question needs which has answers and no judgements."""


class Corpus(Protocol):
    """What an evaluation asks of an index; `ragkit.Index` is one."""

    def passing(self, where: Where) -> Iterable[Document]:
        """Yield the documents that pass a metadata filter; all of them if it is empty."""
        ...

    def documents_fingerprint(self) -> str:
        """Return one hash of all documents."""
        ...

    def pieces(self, document: str, where: Where | None = None) -> list[Document]:
        """Return the document of this id, or the pieces that were split off it, or nothing.

        Those that do not pass the filter are left out.
        """
        ...


class Evidence:
    """Tells which documents give what a question needs.

    A question that the qrels judge needs its relevant documents; another needs a document whose
    text contains one of its answers. A piece counts as its parent where the qrels name that.
    """

    def __init__(self, gold: Gold, need: Need = "any") -> None:
        if need not in ("any", "all"):
            raise SettingsError(f"unknown need {need!r}; known are any, all")
        self._named = {document for grades in gold.qrels.values() for document in grades}
        self._relevant = {
            query: {document for document, grade in grades.items() if grade > 0}
            for query, grades in gold.qrels.items()
        }
        self._answers = gold.answers
        self._need = need

    def needs(self, query: str) -> set[str]:
        """Return the ids of the documents that a question needs, `{ANSWER}`, or nothing."""
        if relevant := self._relevant.get(query):
            return relevant
        return {ANSWER} if self._answers.get(query) else set()

    def given(self, query: str, hits: Iterable[Hit]) -> set[str]:
        """Return which of a question's needs hits give."""
        needs = self.needs(query)
        if needs == {ANSWER}:
            golds = self._answers[query]
            return needs if any(cover_match(hit.document.text, golds) for hit in hits) else set()
        return needs & {self.judged(hit.document) for hit in hits}

    def enough(self, query: str, given: set[str]) -> bool:
        """Tell whether what is given suffices."""
        return bool(given) if self._need == "any" else self.needs(query) <= given

    def least(self, query: str) -> int:
        """Return how many hits can suffice: a hit gives one need at most."""
        return 1 if self._need == "any" else len(self.needs(query))

    def relevant(self, query: str) -> set[str]:
        """Return the ids of a question's relevant documents; none where no qrels judge it."""
        return self._relevant.get(query, set())

    def suffices(self, query: str, hits: Iterable[Hit]) -> bool:
        """Tell whether hits give what a question needs."""
        return self.enough(query, self.given(query, hits))

    def misleads(self, query: str, hit: Hit) -> bool:
        """Tell whether a hit is neither relevant nor holds an answer: a distractor."""
        if self.judged(hit.document) in self._relevant.get(query, ()):
            return False
        return not cover_match(hit.document.contents, self._answers.get(query, ()))

    def judged(self, document: Document) -> str:
        """Return the id by which the qrels know a document: its own, or its parent's."""
        if document.id in self._named:
            return document.id
        parent = parent_of(document)
        return parent if parent in self._named and parent is not None else document.id


def gold_passages(example: Example, gold: Gold, corpus: Corpus | None, limit: int) -> list[Hit]:
    """Return a question's gold passages as hits, the highest grade first, at most `limit`.

    They are the relevant documents of the qrels, else the example's positives. Of a document that
    was split, the pieces that hold an answer are taken, one of each document before the others;
    if none does, its first.
    """
    grades = gold.qrels.get(example.query.id, {})
    relevant = sorted((name for name in grades if grades[name] > 0), key=lambda n: -grades[n])
    first: list[Document] = []
    more: list[Document] = []
    for name in relevant if corpus else ():
        pieces = corpus.pieces(name) if corpus else []
        holding = [piece for piece in pieces if cover_match(piece.text, example.answers)]
        first += (holding or pieces)[:1]
        more += holding[1:]
    return [Hit(document, 0.0) for document in ([*first, *more] or example.positives)[:limit]]


def in_corpus(
    evidence: Evidence, gold: Gold, queries: Sequence[Query], corpus: Corpus | None
) -> dict[str, bool]:
    """Tell by the id of each question whether the corpus holds what it needs.

    What a question's filter does not let through is not there for it. Answers are sought as
    `cover_match` does, in all documents of a filter, once. An unknown corpus holds everything.
    """
    if corpus is None:
        return {query.id: True for query in queries}
    held: dict[str, bool] = {}
    sought: dict[str, list[Query]] = {}
    for query in queries:
        needs = evidence.needs(query.id)
        if needs == {ANSWER}:
            sought.setdefault(to_json(dict(query.where)), []).append(query)
        else:
            there = {name for name in needs if corpus.pieces(name, query.where)}
            held[query.id] = evidence.enough(query.id, there)
    for group in sought.values():
        keys = {query.id: set(map(answer_key, gold.answers[query.id])) for query in group}
        documents = corpus.passing(group[0].where)
        missing = seek((), set().union(*keys.values()), documents).missing
        held |= {query: not answers <= missing for query, answers in keys.items()}
    return held
