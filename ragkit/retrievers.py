"""Retrievers: BM25, dense, and their fusion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .artefacts import to_json
from .errors import IndexStateError, SettingsError
from .fusion import Fusion, values_of
from .stores.embeddings import may_search
from .types import Document, Hit, Query, Retriever, Where

if TYPE_CHECKING:
    from .stores.bm25 import Bm25Settings
    from .stores.dense import DenseStore
    from .stores.index import Index

Found: TypeAlias = tuple[Sequence[NDArray[np.int64]], Sequence[NDArray[Any]]]


class QueryEncoder(Protocol):
    """What a dense retriever needs of an encoder; `ragkit.models.BiEncoder` is one."""

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the texts' vectors, float32 of shape [texts, dimension]."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Return name, settings and `fingerprint`, and `base` if it is of queries only.

        `base` is the fingerprint of the encoder whose documents the queries are compared with.
        """
        ...


class _Bm25Source(Protocol):
    @property
    def documents(self) -> Any: ...
    @property
    def bm25(self) -> Any: ...
    def mask(self, where: Where) -> NDArray[np.bool_] | None: ...


def _retrieve(
    documents: Any,
    mask: Callable[[Where], NDArray[np.bool_] | None],
    queries: Sequence[Query],
    search: Callable[[list[int], NDArray[np.bool_] | None], Found],
) -> list[list[Hit]]:
    """Search the queries in groups of one filter, and give the hits in the queries' order."""
    groups: dict[str, list[int]] = {}
    for place, query in enumerate(queries):
        groups.setdefault(to_json(dict(query.where)), []).append(place)
    hits: list[list[Hit]] = [[] for _ in queries]
    for places in groups.values():
        rows, scores = search(places, mask(queries[places[0]].where))
        for place, row, score in zip(places, rows, scores, strict=True):
            pairs = zip(row.tolist(), score.tolist(), strict=True)
            hits[place] = [Hit(documents[number], value) for number, value in pairs]
    return hits


class Bm25Retriever:
    """Retrieves by BM25.

    Args:
        index: an index with a BM25 store.
        settings: variant and parameters; those of the index's manifest if None.
    """

    def __init__(self, index: Index | _Bm25Source, settings: Bm25Settings | None = None) -> None:
        self._index = index
        self._documents = index.documents
        self._store = index.bm25 if settings is None else index.bm25.with_settings(settings)

    @classmethod
    def in_memory(cls, documents: Sequence[Document], settings: Bm25Settings | None = None) -> Self:
        """Retrieve from a handful of documents without an index, through the package rank_bm25."""
        from .stores.memory import MemoryIndex

        return cls(MemoryIndex(documents, settings))

    def retrieve(self, queries: Sequence[Query], k: int) -> list[list[Hit]]:
        """Return the best `k` hits of each query; documents without any of its terms are none."""

        def search(places: list[int], mask: NDArray[np.bool_] | None) -> Found:
            found: Found = self._store.search([queries[place].text for place in places], k, mask)
            return found

        return _retrieve(self._documents, self._index.mask, queries, search)


class DenseRetriever:
    """Retrieves by the inner product of query and document vectors.

    Args:
        index: an index with a dense store.
        encoder: the encoder that the index was built with, or one that has it as its `base`.
        exact: search every vector even where the index holds an approximate index.
        store: the documents' vectors by this encoder, by row, in place of those of the index.

    Raises:
        IndexStateError: the index was built with another encoder.
    """

    def __init__(
        self,
        index: Index,
        encoder: QueryEncoder,
        *,
        exact: bool = False,
        store: DenseStore | None = None,
    ) -> None:
        self._index = index
        self._documents = index.documents
        self._store = index.dense if store is None else store
        self._encoder = encoder
        self._exact = exact
        if store is not None:
            return
        built, given = index.manifest["encoder"], encoder.describe()
        if not may_search(built, given):
            told = [key for key in given if key not in ("name", "fingerprint")]
            differing = [key for key in told if given[key] != built.get(key)] or ["fingerprint"]
            raise IndexStateError(
                f"{index.path}: built with the encoder {built['name']!r}, opened with "
                f"{given['name']!r}, whose {', '.join(differing)} differ. Use the encoder it was "
                "built with, or give the index the other one: "
                f"ragkit-index refresh --index {index.path} --encoder {given['name']}"
            )

    def retrieve(self, queries: Sequence[Query], k: int) -> list[list[Hit]]:
        """Return the best `k` hits of each query."""
        vectors = self._encoder.encode_queries([query.text for query in queries])

        def search(places: list[int], mask: NDArray[np.bool_] | None) -> Found:
            return self._store.search(vectors[places], k, mask, exact=self._exact)

        return _retrieve(self._documents, self._index.mask, queries, search)


class HybridRetriever:
    """Fuses several retrievers' lists.

    `rrf` is reciprocal rank fusion (Cormack et al., 2009): Σ weight / (60 + rank). `weighted` adds
    weight · score, the scores of each list first scaled to 0…1 (lowest of the list to highest); a
    document that a list does not hold gets 0 from it.

    Args:
        retrievers: the parts.
        weights: one a part; equal ones if None.
        fusion: `rrf` or `weighted`.
        depth: how many hits are fetched from each part, at least.

    Raises:
        SettingsError: no parts, weights of another number or negative, an unknown fusion.
    """

    def __init__(
        self,
        retrievers: Sequence[Retriever],
        weights: Sequence[float] | None = None,
        *,
        fusion: Fusion = "rrf",
        depth: int = 100,
    ) -> None:
        if fusion not in ("rrf", "weighted"):
            raise SettingsError(f"unknown fusion {fusion!r}; known are rrf, weighted")
        weights = [1.0] * len(retrievers) if weights is None else list(weights)
        if not retrievers or len(weights) != len(retrievers) or not min(weights) >= 0:
            raise SettingsError(
                f"{len(retrievers)} retrievers and the weights {weights}: "
                "fusion needs one weight, not negative, a retriever"
            )
        self._retrievers = list(retrievers)
        self._weights = weights
        self._fusion = fusion
        self._depth = depth

    def retrieve(self, queries: Sequence[Query], k: int) -> list[list[Hit]]:
        """Return the best `k` fused hits of each query; equal scores in the first part's order."""
        depth = max(k, self._depth)
        lists = [retriever.retrieve(queries, depth) for retriever in self._retrievers]
        return [self._fuse(found)[:k] for found in zip(*lists, strict=True)]

    def _fuse(self, lists: Sequence[Sequence[Hit]]) -> list[Hit]:
        scores: dict[str, float] = {}
        documents: dict[str, Document] = {}
        for hits, weight in zip(lists, self._weights, strict=True):
            for hit, value in zip(hits, values_of(self._fusion, hits), strict=True):
                documents.setdefault(hit.document.id, hit.document)
                scores[hit.document.id] = scores.get(hit.document.id, 0.0) + weight * value
        fused = [Hit(documents[id_], score) for id_, score in scores.items()]
        return sorted(fused, key=lambda hit: -hit.score)
