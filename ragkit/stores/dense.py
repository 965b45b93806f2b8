"""The dense store: embeddings by row, searched exactly or through a FAISS index over them.

Embeddings lie in float32 arrays, one a segment, and are searched by inner product; vectors that are
to be compared by cosine are normalised before they come here. An approximate index is an addition:
what it does not cover (a segment added later, a narrow filter) is searched exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..artefacts import file_hash
from ..errors import IndexStateError, ModelError, SettingsError
from .ann import Ann, knn, release
from .embeddings import Vectors, open_embeddings
from .live import Live, Mask, Rows

Found: TypeAlias = tuple[NDArray[np.float32], Rows]  # each of shape [queries, k]

_LEAST = 10  # hits that are looked for where fewer are asked for: searches are tuned to find 10
_QUERIES = 1024  # that are searched at a time
_EXACT_BELOW = 20_000  # so few allowed rows are searched exactly: faster, and nothing is missed


class DenseStore:
    """Search over the embeddings of one or several segments.

    Args:
        embeddings: float32 arrays of shape [rows, dimension], one a segment, in row order.
        ann: the FAISS index over the first rows, if there is one.
        search: FAISS's search parameters, in place of the defaults.
        rescore: how many candidates a hit the FAISS index finds, whose scores the embeddings tell;
            0 takes its own scores.
        deleted: the deleted rows of each segment. They are no hits, and rows are numbered as if
            they were not there.
    """

    def __init__(
        self,
        embeddings: Sequence[Vectors],
        ann: Path | None = None,
        search: str = "",
        *,
        rescore: int = 0,
        deleted: Sequence[Rows] = (),
    ) -> None:
        self._embeddings = list(embeddings)
        self._live = Live([len(part) for part in embeddings], deleted)
        self._ann = Ann(ann, search) if ann else None
        self._rescore = rescore
        self.frugal = False  # whether a search gives memory back, segment by segment
        if self._ann and self._ann.size not in self._live.held:
            raise IndexStateError(
                f"{ann}: holds {self._ann.size} vectors, the segments {self._live.held[1:]}. "
                "Build the index again."
            )

    @classmethod
    def open(
        cls,
        folders: Sequence[Path],
        live: Live,
        ann: Path | None = None,
        search: str = "",
        rescore: int = 0,
        digest: str = "",
    ) -> DenseStore:
        """Open the embeddings of segments' folders, of which these rows are live.

        The approximate index is compared with its checksum: FAISS trusts what it reads.

        Raises:
            IndexStateError: they cannot be read, do not fit, or have changed.
        """
        if ann and digest and file_hash(ann) != digest:
            raise IndexStateError(
                f"{ann}: its bytes have changed since it was written. Build the index again."
            )
        pairs = zip(folders, live.sizes, strict=True)
        arrays = [open_embeddings(folder / "embeddings.npy", rows) for folder, rows in pairs]
        return cls(arrays, ann, search, rescore=rescore, deleted=live.deleted)

    def __len__(self) -> int:
        return len(self._live)

    @property
    def dimension(self) -> int:
        """The embeddings' number of components."""
        return int(self._embeddings[0].shape[1])

    def vectors(self, rows: Rows) -> Vectors:
        """Return the embeddings of these rows, shape [rows, dimension]."""
        return self._taken(*self._live.locate(rows))

    def _taken(self, places: Rows, within: Rows) -> Vectors:
        out = np.empty((len(places), self.dimension), np.float32)
        for place in np.unique(places):
            here = places == place
            out[here] = self._embeddings[place][within[here]]
        return out

    @property
    def effort(self) -> tuple[str, int, float] | None:
        """What `Ann.effort` tells of the approximate index; None if there is none."""
        return self._ann.effort() if self._ann else None

    def set_search(self, search: str, rescore: int) -> None:
        """Search the approximate index otherwise; the arguments are those of the store.

        Raises:
            SettingsError: FAISS refuses the parameters.
        """
        if self._ann:
            self._ann.set_search(search)
        self._rescore = rescore

    def search(
        self,
        vectors: Vectors,
        k: int,
        mask: Mask | None = None,
        *,
        exact: bool = False,
        whole: bool = True,
    ) -> tuple[list[Rows], list[NDArray[np.float32]]]:
        """Find the best `k` rows of each query vector by inner product.

        Args:
            vectors: the queries, shape [queries, dimension].
            k: how many hits at most.
            mask: which rows may be hits, shape [rows]; None is all.
            exact: search every row even where there is an approximate index.
            whole: do so too for a query for which that index finds fewer than there are.

        Returns:
            The hits' rows and their scores, an array each per query, best first; equal scores in
            row order, but which of them take the last places is FAISS's choice.

        Raises:
            IndexStateError: the vectors have another dimension than the embeddings.
            ModelError: a vector holds NaN or an infinity.
            SettingsError: `k` is below 1.
        """
        if k < 1:
            raise SettingsError(f"k must be at least 1, not {k}")
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise IndexStateError(
                f"query vectors have shape {vectors.shape}, the index holds {self.dimension} "
                "components. Search with the encoder that the index was built with."
            )
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if not np.isfinite(vectors).all():
            raise ModelError("the encoder gave NaN or an infinity for a query")
        at_once = 32 if self.frugal else _QUERIES
        if self._ann and len(vectors) > at_once and not exact:  # candidates take memory
            blocks = (vectors[n : n + at_once] for n in range(0, len(vectors), at_once))
            found_ = [self.search(each, k, mask, exact=exact, whole=whole) for each in blocks]
            return [r for each in found_ for r in each[0]], [s for each in found_ for s in each[1]]
        covered, parts, short = 0, [], np.empty(0, np.int64)
        if self._ann and not exact and not _narrow(mask):
            allowed = self._live.allowed_anywhere(mask)
            wanted = min(max(k, _LEAST) * max(1, self._rescore), self._ann.size)
            found = self._ann.search(vectors, wanted, allowed)
            if found is not None:
                scores = self._rescored(vectors, *found) if self._rescore else found[0]
                parts.append((scores, self._live.number_anywhere(found[1])))
                covered = self._ann.size
                short = _short(found[1], k, allowed, self._ann.size)
        for place, part in enumerate(self._embeddings):
            if self._live.held[place] >= covered:
                parts.append(self._exact(vectors, k, place, mask))
            if self.frugal:
                release(part)
        rows, best = _merge(parts, k)
        if len(short) and whole:
            again = self.search(vectors[short], k, mask, exact=True)
            for query, found_rows, scores in zip(short, *again, strict=True):
                rows[query], best[query] = found_rows, scores
        return rows, best

    def _rescored(self, vectors: Vectors, scores: Vectors, rows: Rows) -> Vectors:
        """Return the inner products of queries and their candidates, rows of all segments."""
        starts = np.asarray(self._live.held, np.int64)
        exact = np.full_like(scores, -np.inf)
        for query, (vector, found) in enumerate(zip(vectors, rows, strict=True)):
            there = found >= 0
            places = np.searchsorted(starts, found[there], side="right") - 1
            taken = self._taken(places, found[there] - starts[places])
            exact[query, there] = np.einsum("rd,d->r", taken, vector)  # equal rows score equally
        return exact

    def _exact(self, vectors: Vectors, k: int, place: int, mask: Mask | None) -> Found:
        part, rows, allowed = self._embeddings[place], None, self._live.allowed(place, mask)
        few = allowed is not None and 2 * self._live.count(place) < len(part)
        if allowed is not None and (mask is not None or few):
            rows, allowed = np.flatnonzero(allowed), None
            part = np.ascontiguousarray(part[rows])
        k = min(k, len(part) if allowed is None else self._live.count(place))
        if k == 0:
            return np.empty((len(vectors), 0), np.float32), np.empty((len(vectors), 0), np.int64)
        if allowed is None:
            scores, found = knn(vectors, part, k)
        else:
            scores, found = _sift(vectors, part, k, allowed)
        return scores, self._live.number(place, found if rows is None else rows[found])


