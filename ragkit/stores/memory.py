"""A handful of documents in memory, searched by the package rank_bm25."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import rank_bm25
from numpy.typing import NDArray

from ..errors import DataError, SettingsError
from ..types import Document, Where
from .analysis import Analyser
from .bm25 import Bm25Settings, Scores
from .documents import check_document, matches
from .live import Rows


class MemoryIndex:
    """Documents and their BM25 scores, held in memory: no folder, no build.

    Every query costs a pass over all documents; beyond some thousands, build an `Index`.

    Raises:
        DataError: as `check_document` does, or two documents of one id, or none that holds a term.
        SettingsError: the variant is `lucene`, which rank_bm25 does not know.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        settings: Bm25Settings | None = None,
        analyser: Analyser | None = None,
    ) -> None:
        settings = settings or Bm25Settings("okapi", k1=1.5)
        self.documents = list(documents)
        ids: set[str] = set()
        for document in self.documents:
            check_document(document)
            if document.id in ids:
                raise DataError(f"two documents have the id {document.id!r}; ids must be unique")
            ids.add(document.id)
        self.bm25 = _RankBm25(self.documents, settings, analyser or Analyser())

    def mask(self, where: Where) -> NDArray[np.bool_] | None:
        """Return which documents pass a filter, shape [documents]; None where all do."""
        if not where:
            return None
        return np.array([matches(where, document) for document in self.documents])


class _RankBm25:
    def __init__(
        self, documents: Sequence[Document], settings: Bm25Settings, analyser: Analyser
    ) -> None:
        self._analyser = analyser
        self._terms = [analyser.terms(document.contents) for document in documents]
        if not any(self._terms):
            raise DataError("there is no text to search: no document holds a term")
        self._bm25 = _scorer(settings, self._terms)
        self._sets = [frozenset(terms) for terms in self._terms]

    def with_settings(self, settings: Bm25Settings) -> _RankBm25:
        other = object.__new__(_RankBm25)
        other.__dict__.update(self.__dict__, _bm25=_scorer(settings, self._terms))
        return other

    def search(
        self, texts: Sequence[str], k: int, mask: NDArray[np.bool_] | None = None
    ) -> tuple[list[Rows], list[Scores]]:
        if k < 1:
            raise SettingsError(f"k must be at least 1, not {k}")
        all_rows, all_scores = [], []
        for text in texts:
            terms = self._analyser.terms(text)
            scores = np.asarray(self._bm25.get_scores(terms), dtype=np.float64)
            found = np.array([not held.isdisjoint(terms) for held in self._sets])
            rows = np.flatnonzero(found if mask is None else found & mask)
            rows = rows[np.lexsort((rows, -scores[rows]))][:k]
            all_rows.append(rows)
            all_scores.append(scores[rows])
        return all_rows, all_scores


def _scorer(settings: Bm25Settings, terms: Sequence[Sequence[str]]) -> Any:
    if settings.variant == "lucene":
        raise SettingsError("rank_bm25 knows the variants okapi, l and plus, not lucene")
    parameters: dict[str, float] = {"k1": settings.k1, "b": settings.b}
    if settings.variant == "okapi":
        return rank_bm25.BM25Okapi(terms, **parameters, epsilon=settings.epsilon)
    kind = rank_bm25.BM25L if settings.variant == "l" else rank_bm25.BM25Plus
    return kind(terms, **parameters, delta=settings.shift)
