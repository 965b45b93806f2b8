"""Rerankers: a cross-encoder, a generator as judge, and diversity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import IndexStateError, SettingsError
from .fusion import interpolated, scaled
from .prompts import TEMPLATE_TOKENS, Prompt, build_prompt
from .splitting import sentences
from .styles import PromptStyle
from .types import Hit, Query, Reranker

if TYPE_CHECKING:
    from .stores.index import Index


class PairScorer(Protocol):
    """What a reranker needs of a cross-encoder; `ragkit.models.CrossEncoder` is one."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Return each (query, text) pair's score, shape [pairs]."""
        ...


class Judge(Protocol):
    """What a reranker needs of a generator; `ragkit.models.Generator` is one."""

    @property
    def window(self) -> int:
        """The tokens that prompt and answer may take together."""
        ...

    def count(self, text: str) -> int:
        """Return how many tokens a text takes."""
        ...

    def first_token_logprobs(
        self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]
    ) -> NDArray[np.float32]:
        """Return the log-probability of each option's first token, [prompts, options]."""
        ...


_JUDGEMENT = PromptStyle(
    name="judgement",
    system="",
    user="Passage: {context}\n\nQuestion: {question}\n\n"
    "Does the passage answer the question? Answer Yes or No.",
    passage="{text}",
    titled="{title}\n{text}",
    alone="",
    user_alone="Question: {question}\n\nDoes an empty passage answer it? Answer Yes or No.",
)


class CrossEncoderReranker:
    """Reranks by a cross-encoder's score of (query, title and text).

    Args:
        model: scores the pairs.
        weight: of the model's scores in the sum with those of the retrieval, which have the rest;
            below 1, both are first scaled to 0…1 over the list (interpolation: Wang et al., 2021,
            "BERT-based dense retrievers require interpolation with BM25").

    Raises:
        SettingsError: `weight` lies outside 0…1.
    """

    def __init__(self, model: PairScorer, weight: float = 1.0) -> None:
        self._model = model
        self._weight = checked_weight(weight)

    def rerank(
        self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]], k: int
    ) -> list[list[Hit]]:
        """Return the best `k` hits of each query by the model's scores, or the sums."""
        pairs = [
            (query.text, hit.document.contents)
            for query, found in zip(queries, hits, strict=True)
            for hit in found
        ]
        return _best(hits, self._model.score(pairs), k, self._weight)


class GeneratorReranker:
    """Reranks by asking a generator of each passage whether it answers the query.

    The score is log p(yes) - log p(no) of the answer's first token, as in the pointwise relevance
    generation of Liang et al., 2023 (HELM). A passage too long for the generator is cut at a
    sentence's end.

    Args:
        generator: the judge.
        weight: as in `CrossEncoderReranker`.

    Raises:
        SettingsError: `weight` lies outside 0…1.
    """

    def __init__(self, generator: Judge, weight: float = 1.0) -> None:
        self._generator = generator
        self._weight = checked_weight(weight)

    def rerank(
        self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]], k: int
    ) -> list[list[Hit]]:
        """Return the best `k` hits of each query by the generator's judgement, or the sums."""
        prompts = [
            self._judgement(query, hit)
            for query, found in zip(queries, hits, strict=True)
            for hit in found
        ]
        options = (("Yes", "yes", " Yes", " yes"), ("No", "no", " No", " no"))
        logprobs = self._generator.first_token_logprobs(prompts, options)
        return _best(hits, logprobs[:, 0] - logprobs[:, 1], k, self._weight)

    def _judgement(self, query: Query, hit: Hit) -> Prompt:
        room = self._generator.window - TEMPLATE_TOKENS
        return build_prompt(
            _JUDGEMENT,
            query.text,
            [hit],
            budget=room,
            window=room,
            count=self._generator.count,
            sentences=sentences,
        )


class DiversityReranker:
    """Chooses hits that differ from one another, by maximal marginal relevance.

    One by one, the hit with the greatest (1 - diversity) · relevance - diversity · similarity is
    chosen (Carbonell and Goldstein, 1998): relevance is the hit's score scaled to 0…1 over the
    list, similarity the greatest inner product of its stored vector with one chosen before, and at
    least 0, so that the values of the hits chosen never rise.

    Args:
        index: holds the vectors; its dense store is needed.
        diversity: 0 keeps the order, 1 ignores relevance.
        reranker: re-orders the hits first, if given.

    Raises:
        SettingsError: `diversity` lies outside 0…1.
        IndexStateError: the index has no dense store, or does not hold a hit's document.
    """

    def __init__(self, index: Index, diversity: float, reranker: Reranker | None = None) -> None:
        if not 0 <= diversity <= 1:
            raise SettingsError(f"diversity must lie in 0…1, not {diversity}")
        self._store = index.dense
        self._documents = index.documents
        self._diversity = diversity
        self._reranker = reranker

    def rerank(
        self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]], k: int
    ) -> list[list[Hit]]:
        """Return `k` hits of each query in the order in which they were chosen."""
        if self._reranker:
            depth = max(map(len, hits), default=0)
            hits = self._reranker.rerank(queries, hits, depth)
        return [self._choose(found, k) for found in hits]

    def _row(self, hit: Hit) -> int:
        row: int | None = self._documents.rows.get(hit.document.id)
        if row is None:
            raise IndexStateError(
                f"the hit {hit.document.id!r} is not in the index that the diversity is measured by"
            )
        return row

    def _choose(self, hits: Sequence[Hit], k: int) -> list[Hit]:
        rows = np.array([self._row(hit) for hit in hits], np.int64)
        vectors = self._store.vectors(rows)
        relevance = np.array(scaled([hit.score for hit in hits]))
        chosen: list[int] = []
        values: list[float] = []
        nearest = np.zeros(len(hits))
        for _ in range(min(k, len(hits))):
            value = (1 - self._diversity) * relevance - self._diversity * nearest
            value[chosen] = -np.inf
            best = int(value.argmax())
            nearest = np.maximum(nearest, vectors @ vectors[best])
            chosen.append(best)
            values.append(float(value[best]))
        return [Hit(hits[i].document, value) for i, value in zip(chosen, values, strict=True)]


def checked_weight(weight: float) -> float:
    """Return a weight that lies in 0…1.

    Raises:
        SettingsError: it does not.
    """
    if not 0 <= weight <= 1:
        raise SettingsError(f"the reranker's weight must lie in 0…1, not {weight}")
    return weight


def _best(
    hits: Sequence[Sequence[Hit]], scores: NDArray[np.float32], k: int, weight: float
) -> list[list[Hit]]:
    """Give the flat scores to the hits and sort; equal scores keep their order."""
    values = iter(scores.tolist())
    best = []
    for found in hits:
        own = interpolated([hit.score for hit in found], [next(values) for _ in found], weight)
        again = [Hit(hit.document, score) for hit, score in zip(found, own, strict=True)]
        best.append(sorted(again, key=lambda hit: -hit.score)[:k])
    return best
