"""The dense store: embeddings by row, exact search, and FAISS indexes over them.

Embeddings lie in float32 arrays, one a segment, and are searched by inner product; vectors that are
to be compared by cosine are normalised before they come here. An approximate index is an addition:
what it does not cover (a segment added later, a narrow filter) is searched exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from ..errors import IndexStateError, ModelError, SettingsError
from .embeddings import Vectors

faiss: Any = _faiss  # its stubs describe the C++ signatures, not the Python wrapper's

Kind: TypeAlias = Literal["flat", "hnsw", "ivf"]
KINDS: tuple[Kind, ...] = ("flat", "hnsw", "ivf")

_TRAINING_VECTORS_PER_LIST = 64
_BLOCK = 65_536
_EXACT_BELOW = 20_000  # so few allowed rows are searched exactly: faster, and nothing is missed


@dataclass(frozen=True, slots=True)
class AnnSettings:
    """Which FAISS index is built over the embeddings.

    `kind` is `flat` (exact, no index), `hnsw` or `ivf`; `factory` is a FAISS factory string, such
    as `IVF1024,PQ48` or `HNSW32,SQ8`, that takes its place. `search` sets FAISS's parameters for
    the search (`nprobe=32`, `efSearch=256`, comma-separated).
    """

    kind: Kind = "flat"
    factory: str = ""
    search: str = ""

    def __post_init__(self) -> None:
        """Refuse an unknown kind.

        Raises:
            SettingsError: `kind` is none of flat, hnsw, ivf.
        """
        if self.kind not in KINDS:
            raise SettingsError(f"unknown kind {self.kind!r}; known are {', '.join(KINDS)}")

    def factory_for(self, vectors: int) -> str:
        """Return the FAISS factory string for so many vectors; empty for exact search."""
        if self.factory or self.kind == "flat":
            return self.factory
        if self.kind == "hnsw":
            return "HNSW32,Flat"
        lists = max(1, min(round(4 * vectors**0.5), vectors // _TRAINING_VECTORS_PER_LIST))
        return f"IVF{lists},Flat"


def build_ann(
    embeddings: Sequence[Vectors],
    settings: AnnSettings,
    path: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Train a FAISS index on the embeddings, fill it with them and write it to `path`.

    Raises:
        SettingsError: FAISS refuses the factory string, or cannot train it on these vectors.
    """
    total = sum(len(part) for part in embeddings)
    factory = settings.factory_for(total)
    index = _new_index(embeddings[0].shape[1], factory)
    try:
        if not index.is_trained:
            index.train(_sample(embeddings, total))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise SettingsError(
            f"FAISS cannot build {factory!r} over {total} vectors of dimension "
            f"{embeddings[0].shape[1]}: {reason}"
        ) from error
    done = 0
    for part in embeddings:
        for start in range(0, len(part), _BLOCK):
            block = np.ascontiguousarray(part[start : start + _BLOCK])
            index.add(block)
            done += len(block)
            progress(done, total)
    faiss.write_index(index, str(path))


def check_ann(settings: AnnSettings, dimension: int) -> None:
    """Refuse settings that FAISS refuses, before anything is encoded.

    Raises:
        SettingsError: the factory string or the search parameters mean nothing to FAISS.
    """
    factory = settings.factory_for(1_000_000)
    if factory:
        _set_search(_new_index(dimension, factory), settings.search)


def _new_index(dimension: int, factory: str) -> Any:
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
        if factory.startswith("HNSW"):
            faiss.ParameterSpace().set_index_parameters(index, "efConstruction=200")
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise SettingsError(
            f"FAISS refuses the factory string {factory!r} for {dimension} components: {reason}"
        ) from error
    return index


def _set_search(index: Any, search: str) -> None:
    try:
        faiss.ParameterSpace().set_index_parameters(index, search)
    except RuntimeError as error:
        raise SettingsError(f"FAISS refuses the search parameters {search!r}") from error


def _sample(embeddings: Sequence[Vectors], total: int) -> Vectors:
    wanted = min(total, 262_144)
    random = np.random.default_rng(0)
    parts = [
        part[np.sort(random.permutation(len(part))[: -(-wanted * len(part) // total)])]
        for part in embeddings
    ]
    return np.ascontiguousarray(np.concatenate(parts))


class _Ann:
    """A FAISS index over the first `size` rows."""

    def __init__(self, path: Path, search: str) -> None:
        try:
            self._index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise IndexStateError(
                f"{path}: FAISS cannot read it. Build the index again."
            ) from error
        self.size = int(self._index.ntotal)
        index = faiss.downcast_index(self._index)
        if isinstance(index, faiss.IndexHNSW):
            index.hnsw.efSearch = 128
        elif isinstance(index, faiss.IndexIVF):
            index.nprobe = max(8, index.nlist // 16)
        _set_search(self._index, search)

    def search(
        self, vectors: Vectors, k: int, mask: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
        """Search; None where this index type cannot filter."""
        index = faiss.downcast_index(self._index)
        if mask is None:
            if isinstance(index, faiss.IndexHNSW) and k > index.hnsw.efSearch:
                parameters = faiss.SearchParametersHNSW(efSearch=k)
                return index.search(vectors, k, params=parameters)  # type: ignore[no-any-return]
            return index.search(vectors, k)  # type: ignore[no-any-return]
        bits = np.packbits(mask[: self.size], bitorder="little")
        selector = faiss.IDSelectorBitmap(bits)
        if isinstance(index, faiss.IndexHNSW):
            ef = max(k, index.hnsw.efSearch)
            parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=ef)
        elif isinstance(index, faiss.IndexIVF):
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=index.nprobe)
        else:
            return None
        return index.search(vectors, k, params=parameters)  # type: ignore[no-any-return]


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
        self._ann = _Ann(ann, search) if ann else None
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
        scores, found = faiss.knn(vectors, part, k, metric=faiss.METRIC_INNER_PRODUCT)
        found = found.astype(np.int64) if rows is None else rows[found]
        return scores, found + start


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