def _sift(vectors: Vectors, part: Vectors, k: int, allowed: Mask) -> Found:
    """Search a segment of which some rows are deleted, without copying the others.

    So many more are looked for that each query finds `k`, which are then the best.
    """
    wanted = 16 + k * len(part) // int(allowed.sum())
    while True:
        scores, rows = knn(vectors, part, min(wanted, len(part)))
        order = np.argsort(~allowed[rows], axis=1, kind="stable")[:, :k]
        rows = np.take_along_axis(rows, order, 1)
        if allowed[rows].all():
            return np.take_along_axis(scores, order, 1), rows
        wanted *= 2


def _narrow(mask: Mask | None) -> bool:
    return mask is not None and int(mask.sum()) < _EXACT_BELOW


def _short(rows: Rows, k: int, mask: Mask | None, size: int) -> Rows:
    """Return the queries for which an approximate search found fewer rows than there are."""
    possible = size if mask is None else int(mask[:size].sum())
    return np.flatnonzero((rows >= 0).sum(axis=1) < min(k, possible))


def _merge(parts: Sequence[Found], k: int) -> tuple[list[Rows], list[NDArray[np.float32]]]:
    scores = np.concatenate([part[0] for part in parts], axis=1)
    rows = np.concatenate([part[1] for part in parts], axis=1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
    kept = [row >= 0 for row in rows]
    return (
        [row[keep] for row, keep in zip(rows, kept, strict=True)],
        [score[keep] for score, keep in zip(scores, kept, strict=True)],
    )
