"""How well an encoder searches: dev questions over an index's documents, while training and after.

Where documents keep the vectors that the index holds, all of it is searched. Else all documents if
they are not too many; or those that matter (relevant, or found before) among others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from ..artefacts import to_json
from ..errors import DataError
from ..evaluation.answers import cover_match, telling
from ..evaluation.metrics import judged_run, retrieval_measures, strictly_decreasing
from ..models.bi_encoder import BiEncoder
from ..splitting import parent_of
from ..stores.dense import DenseStore
from ..stores.embeddings import same_documents
from ..stores.index import Index
from ..types import Document, Example, Progress, Qrels, Run, quiet

_DEPTH = 100
ANSWER = "answer MRR@10"

Values = dict[str, list[float]]
"""Measure -> one value a question."""


@dataclass
class DevSearch:
    """Questions, and the documents that they are searched in.

    Attributes:
        index: holds the documents, and their vectors by its encoder.
        examples: the questions.
        qrels: their judgements; without any, documents that hold an answer are relevant.
        limit: the most documents that are encoded for the search.
        seed: of those drawn at random.
    """

    index: Index
    examples: Sequence[Example]
    qrels: Qrels
    limit: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        """Keep the questions of which something is known.

        Raises:
            DataError: the questions have neither judgements nor answers.
        """
        asked = {example.query.id for example in self.examples}
        self.qrels = {query: self.qrels[query] for query in self.qrels if query in asked}
        if self.qrels:
            self.examples = [e for e in self.examples if e.query.id in self.qrels]
        else:
            self.examples = [e for e in self.examples if telling(e.answers)]
        if not self.examples:
            raise DataError(
                "the questions to evaluate on have neither qrels nor answers, other than yes and "
                "no, that could be looked for"
            )
        self.rows: NDArray[np.int64] = np.arange(len(self.index))

    @property
    def measure(self) -> str:
        """What is to become large."""
        return "nDCG@10" if self.qrels else ANSWER

    def narrow(self, encoder: BiEncoder) -> None:
        """Leave no more than `limit` documents: what is relevant, half of what was found, others.

        What was found is by the encoder where the index holds its vectors, else by BM25.
        """
        total = len(self.index)
        if total <= self.limit:
            return
        kept = {
            self.index.documents.rows[piece.id]
            for grades in self.qrels.values()
            for document in grades
            for piece in self.index.pieces(document)
        }
        texts = [example.query.text for example in self.examples]
        depth = min(_DEPTH, max(1, self.limit // 2 // len(texts)))
        found: Sequence[NDArray[np.int64]] = []
        built = self.index.manifest.get("encoder")
        if built is not None and same_documents(built, encoder.describe()):
            found, _ = self.index.dense.search(encoder.encode_queries(texts), depth)
        elif "bm25" in self.index.stores:
            found, _ = self.index.bm25.search(texts, depth)
        kept |= {int(row) for rows in found for row in rows}
        others = [row for row in range(total) if row not in kept]
        more = max(0, self.limit - len(kept))
        kept |= set(Random(self.seed).sample(others, min(more, len(others))))
        self.rows = np.array(sorted(kept))

    def values(
        self, encoder: BiEncoder, *, stored: bool = False, progress: Progress = quiet
    ) -> Values:
        """Search with an encoder, and score what it finds, question by question.

        Args:
            encoder: encodes the questions, and the documents.
            stored: take the documents' vectors that the index holds instead, of all documents.
            progress: told of the documents that are encoded.
        """
        queries = encoder.encode_queries([example.query.text for example in self.examples])
        if stored:
            return self.scored(queries)
        texts = [self.index.documents[int(row)].contents for row in self.rows]
        documents = encoder.encode_documents(
            texts, progress=lambda done: progress("encode", done, len(texts))
        )
        return self.scored(queries, documents)

    def scored(
        self, queries: NDArray[np.float32], documents: NDArray[np.float32] | None = None
    ) -> Values:
        """Score the search of query vectors, [questions, size].

        Args:
            queries: of the questions.
            documents: vectors of `rows`, [rows, size]; if None, those of the index, all of them.
        """
        store = self.index.dense if documents is None else DenseStore([documents])
        rows = np.arange(len(self.index)) if documents is None else self.rows
        run: Run = {}
        for places, mask in self._groups():
            allowed = None if mask is None else mask[rows]
            k = min(_DEPTH, len(rows))
            found, scores = store.search(queries[places], k, allowed, exact=True)
            for place, best, values in zip(places, found, scores, strict=True):
                names = [self.index.documents[int(rows[row])].id for row in best]
                name = self.examples[place].query.id
                run[name] = dict(zip(names, values.tolist(), strict=True))
        if not self.qrels:
            return {ANSWER: [self._answer_rank(e, run[e.query.id]) for e in self.examples]}
        run = {example.query.id: run[example.query.id] for example in self.examples}
        return measured(run, self._pieces(run), self.qrels, (1, 10, 100))

    def _groups(self) -> list[tuple[list[int], NDArray[np.bool_] | None]]:
        """Return the questions of each filter, and the rows that pass it."""
        groups: dict[str, list[int]] = {}
        for place, example in enumerate(self.examples):
            groups.setdefault(to_json(dict(example.query.where)), []).append(place)
        return [
            (places, self.index.mask(self.examples[places[0]].query.where))
            for places in groups.values()
        ]

    def _answer_rank(self, example: Example, found: Mapping[str, float]) -> float:
        documents, rows = self.index.documents, self.index.documents.rows
        answers = telling(example.answers)
        for rank, name in enumerate(list(found)[:10], 1):
            if cover_match(documents[rows[name]].contents, answers):
                return 1 / rank
        return 0.0

    def _pieces(self, run: Run) -> dict[str, str]:
        """Return the parents of what was found and is a piece."""
        rows = self.index.documents.rows
        names = {name for found in run.values() for name in found}
        return parents_of(self.index.documents[rows[name]] for name in names)


def parents_of(documents: Iterable[Document]) -> dict[str, str]:
    """Return the parent of each document that is a piece of one."""
    found = ((document.id, parent_of(document)) for document in documents)
    return {name: parent for name, parent in found if parent is not None}


def measured(run: Run, parents: Mapping[str, str], qrels: Qrels, ks: Sequence[int]) -> Values:
    """Score a run in the order of its questions, which the qrels judge all."""
    ranked = strictly_decreasing(judged_run(run, qrels, parents))
    measures = retrieval_measures(ranked, qrels, ks)
    return {name: [of[query] for query in run] for name, of in measures.items()}
