"""How well an encoder searches: dev questions over an index's documents, while training and after.

What is searched are the index's documents, all of them if they are not too many; else those that
matter (relevant ones, and those that the encoder found before it was trained) among others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..evaluation.answers import cover_match
from ..evaluation.metrics import judged_run, retrieval_measures, strictly_decreasing
from ..models.bi_encoder import BiEncoder
from ..stores.dense import DenseStore
from ..stores.index import Index
from ..types import Example, Progress, Qrels, Run, quiet

_DEPTH = 100
ANSWER = "answer MRR@10"

Values = dict[str, list[float]]
"""Measure -> one value a question."""


@dataclass
class DevSearch:
    """Questions, and the documents that they are searched in.

    Attributes:
        index: holds the documents, and their vectors by the base encoder.
        examples: the questions; filters of theirs are not used.
        qrels: their judgements; without any, documents that hold an answer are relevant.
        limit: the most documents that are searched.
        seed: of those drawn at random.
    """

    index: Index
    examples: Sequence[Example]
    qrels: Qrels
    limit: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        """Choose the documents.

        Raises:
            DataError: the questions have neither judgements nor answers.
        """
        asked = {example.query.id for example in self.examples}
        self.qrels = {query: self.qrels[query] for query in self.qrels if query in asked}
        if self.qrels:
            self.examples = [e for e in self.examples if e.query.id in self.qrels]
        else:
            self.examples = [e for e in self.examples if e.answers]
        if not self.examples:
            raise DataError("the questions to evaluate on have neither qrels nor answers")
        self.rows = np.arange(len(self.index))

    @property
    def measure(self) -> str:
        """What is to become large."""
        return "nDCG@10" if self.qrels else ANSWER

    def narrow(self, encoder: BiEncoder) -> None:
        """Leave no more documents than `limit`: the relevant, those found by the base, others."""
        total = len(self.index)
        if total <= self.limit:
            return
        vectors = encoder.encode_queries([example.query.text for example in self.examples])
        found, _ = self.index.dense.search(vectors, _DEPTH)
        kept = {int(row) for rows in found for row in rows}
        for grades in self.qrels.values():
            for document in grades:
                pieces = self.index.pieces(document)
                kept |= {self.index.documents.rows[piece.id] for piece in pieces}
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
            stored: take the documents' vectors that the index holds instead.
            progress: told of the documents that are encoded.
        """
        if stored:
            documents = self.index.dense.vectors(self.rows)
        else:
            texts = [self.index.documents[int(row)].contents for row in self.rows]
            documents = encoder.encode_documents(
                texts, progress=lambda done: progress("encode", done, len(texts))
            )
        queries = encoder.encode_queries([example.query.text for example in self.examples])
        return self.scored(queries, documents)

    def scored(self, queries: NDArray[np.float32], documents: NDArray[np.float32]) -> Values:
        """Score the search of vectors: [questions, size] in [documents, size]."""
        rows, scores = DenseStore([documents]).search(queries, min(_DEPTH, len(documents)))
        run: Run = {}
        for example, places, found in zip(self.examples, rows, scores, strict=True):
            names = [self.index.documents[int(self.rows[place])].id for place in places]
            run[example.query.id] = dict(zip(names, found.tolist(), strict=True))
        if not self.qrels:
            return {ANSWER: [self._answer_rank(e, run[e.query.id]) for e in self.examples]}
        ranked = strictly_decreasing(judged_run(run, self.qrels, self._pieces(run)))
        measures = retrieval_measures(ranked, self.qrels, (1, 10, 100))
        order = [example.query.id for example in self.examples]
        return {name: [of[query] for query in order] for name, of in measures.items()}

    def _answer_rank(self, example: Example, found: Mapping[str, float]) -> float:
        documents, rows = self.index.documents, self.index.documents.rows
        for rank, name in enumerate(list(found)[:10], 1):
            if cover_match(documents[rows[name]].text, example.answers):
                return 1 / rank
        return 0.0

    def _pieces(self, run: Run) -> dict[str, str]:
        """Return the parents of what was found and is a piece."""
        rows = self.index.documents.rows
        names = {name for found in run.values() for name in found}
        parents = {}
        for name in names:
            parent = self.index.documents[rows[name]].metadata.get("parent")
            if isinstance(parent, str):
                parents[name] = parent
        return parents
