"""FAISS: exact search over an array, and approximate indexes, built and searched."""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from ..errors import IndexStateError, SettingsError
from .ann_settings import AnnSettings
from .embeddings import Vectors

faiss: Any = _faiss  # its stubs describe the C++ signatures, not the Python wrapper's

TRAINING_VECTORS = 262_144  # on which an index is trained at most, unless told otherwise
_BLOCK = 65_536


def build_ann(
    embeddings: Sequence[Vectors],
    settings: AnnSettings,
    path: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    training_vectors: int = TRAINING_VECTORS,
) -> None:
    """Train a FAISS index on the embeddings, fill it with them and write it to `path`.

    Args:
        embeddings: arrays of shape [rows, dimension], one a segment.
        settings: which index.
        path: the file to write.
        progress: told of the vectors done.
        training_vectors: on how many vectors it is trained at most.

    Raises:
        SettingsError: FAISS refuses the factory string, or cannot train it on these vectors.
        OSError: the file cannot be written.
    """
    _trim()
    total = sum(len(part) for part in embeddings)
    factory = settings.factory_for(total, embeddings[0].shape[1])
    index = _new_index(embeddings[0].shape[1], factory)
    try:
        if not index.is_trained:
            index.train(_sample(embeddings, min(total, training_vectors)))
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
        release(part)
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise OSError(errno.EIO, f"FAISS cannot write it: {reason}", str(path)) from error
    del index
    _trim()


def check_ann(settings: AnnSettings, dimension: int) -> None:
    """Refuse settings that FAISS refuses, before anything is encoded.

    Raises:
        SettingsError: the factory string or the search parameters mean nothing to FAISS.
    """
    if factory := settings.factory_for(1_000_000, dimension):
        _set_search(_new_index(dimension, factory), settings.search)


def _new_index(dimension: int, factory: str) -> Any:
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
        if isinstance(core := _core(index), faiss.IndexHNSW):
            core.hnsw.efConstruction = 200
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise SettingsError(
            f"FAISS refuses the factory string {factory!r} for {dimension} components: {reason}"
        ) from error
    return index


def _core(index: Any) -> Any:
    """Return the index that searches, below what transforms its vectors or refines its hits."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _core(index.index)
    return _core(index.base_index) if isinstance(index, faiss.IndexRefine) else index


def _set_defaults(index: Any) -> None:
    """Set parameters of the search with which little is lost; FAISS's own are for speed alone."""
    outer, core = faiss.downcast_index(index), _core(index)
    if isinstance(outer, faiss.IndexRefine):
        outer.k_factor = 4
    if isinstance(core, faiss.IndexHNSW):
        core.hnsw.efSearch = 128
    elif isinstance(core, faiss.IndexIVF):
        core.nprobe = max(8, core.nlist // 16)


def _set_search(index: Any, search: str) -> None:
    try:
        faiss.ParameterSpace().set_index_parameters(index, search)
    except RuntimeError as error:
        raise SettingsError(f"FAISS refuses the search parameters {search!r}") from error


def knn(vectors: Vectors, part: Vectors, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Search exactly: scores and rows, best first, each of shape [queries, k]."""
    scores, rows = faiss.knn(vectors, part, k, metric=faiss.METRIC_INNER_PRODUCT)
    return scores, rows.astype(np.int64)


def _sample(embeddings: Sequence[Vectors], wanted: int) -> Vectors:
    """Return vectors drawn at random, of each segment its share."""
    random, total = np.random.default_rng(0), sum(len(part) for part in embeddings)
    parts = []
    for part in embeddings:
        rows = random.permutation(len(part))[: -(-wanted * len(part) // total)]
        parts.append(part[np.sort(rows)])
        release(part)
    return np.ascontiguousarray(np.concatenate(parts))


def release(part: Vectors) -> None:
    """Give back the memory that a mapped file took while it was read."""
    file: Any = part.base
    if isinstance(file, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        file.madvise(mmap.MADV_DONTNEED)


def _trim() -> None:
    """Give freed memory back where glibc would keep it: FAISS's lists are many small blocks."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)


def bytes_a_vector(factory: str, dimension: int) -> int:
    """Return about how many bytes an index of this factory string takes for each vector."""
    index = _new_index(dimension, factory)  # the core below lives as long as it does
    outer, core = faiss.downcast_index(index), _core(index)
    whole = 4 * dimension if isinstance(outer, faiss.IndexRefine) else 0
    try:
        if isinstance(core, faiss.IndexHNSW):
            neighbours = int(core.hnsw.nb_neighbors(0))
            return whole + int(core.storage.sa_code_size()) + 4 * (neighbours + 8)
        code = int(core.sa_code_size())
    except RuntimeError:  # not every kind tells
        return whole + 4 * dimension
    return whole + code + (8 if isinstance(core, faiss.IndexIVF) else 0)


def training_needed(factory: str, dimension: int) -> int:
    """Return on how many vectors an index of this factory string is to be trained at least."""
    index = _new_index(dimension, factory)
    core = _core(index)
    if isinstance(core, faiss.IndexIVF):
        return 39 * int(core.nlist)  # FAISS's own limit, below which it warns
    return 0 if index.is_trained else 10_000


class Ann:
    """A FAISS index over the first `size` rows."""

    def __init__(self, path: Path, search: str) -> None:
        try:
            self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise IndexStateError(
                f"{path}: FAISS cannot read it. Build the index again."
            ) from error
        self.size = int(self._index.ntotal)
        self.set_search(search)

    def set_search(self, search: str) -> None:
        """Set FAISS's parameters of the search; what they do not name gets its default.

        Raises:
            SettingsError: FAISS refuses them.
        """
        _set_defaults(self._index)
        _set_search(self._index, search)

    def effort(self) -> tuple[str, int, float] | None:
        """Return the parameter that trades time for recall, its most, and the vectors a unit reads.

        None where every vector is compared.
        """
        core = _core(self._index)
        if isinstance(core, faiss.IndexHNSW):
            return "efSearch", 4096, 32.0  # an estimate: the neighbours of a visited vector
        if isinstance(core, faiss.IndexIVF):
            return "nprobe", int(core.nlist), self.size / core.nlist
        return None

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
        share = max(float(mask[: self.size].mean()), 1e-9)
        parameters = _filtering(index, selector, k, share)
        if parameters is None:
            return None
        return index.search(vectors, k, params=parameters)  # type: ignore[no-any-return]


def _filtering(index: Any, selector: Any, k: int, share: float) -> Any:
    """Return the parameters of a search among selected rows; None where there is no such search.

    It looks so much further as there are fewer of them: as many are found as without a filter.
    """
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _filtering(index.index, selector, k, share)
        return inner and faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        factor = index.k_factor
        inner = _filtering(index.base_index, selector, round(k * factor), share)
        return inner and faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=inner)
    if isinstance(index, faiss.IndexHNSW):
        ef = max(k, min(index.ntotal, round(index.hnsw.efSearch / share)))
        return faiss.SearchParametersHNSW(sel=selector, efSearch=ef)
    if isinstance(index, faiss.IndexIVF):
        nprobe = min(index.nlist, math.ceil(index.nprobe / share))
        return faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)
    if isinstance(index, faiss.IndexScalarQuantizer | faiss.IndexRaBitQ):
        return faiss.SearchParameters(sel=selector)
    return None
