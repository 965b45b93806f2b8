"""Embedding files: float32 arrays, one a segment, written window by window, mapped when read."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..artefacts import read_json, to_json, write_json
from ..errors import DataError, IndexStateError, ModelError
from .folder import writing

Vectors: TypeAlias = NDArray[np.float32]
Vector: TypeAlias = NDArray[np.float32]

_WINDOW = 4_096  # documents encoded between two writes: enough to sort by length
_QUERY_SIDE = {"name", "query_prompt", "fingerprint"}
_TOLD = {"weights", "modules", "max_length", "document_prompt", "similarity", "dimension"}


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
        """Return name, settings and `fingerprint`, as the manifest keeps them.

        An encoder that encodes documents as another one does, and queries otherwise, tells that
        one's fingerprint as `base`.
        """
        ...


def may_search(built: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Tell whether an encoder's queries may be compared with an index's documents.

    They may if the encoder is the one that the index was built with, or has it as its `base`.

    Args:
        built: what `describe` gave of the index's encoder.
        given: what it gives of the other.
    """
    return built["fingerprint"] in (given["fingerprint"], given.get("base"))


def same_documents(built: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Tell whether two encoders, by what `describe` gave of them, encode documents alike.

    They do if one is the other's `base`, or both have the same; or if all that they tell is equal
    but name and query prompt, and they tell all that a document's vector depends on.
    """
    if _document_side(built) == _document_side(given):
        return True
    told = [{k: v for k, v in each.items() if k not in _QUERY_SIDE} for each in (built, given)]
    return told[0].keys() >= _TOLD and to_json(told[0]) == to_json(told[1])


def _document_side(described: Mapping[str, Any]) -> Any:
    return described.get("base") or described["fingerprint"]


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
    sound = array.dtype == np.float32 and array.ndim == 2 and array.flags.c_contiguous
    if not sound or len(array) != rows:
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
    known: Callable[[int], Vector | None] = lambda row: None,
) -> int:
    """Encode texts window by window into a float32 .npy of shape [rows, dimension].

    It goes on where an earlier call with these arguments was stopped: how many rows are safe on the
    disk is noted beside the file, as .json.

    Args:
        path: the file to write.
        encoder: gives the vectors.
        texts: returns the texts of rows `start` to `stop`.
        rows: how many rows there are.
        progress: told how many rows are done.
        known: returns the vector of a row that is not to be encoded; None of one that is.

    Returns:
        How many rows this call encoded.

    Raises:
        ModelError: the encoder gave vectors of another shape, or with NaN or an infinity.
        SettingsError: the file cannot be written.
    """
    shape, note = (rows, encoder.dimension), path.with_suffix(".json")
    header = _header(shape)
    done, encoded = _noted(note, path, header, shape), 0
    if not done:
        with writing(path):
            path.write_bytes(header)
    while done < rows:
        progress(done)
        window = range(done, min(done + _WINDOW, rows))
        vectors, fresh = _vectors(encoder, texts, window, known, progress)
        encoded += fresh
        with writing(path), path.open("r+b") as handle:
            handle.truncate(handle.seek(len(header) + done * 4 * encoder.dimension))
            handle.write(vectors.data)
            done += len(vectors)
            handle.flush()
            os.fsync(handle.fileno())
            write_json(note, {"shape": shape, "rows": done})
    progress(rows)
    return encoded


def copy_embeddings(
    path: Path, vectors: Callable[[NDArray[np.int64]], Vectors], rows: range
) -> None:
    """Write the vectors of rows, window by window, as a file of their own."""
    with path.open("wb") as handle:
        for start in range(rows.start, rows.stop, _WINDOW):
            block = vectors(np.arange(start, min(start + _WINDOW, rows.stop)))
            if start == rows.start:
                handle.write(_header((len(rows), block.shape[1])))
            handle.write(np.ascontiguousarray(block, np.float32).data)


def _header(shape: tuple[int, int]) -> bytes:
    header = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(np.float32))
    described = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


def _noted(note: Path, path: Path, header: bytes, shape: tuple[int, int]) -> int:
    """Return how many rows a call that was stopped has written for certain."""
    try:
        noted, size = read_json(note), path.stat().st_size
        rows = int(noted["rows"]) if noted["shape"] == list(shape) else 0
    except (DataError, OSError, KeyError, TypeError, ValueError):
        return 0
    return rows if 0 < rows <= shape[0] and size >= len(header) + rows * 4 * shape[1] else 0


def _vectors(
    encoder: DocumentEncoder,
    texts: Callable[[int, int], list[str]],
    window: range,
    known: Callable[[int], Vector | None],
    progress: Callable[[int], None],
) -> tuple[Vectors, int]:
    """Return the vectors of a window's rows, and how many of them were encoded."""
    given = {row: vector for row in window if (vector := known(row)) is not None}
    rows = [row for row in window if row not in given]
    found = texts(window.start, window.stop) if rows else []
    wanted = found if not given else [found[row - window.start] for row in rows]
    encoded = _encode(encoder, wanted, rows, progress) if rows else None
    if encoded is not None and not given:
        return encoded, len(rows)
    vectors = np.empty((len(window), encoder.dimension), np.float32)
    for row, vector in given.items():
        vectors[row - window.start] = vector
    if encoded is not None:
        vectors[np.array(rows) - window.start] = encoded
    return vectors, len(rows)


def _encode(
    encoder: DocumentEncoder,
    texts: list[str],
    rows: Sequence[int],
    progress: Callable[[int], None],
) -> Vectors:
    """Return the texts' vectors, once they are known to be sound."""
    vectors = encoder.encode_documents(texts, progress=lambda done: progress(rows[0] + done))
    if vectors.shape != (len(texts), encoder.dimension):
        raise ModelError(
            f"the encoder gave vectors of shape {vectors.shape} for {len(texts)} documents, "
            f"expected {(len(texts), encoder.dimension)}"
        )
    if not np.isfinite(vectors).all():
        row = rows[int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])]
        raise ModelError(f"the encoder gave NaN or an infinity for the document in row {row}")
    return np.ascontiguousarray(vectors, np.float32)
