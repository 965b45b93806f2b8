"""The five nouns and three verbs that every part of ragkit speaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

from .errors import DataError

Qrels: TypeAlias = dict[str, dict[str, int]]
"""Relevance judgements as in TREC: query id -> document id -> grade (0 is judged not relevant)."""

Run: TypeAlias = dict[str, dict[str, float]]
"""A ranked result as in TREC: query id -> document id -> score (higher is better)."""

Where: TypeAlias = Mapping[str, Any]
"""A metadata filter; its meaning is defined once, in `ragkit.stores.documents.matches`."""

Progress: TypeAlias = Callable[[str, int, int | None], None]
"""Told of long work as `(stage, done, total)`; `total` is None while it is not known."""


def quiet(stage: str, done: int, total: int | None) -> None:
    """Report nothing: the `Progress` of those who want none."""


@dataclass(frozen=True, slots=True)
class Document:
    """A unit of text that is stored, retrieved and cited.

    `metadata` holds JSON values only. A document that was split off a longer one carries
    `metadata["parent"]` (the longer one's id), `metadata["start"]` and `metadata["end"]`
    (offsets in characters of the parent's text).
    """

    id: str
    text: str
    title: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def contents(self) -> str:
        """Title and text as stores index them: the title on a line of its own, if there is one."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True, slots=True)
class Query:
    """A question with an id; `where` restricts its hits to documents with such metadata."""

    id: str
    text: str
    where: Where = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hit:
    """A document that was found. A higher score is better, always; its rank is its place."""

    document: Document
    score: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What a reader made of a query and its hits.

    `hits` are the hits that the prompt showed, in the order of their numbers there (the first is
    `[1]`), and `cut` is how many characters of the last one's text it showed, where it cut that.
    `citations` are positions in `hits`, counted from 0, in the order in which the text cites them.
    Where it cites nothing, `attributed` is true, and they name the hit that holds its words, if one
    does. `abstained` says that the reader declined to answer. The tokens of prompt and text are 0
    where the reader does not count them.
    """

    query: Query
    text: str
    hits: tuple[Hit, ...]
    prompt: str
    citations: tuple[int, ...] = ()
    attributed: bool = False
    abstained: bool = False
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cut: int | None = None

    @property
    def shown(self) -> tuple[Document, ...]:
        """The hits' documents with their texts as the prompt showed them."""
        documents = [hit.document for hit in self.hits]
        if self.cut is not None:
            documents[-1] = replace(documents[-1], text=documents[-1].text[: self.cut])
        return tuple(documents)

    @property
    def cited(self) -> tuple[Document, ...]:
        """The cited documents, in the order of their first citation."""
        return tuple(self.hits[position].document for position in self.citations)


@dataclass(frozen=True, slots=True)
class Example:
    """A question with what is known about it: the unit of training and of evaluation.

    `retrieved` are passages that came with the question, best first, as SPRING's files have them.

    Raises:
        DataError: `answers` is a string, which would be taken as one answer a character.
    """

    query: Query
    positives: tuple[Document, ...] = ()
    negatives: tuple[Document, ...] = ()
    answers: tuple[str, ...] = ()
    retrieved: tuple[Document, ...] = ()

    def __post_init__(self) -> None:
        answers: Any = self.answers
        if isinstance(answers, str):
            raise DataError(
                f"the answers of query {self.query.id!r} are the string {answers!r}; "
                f"a tuple is needed: ({answers!r},)"
            )


@runtime_checkable
class Retriever(Protocol):
    """Finds documents: at most `k` hits per query, best first, in the queries' order."""

    def retrieve(self, queries: Sequence[Query], k: int) -> list[list[Hit]]:
        """Return the best `k` hits of each query."""
        ...


@runtime_checkable
class Reranker(Protocol):
    """Re-orders hits and keeps the best `k` of each query."""

    def rerank(
        self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]], k: int
    ) -> list[list[Hit]]:
        """Return at most `k` of each query's hits with new scores, best first."""
        ...


@runtime_checkable
class Reader(Protocol):
    """Answers queries from their hits, in the queries' order."""

    def read(self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]]) -> list[Answer]:
        """Return one answer per query."""
        ...
