"""Segments as they are written: documents, then what each store holds of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..artefacts import file_hash, fingerprint
from ..types import Progress, quiet
from . import limits
from .analysis import Analyser
from .documents import DocumentStore, DocumentWriter
from .embeddings import DocumentEncoder, Vector, write_embeddings
from .folder import link, partial, segment_name, writing
from .postings import write_postings


class SegmentsWriter:
    """Writes documents into new segments of a staging place, the next one when one is full.

    Args:
        place: where they are staged.
        number: the first segment's number.
        size: the bytes of text of a segment, at most.
    """

    def __init__(self, place: Path, number: int = 1, size: int | None = None) -> None:
        self.folders: list[Path] = []
        self._size = size or limits.SEGMENT_BYTES
        self._place, self._number = place, number
        self._writer: DocumentWriter | None = None
        self._full = 0

    def __len__(self) -> int:
        return self._full + (len(self._writer) if self._writer else 0)

    def add(self, identifier: str, line: bytes) -> None:
        """Append a document, by its id and its `document_line`."""
        if self._writer is None or self._is_full(self._writer, len(line)):
            self.close()
            name = segment_name(self._number + len(self.folders))
            self.folders.append(self._place / name)
            self.folders[-1].mkdir()
            self._writer = DocumentWriter(self.folders[-1])
        self._writer.add(identifier, line)

    def _is_full(self, writer: DocumentWriter, more: int) -> bool:
        return len(writer) >= limits.SEGMENT_DOCUMENTS or writer.size + more > self._size

    def close(self) -> None:
        """Finish the last segment."""
        if self._writer:
            self._writer.close()
            self._full, self._writer = len(self), None


def write_bm25(folders: Sequence[Path], analyser: Analyser, progress: Progress) -> None:
    """Write the postings of staged segments.

    Args:
        folders: the segments, with their documents.
        analyser: makes terms of texts.
        progress: told of the documents done.
    """
    total = len(DocumentStore(folders))
    done = 0

    def texts(store: DocumentStore) -> Iterator[str]:
        nonlocal done
        for document in store:
            yield document.contents
            done += 1
            if done % 1000 == 0 or done == total:
                progress("BM25", done, total)

    for folder in folders:
        write_postings(folder / "bm25", texts(DocumentStore([folder])), analyser)


def write_vectors(
    path: Path,
    folders: Sequence[Path],
    encoder: DocumentEncoder,
    progress: Progress,
    known: Callable[[int], Vector | None] = lambda row: None,
) -> int:
    """Encode the documents of staged segments, but for what a call that was stopped has encoded.

    Args:
        path: the index folder, locked.
        folders: the segments, which get their `embeddings.npy`.
        encoder, progress, known: as in `write_dense`.
    """
    files = vector_files(path, folders, encoder)
    stores = [DocumentStore([folder]) for folder in folders]
    encoded = write_dense(stores, files, encoder, progress, known)
    link_vectors(path, folders, files)
    return encoded


def vector_files(path: Path, folders: Sequence[Path], encoder: DocumentEncoder) -> list[Path]:
    """Return where the vectors of staged segments are kept until they are all there.

    The name tells what the segment's documents are: the same documents find their vectors again.
    """
    vectors = partial(path, fingerprint(encoder.describe()["fingerprint"]))
    with writing(path):
        hashes = [file_hash(folder / "documents.jsonl") for folder in folders]
    return [vectors / f"{fingerprint(each)}.npy" for each in hashes]


def link_vectors(path: Path, folders: Sequence[Path], files: Sequence[Path]) -> None:
    """Give staged segments their finished vectors."""
    with writing(path):
        for folder, file in zip(folders, files, strict=True):
            link(file, folder / "embeddings.npy")


def write_segment(
    folder: Path, vectors: Path | None, analyser: Analyser | None, encoder: DocumentEncoder | None
) -> None:
    """Write what the stores hold of one staged segment, wherever its folder is shared.

    What an earlier call that was stopped has left is replaced, but for the vectors, which go on.

    Args:
        folder: the segment, with its documents.
        vectors: the file for its vectors, if any.
        analyser: makes BM25's terms, if there are to be any.
        encoder: gives the vectors.
    """
    if analyser:
        shutil.rmtree(folder / "bm25", ignore_errors=True)
        write_bm25([folder], analyser, quiet)
    if vectors and encoder:
        write_dense([DocumentStore([folder])], [vectors], encoder, quiet)


def write_dense(
    stores: Sequence[DocumentStore],
    files: Sequence[Path],
    encoder: DocumentEncoder,
    progress: Progress,
    known: Callable[[int], Vector | None] = lambda row: None,
) -> int:
    """Encode the documents of segments, a file each, and return how many were encoded.

    It goes on where an earlier call was stopped; see `write_embeddings`.

    Args:
        stores: the documents, a store a segment.
        files: where their embeddings go.
        encoder: gives the vectors.
        progress: told of the documents done.
        known: gives the vector of a row (counted over all stores) that needs no encoding.
    """
    total = sum(len(store) for store in stores)
    before = encoded = 0
    for store, file in zip(stores, files, strict=True):

        def texts(start: int, stop: int, store: DocumentStore = store) -> list[str]:
            return [store[row].contents for row in range(start, stop)]

        def report(done: int, before: int = before) -> None:
            progress("encode", before + done, total)

        def vector(row: int, before: int = before) -> Vector | None:
            return known(before + row)

        encoded += write_embeddings(file, encoder, texts, len(store), report, vector)
        before += len(store)
    return encoded


def segment_record(folder: Path) -> dict[str, Any]:
    """Return what the manifest keeps of a finished segment."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        "name": folder.name,
        "documents": len(DocumentStore([folder])),
        "files": {file.relative_to(folder).as_posix(): file_hash(file) for file in files},
    }
