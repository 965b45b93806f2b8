"""The BM25 store: postings on disk, exact scores in any of the four common variants.

Postings hold raw term frequencies, so k1, b, delta and the variant are choices of the search, not
of the build, and the statistics of all segments are combined when the store opens. Scores are
computed in double precision, over the postings of the query's terms only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import repeat
from pathlib import Path
from threading import Lock
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingsError
from . import _postings
from .analysis import Analyser
from .live import Live, Rows
from .postings import Postings

Variant: TypeAlias = Literal["lucene", "okapi", "l", "plus"]
Scores: TypeAlias = NDArray[np.float64]

_GREATEST = 2.0**62  # of a parameter: no sum of scores overflows
_DELTA = {"lucene": 0.0, "okapi": 0.0, "l": 0.5, "plus": 1.0}


@dataclass(frozen=True, slots=True)
class Bm25Settings:
    """Which BM25, and its parameters.

    With f the term's frequency in the document, n the number of documents that hold it, N all
    documents, and K = k1 (1 - b + b length / average length), a query term adds

    - `lucene`: log(1 + (N - n + ½) / (n + ½)) · f / (f + K)
    - `okapi`:  idf · f (k1 + 1) / (f + K), idf = log((N - n + ½) / (n + ½)); a negative idf becomes
      `epsilon` times the mean idf of all terms
    - `l`:      log((N + 1) / (n + ½)) · f (k1 + 1) (c + delta) / (k1 + c + delta), c = f k1 / K
    - `plus`:   log((N + 1) / n) · (delta + f (k1 + 1) / (f + K)), delta also where f = 0

    The last three are the definitions of the package `rank_bm25`, value for value (its BM25L has
    the factor f, which Lv and Zhai, 2011, do not). The variants are compared by Kamphuis et al.,
    2020. `delta` None is the variant's own: 0.5 for `l`, 1 for `plus`.
    """

    variant: Variant = "lucene"
    k1: float = 1.2
    b: float = 0.75
    delta: float | None = None
    epsilon: float = 0.25

    def __post_init__(self) -> None:
        """Refuse parameters out of range.

        Raises:
            SettingsError: an unknown variant, k1 not above 0, b outside 0…1, delta below 0, any of
                them or epsilon not finite or beyond 2⁶².
        """
        if self.variant not in _DELTA:
            raise SettingsError(
                f"unknown BM25 variant {self.variant!r}; known: {', '.join(_DELTA)}"
            )
        for name in ("k1", "b", "delta", "epsilon"):
            if not abs(getattr(self, name) or 0.0) < _GREATEST:  # NaN is no less either
                raise SettingsError(f"{name} must be a number below 2⁶², not {getattr(self, name)}")
        if not self.k1 > 0:
            raise SettingsError(f"k1 must be above 0, not {self.k1}")
        if not 0 <= self.b <= 1:
            raise SettingsError(f"b must lie in 0…1, not {self.b}")
        if self.delta is not None and not self.delta >= 0:
            raise SettingsError(f"delta must not be negative, as {self.delta} is")

    @property
    def shift(self) -> float:
        """Delta, or the variant's own where it is not given."""
        return _DELTA[self.variant] if self.delta is None else self.delta


