"""Embedding files: float32 arrays, one a segment, written window by window, mapped when read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import IndexStateError, ModelError

Vectors: TypeAlias = NDArray[np.float32]

_WINDOW = 16_384  # documents encoded between two writes: long enough to sort by length


class DocumentEncoder(Protocol):
    """What a build needs of an encoder; `ragkit.models.BiEncoder` is one."""

    @property
    def dimension(self) -> int:
        """The vectors' number of components."""
        ...

    def encode_documents(
        self, texts: Sequence[str], *, progress: Callable[[int], None] = ...
    ) -> Vectors:
        """Return the texts' vectors, shape [texts, dimension]."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Return name, settings and `fingerprint`, as the manifest keeps them."""
        ...


def open_embeddings(path: Path, rows: int) -> Vectors:
    """Map a segment's embeddings into memory.

    Raises:
        IndexStateError: they are not float32 of shape [rows, dimension].
    """
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise IndexStateError(
            f"{path}: cannot be read ({error}). Build the index again."
        ) from error
    if array.dtype != np.float32 or array.ndim != 2 or len(array) != rows:
        raise IndexStateError(
            f"{path}: {array.dtype} of shape {array.shape}, expected float32 with {rows} rows. "
            "Build the index again."
        )
    return array  # type: ignore[no-any-return]


def write_embeddings(
    path: Path,
    encoder: DocumentEncoder,
    texts: Callable[[int, int], list[str]],
    rows: int,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Encode texts window by window into a float32 .npy of shape [rows, dimension].

    Args:
        path: the file to write.
        encoder: gives the vectors.
        texts: returns the texts of rows `start` to `stop`.
        rows: how many rows there are.
        progress: told how many rows are done.

    Raises:
        ModelError: the encoder gave vectors of another shape, or with NaN or an infinity.
    """
    shape = (rows, encoder.dimension)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, rows, _WINDOW):
        stop = min(start + _WINDOW, rows)

        def report(done: int, start: int = start) -> None:
            progress(start + done)

        vectors = encoder.encode_documents(texts(start, stop), progress=report)
        if vectors.shape != (stop - start, encoder.dimension):
            raise ModelError(
                f"the encoder gave vectors of shape {vectors.shape} for {stop - start} documents, "
                f"expected {(stop - start, encoder.dimension)}"
            )
        if not np.isfinite(vectors).all():
            row = start + int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise ModelError(f"the encoder gave NaN or an infinity for the document in row {row}")
        out[start:stop] = vectors
    out.flush()
