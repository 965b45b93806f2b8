"""The dense store: embeddings by row, searched exactly or through a FAISS index over them.

Embeddings lie in float32 arrays, one a segment, and are searched by inner product; vectors that are
to be compared by cosine are normalised before they come here. An approximate index is an addition:
what it does not cover (a segment added later, a narrow filter) is searched exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import IndexStateError, ModelError, SettingsError
from .ann import Ann, knn
from .embeddings import Vectors

_EXACT_BELOW = 20_000  # so few allowed rows are searched exactly: faster, and nothing is missed


class DenseStore:
    """Search over the embeddings of one or several segments.

    Args:
        embeddings: float32 arrays of shape [rows, dimension], one a segment, in row order.
        ann: the FAISS index over the first rows, if there is one.
        search: FAISS's search parameters, in place of the defaults.
    """

    def __init__(
        self, embeddings: Sequence[Vectors], ann: Path | None = None, search: str = ""
    ) -> None:
        self._embeddings = list(embeddings)
        sizes = [len(part) for part in embeddings]
        self.starts: list[int] = [0, *np.cumsum(sizes, dtype=int).tolist()]
        self._ann = Ann(ann, search) if ann else None
        if self._ann and self._ann.size not in self.starts:
            raise IndexStateError(
                f"{ann}: holds {self._ann.size} vectors, the segments {self.starts[1:]}. "
                "Build the index again."
            )

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def dimension(self) -> int:
        """The embeddings' number of components."""
        return int(self._embeddings[0].shape[1])

    def vectors(self, rows: NDArray[np.int64]) -> Vectors:
        """Return the embeddings of these rows, shape [rows, dimension]."""
        out = np.empty((len(rows), self.dimension), np.float32)
        places = np.searchsorted(self.starts, rows, side="right") - 1
        for place in np.unique(places):
            here = places == place
            out[here] = self._embeddings[place][rows[here] - self.starts[place]]
        return out

    def search(
        self,
        vectors: Vectors,
        k: int,
        mask: NDArray[np.bool_] | None = None,
        *,
        exact: bool = False,
    ) -> tuple[list[NDArray[np.int64]], list[NDArray[np.float32]]]:
        """Find the best `k` rows of each query vector by inner product.

        Args:
            vectors: the queries, shape [queries, dimension].
            k: how many hits at most.
            mask: which rows may be hits, shape [rows]; None is all.
            exact: search every row even where there is an approximate index.

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
        covered, parts = 0, []
        if self._ann and not exact and not _narrow(mask):
            found = self._ann.search(vectors, min(k, self._ann.size), mask)
            if found is not None and not _short(found[1], k, mask, self._ann.size):
                parts.append(found)
                covered = self._ann.size
        for place, part in enumerate(self._embeddings):
            if self.starts[place] >= covered:
                parts.append(self._exact(vectors, k, part, self.starts[place], mask))
        return _merge(parts, k)

    def _exact(
        self, vectors: Vectors, k: int, part: Vectors, start: int, mask: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        rows = None
        if mask is not None:
            rows = np.flatnonzero(mask[start : start + len(part)])
            part = np.ascontiguousarray(part[rows])
        k = min(k, len(part))
        if k == 0:
            return np.empty((len(vectors), 0), np.float32), np.empty((len(vectors), 0), np.int64)
        scores, found = knn(vectors, part, k)
        return scores, (found if rows is None else rows[found]) + start


def _narrow(mask: NDArray[np.bool_] | None) -> bool:
    return mask is not None and int(mask.sum()) < _EXACT_BELOW


def _short(rows: NDArray[np.int64], k: int, mask: NDArray[np.bool_] | None, size: int) -> bool:
    """Tell whether an approximate search found fewer rows than there are to be found."""
    possible = size if mask is None else int(mask[:size].sum())
    return bool(((rows >= 0).sum(axis=1) < min(k, possible)).any())


def _merge(
    parts: Sequence[tuple[NDArray[np.float32], NDArray[np.int64]]], k: int
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.float32]]]:
    scores = np.concatenate([part[0] for part in parts], axis=1)
    rows = np.concatenate([part[1] for part in parts], axis=1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
    kept = [row >= 0 for row in rows]
    return (
        [row[keep] for row, keep in zip(rows, kept, strict=True)],
        [score[keep] for score, keep in zip(scores, kept, strict=True)],
    )
