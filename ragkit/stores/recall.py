"""How much an approximate index finds of what exact search does, and a search that finds enough."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..types import Progress, quiet
from .ann_settings import AnnSettings
from .dense import DenseStore
from .embeddings import Vectors
from .live import Rows

log = logging.getLogger(__name__)

QUERIES = 200
_K = 10
_FACTORS = (64, 32, 16, 8, 4, 2, 1)
_GATHER = 64.0  # vectors compared in the time in which one is fetched from its place


@dataclass(frozen=True, slots=True)
class Tuned:
    """A search that was chosen: FAISS's parameters, candidates a hit, and the recall@10 it had.

    `queries` is how many documents stood for queries.
    """

    search: str
    rescore: int
    recall: float
    queries: int


class Sample:
    """Queries, and what exact search finds for them.

    Args:
        store: where it is searched.
        queries: their vectors, shape [queries, dimension].
        own: the row that each query is the vector of, which is no hit of it; None if they are none.
        k: how many hits are looked at.
    """

    def __init__(
        self, store: DenseStore, queries: Vectors, own: Rows | None = None, k: int = _K
    ) -> None:
        self._store, self._queries, self._own, self._k = store, queries, own, k
        self._exact = self._scores(exact=True)

    def recall(self) -> NDArray[np.float64]:
        """Return which share of the best k of each query is found, shape [queries].

        A hit counts that scores no less than the k-th best, whichever of equal ones it is.
        """
        found = self._scores(exact=False)
        shares = []
        for exact, scores in zip(self._exact, found, strict=True):
            if not len(exact):
                shares.append(1.0)
                continue
            least = float(exact.min())
            right = int((scores >= least - 1e-5 * max(1.0, abs(least))).sum())
            shares.append(right / len(exact))
        return np.array(shares)

    def _scores(self, *, exact: bool) -> list[NDArray[np.float32]]:
        """Return the exact scores of each query's hits."""
        wanted = self._k + (self._own is not None)
        rows, _ = self._store.search(self._queries, wanted, exact=exact, whole=False)
        if self._own is not None:
            rows = [found[found != own] for found, own in zip(rows, self._own, strict=True)]
        return [
            self._store.vectors(found[: self._k]) @ query
            for found, query in zip(rows, self._queries, strict=True)
        ]


def documents_sample(store: DenseStore, queries: int = QUERIES, seed: int = 0) -> Sample:
    """Let documents drawn at random stand for queries: each looks for the others like it."""
    random = np.random.default_rng(seed)
    own = np.sort(random.permutation(len(store))[:queries]).astype(np.int64)
    return Sample(store, store.vectors(own), own)


def tune(
    embeddings: Sequence[Vectors],
    file: Path,
    settings: AnnSettings,
    factory: str,
    progress: Progress = quiet,
) -> Tuned:
    """Choose, of the searches that find the wanted share of the best 10, the one that reads least.

    Args:
        embeddings: arrays of shape [rows, dimension], one a segment.
        file: the approximate index over them.
        settings: tell the share; and `rescore`, where that is not to be chosen too.
        factory: the FAISS factory string that the index was built by.
        progress: told of the searches tried.

    Returns:
        What was chosen; where none reaches the target, the best there is, with a warning.
    """
    store, target = DenseStore(embeddings, file), settings.recall_wanted() or 1.0
    store.frugal = True
    sample, rescore = documents_sample(store), settings.rescored(factory)
    name, most, reads = store.effort or ("", 1, 0.0)
    tried = 0

    def recall(units: int, factor: int) -> float:
        nonlocal tried
        tried += 1
        progress("tune the search", tried, None)
        store.set_search(f"{name}={units}" if name else "", factor)
        return float(sample.recall().mean())

    choices: list[tuple[float, Tuned]] = []  # with what a query reads
    chosen = settings.rescore is not None or not rescore
    for factor in (rescore,) if chosen else _FACTORS:
        # A graph is searched for as many as are wanted, at least.
        low = (_K + 1) * max(1, factor) if name == "efSearch" else 1
        top = max(low, most)
        units, reached = _least_units(partial(recall, factor=factor), target, low, top)
        if reached < target and choices:
            break  # fewer candidates find no more
        search = f"{name}={units}" if name else ""
        tuned = Tuned(search, factor, reached, min(QUERIES, len(store)))
        choices.append((units * reads + _GATHER * _K * factor, tuned))
        if reached < target:
            log.warning(
                "The approximate index finds %.3f of the best 10, not %.3f. Choose codes of more "
                "bits, a greater --rescore, or another --kind.", reached, target,
            )  # fmt: skip
            break
        most = min(top, 2 * units)
    return min(choices, key=lambda choice: choice[0])[1]


def _least_units(
    recall: Callable[[int], float], target: float, least: int, most: int
) -> tuple[int, float]:
    """Return the least effort that reaches the target, to a sixteenth, and the recall there."""
    low, high = least - 1, least
    while (reached := recall(high)) < target and high < most:
        low, high = high, min(2 * high, most)
    if reached < target:
        return high, reached
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        if (found := recall(middle)) >= target:
            high, reached = middle, found
        else:
            low = middle
    return high, reached