class Bm25Store:
    """BM25 over the postings of one or several segments.

    Statistics, scores and rows are those of live documents alone, as if postings held no others;
    where `live` is not given, all are.

    Raises:
        IndexStateError: the postings do not fit together, or not the live documents.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        analyser: Analyser,
        settings: Bm25Settings | None = None,
        *,
        live: Live | None = None,
        threads: int | None = None,
    ) -> None:
        self.analyser = analyser
        self.settings = settings or Bm25Settings()
        deleted = [np.empty(0, np.int64) for _ in folders] if live is None else live.deleted
        pairs = zip(folders, deleted, strict=True)
        self._segments = [Postings(folder, rows) for folder, rows in pairs]
        self._threads = threads
        sizes = [len(segment.lengths) for segment in self._segments]
        self._live = Live(sizes) if live is None else live
        for segment, held, size in zip(self._segments, sizes, self._live.sizes, strict=True):
            if held != size:
                raise segment.damaged()
        total = sum(segment.length for segment in self._segments)
        self._average = total / len(self) if total else 1.0
        self._lock = Lock()
        self._reset()

    def _reset(self) -> None:
        """Set what depends on the settings; impacts take memory only once a query needs them."""
        self._impacts = [np.empty(len(segment.rows)) for segment in self._segments]
        self._peaks = [np.full(len(segment.terms), -1.0) for segment in self._segments]
        self._idf = lru_cache(maxsize=1 << 16)(self.idf)

    def with_settings(self, settings: Bm25Settings) -> Bm25Store:
        """Return a store over the same postings with other settings."""
        other = object.__new__(Bm25Store)
        other.__dict__.update(self.__dict__)
        other.settings = settings
        other._reset()
        return other

    def __len__(self) -> int:
        return len(self._live)

    def _weigh_postings(self, place: int, terms: NDArray[np.int64]) -> None:
        segment, settings = self._segments[place], self.settings
        with self._lock:
            if (self._peaks[place][terms[terms >= 0]] >= 0).all():
                return
            relative = segment.lengths.astype(np.float64) / self._average
            sound = _postings.weigh_postings(
                terms, segment.indptr, segment.rows, segment.counts,
                settings.k1 * (1 - settings.b + settings.b * relative),
                settings.variant == "l", settings.k1, settings.shift,
                self._impacts[place], self._peaks[place],
            )  # fmt: skip
        if not sound:
            raise segment.damaged()

    @cached_property
    def _mean_idf(self) -> float:
        if len(self._segments) == 1:
            frequencies = self._segments[0].frequencies()
        else:
            terms = set().union(*(segment.terms for segment in self._segments))
            frequencies = np.array([self._frequency(term) for term in terms])
        frequencies = frequencies[frequencies > 0]  # a term of deleted documents alone is none
        if not frequencies.size:
            return 0.0
        return float(np.mean(np.log(len(self) - frequencies + 0.5) - np.log(frequencies + 0.5)))

    def _frequency(self, term: str) -> int:
        return sum(segment.frequency(term) for segment in self._segments)

    def idf(self, term: str) -> float:
        """Return a term's weight in the settings' variant; 0 for a term of no document."""
        n, documents = self._frequency(term), len(self)
        if n == 0:
            return 0.0
        if self.settings.variant == "plus":
            return float(np.log((documents + 1) / n))
        if self.settings.variant == "l":
            return float(np.log(documents + 1) - np.log(n + 0.5))
        if self.settings.variant == "lucene":
            return float(np.log1p((documents - n + 0.5) / (n + 0.5)))
        value = float(np.log(documents - n + 0.5) - np.log(n + 0.5))
        return value if value >= 0 else self.settings.epsilon * self._mean_idf

    def scores(self, text: str) -> Scores:
        """Return every document's score for a query text, shape [documents]."""
        rows, scores = self.search([text], max(1, len(self)))
        everything = np.full(len(self), self._floor(self._weights(text)))
        everything[rows[0]] = scores[0]
        return everything

    def search(
        self, texts: Sequence[str], k: int, mask: NDArray[np.bool_] | None = None
    ) -> tuple[list[Rows], list[Scores]]:
        """Find the best `k` documents of each query text.

        A document without any of the query's terms is no hit. Equal scores stand in row order.

        Args:
            texts: the queries.
            k: how many hits at most.
            mask: which documents may be hits, shape [documents]; None is all.

        Returns:
            The hits' rows and their scores, an array each per query, best first.

        Raises:
            SettingsError: `k` is below 1, or the mask is of other documents.
        """
        if k < 1:
            raise SettingsError(f"k must be at least 1, not {k}")
        if mask is not None and len(mask) != len(self):
            raise SettingsError(f"a mask of {len(mask)} documents, of which there are {len(self)}")
        weights = [self._weights(text) for text in texts]
        k = min(k, max(1, len(self)))
        rows = np.full((len(texts), k), -1, np.int64)
        scores, kept = np.zeros((len(texts), k)), np.zeros(len(texts), np.int64)
        floors = np.array([self._floor(each) for each in weights])
        for place in range(len(self._segments)):
            self._search_segment(place, weights, floors, mask, rows, scores, kept)
        _postings.sort_best(rows, scores, kept)
        rows = self._live.number_anywhere(rows)
        return (
            [row[:size] for row, size in zip(rows, kept, strict=True)],
            [score[:size] for score, size in zip(scores, kept, strict=True)],
        )

    def _weights(self, text: str) -> dict[str, float]:
        weights: dict[str, float] = {}
        for term in self.analyser.terms(text):
            weights[term] = weights.get(term, 0.0) + self._idf(term)
        return weights

    def _floor(self, weights: dict[str, float]) -> float:
        """Return what BM25+ gives to every document, even to one without the query's terms."""
        return (
            self.settings.shift * sum(weights.values()) if self.settings.variant == "plus" else 0.0
        )

    def _search_segment(
        self,
        place: int,
        weights: list[dict[str, float]],
        floors: Scores,
        mask: NDArray[np.bool_] | None,
        rows: Rows,
        scores: Scores,
        kept: Rows,
    ) -> None:
        """Offer a segment's documents to the best, which the last three hold."""
        segment, live = self._segments[place], self._live
        numbers, factors, indptr = _pack_queries(weights, segment.terms)
        self._weigh_postings(place, numbers)
        allowed = live.allowed(place, mask)
        allowed = np.empty(0, np.bool_) if allowed is None else allowed
        gain = 1.0 if self.settings.variant == "lucene" else self.settings.k1 + 1
        threads = min(self._threads or _default_threads(), max(1, len(weights) // 16))

        def work(part: int) -> None:
            _postings.search_segment(
                segment.indptr, segment.rows, self._impacts[place], self._peaks[place],
                numbers, factors * gain, indptr, floors, allowed, len(segment.lengths),
                live.held[place], part, threads, rows, scores, kept,
            )  # fmt: skip

        if threads == 1:
            work(0)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, range(threads)))


def _pack_queries(
    weights: Sequence[Mapping[str, float]], terms: Mapping[str, int]
) -> tuple[Rows, Scores, Rows]:
    """Return the queries' terms as numbers (-1: not in this segment), weights, and their places."""
    numbers: list[int] = []
    factors: list[float] = []
    indptr = [0]
    for weighted in weights:
        numbers.extend(map(terms.get, weighted, repeat(-1)))
        factors.extend(weighted.values())
        indptr.append(len(numbers))
    return np.array(numbers, np.int64), np.array(factors), np.array(indptr, np.int64)


def _default_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
