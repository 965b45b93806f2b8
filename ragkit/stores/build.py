"""Building an index: everything is staged, then committed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..artefacts import file_hash, fingerprint
from ..errors import DataError, SettingsError
from ..types import Document, Progress
from . import limits
from .analysis import Analyser
from .ann import build_ann, check_ann
from .ann_settings import AnnSettings
from .bm25 import Bm25Settings
from .documents import DocumentStore, DocumentWriter, document_line
from .embeddings import DocumentEncoder, Vector, write_embeddings
from .folder import (
    ann_name,
    check_folder,
    commit,
    link,
    partial,
    segment_name,
    staging,
    writing,
)
from .limits import SEGMENT_BYTES, TRAINING_VECTORS, Memory
from .manifest import FORMAT
from .postings import write_postings
from .recall import tune

STORES = ("bm25", "dense")


def build_index(
    path: Path,
    documents: Iterable[Document],
    encoder: DocumentEncoder | None,
    stores: Sequence[str],
    analyser: Analyser | None,
    bm25: Bm25Settings | None,
    ann: AnnSettings | None,
    replace: bool,
    settings: Mapping[str, Any] | None,
    max_memory: int | None,
    progress: Progress,
) -> None:
    """Build an index folder; arguments and errors are those of `Index.build`."""
    check_build(path, stores, replace)
    if "dense" in stores and encoder is None:
        raise SettingsError("the dense store needs an encoder")
    memory = Memory(max_memory)
    dense_encoder = encoder if "dense" in stores else None
    ann = ann or AnnSettings()
    if dense_encoder:
        check_ann(ann, dense_encoder.dimension)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "ragkit": version("ragkit"),
        "settings": dict(settings or {}),
        "deleted": [],
    }
    with staging(path, replace) as place:
        folders = _write_documents(place, documents, memory, progress)
        if dense_encoder:
            memory.check_ann(ann, len(DocumentStore(folders)), dense_encoder.dimension)
        if "bm25" in stores:
            analyser = analyser or Analyser()
            write_bm25(folders, analyser, progress)
            manifest["analyser"] = analyser.to_json()
            manifest["bm25"] = asdict(bm25 or Bm25Settings())
        if dense_encoder:
            manifest["encoder"] = dict(dense_encoder.describe())
            write_vectors(path, folders, dense_encoder, progress)
            write_ann(place, folders, ann, manifest, progress, memory.training_vectors)
        manifest["segments"] = [segment_record(folder) for folder in folders]
        publish(path, place, manifest)


def check_build(path: Path, stores: Sequence[str], replace: bool) -> None:
    """Refuse a build that cannot end well, before any work is done.

    Raises:
        SettingsError: an unknown store, or an index in the way.
    """
    unknown = [store for store in stores if store not in STORES]
    if unknown or not stores:
        named = ", ".join(unknown) or "nothing"
        raise SettingsError(f"stores are {' and '.join(STORES)}; asked for: {named}")
    check_folder(path, replace)


class SegmentsWriter:
    """Writes documents into new segments of a staging place, the next one when one is full.

    Args:
        place: where they are staged.
        number: the first segment's number.
        size: the bytes of text of a segment, at most.
    """

    def __init__(self, place: Path, number: int = 1, size: int = SEGMENT_BYTES) -> None:
        self.folders: list[Path] = []
        self._size = size
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


def _write_documents(
    place: Path, documents: Iterable[Document], memory: Memory, progress: Progress
) -> list[Path]:
    writer = SegmentsWriter(place, size=memory.segment_bytes)
    seen: set[str] = set()
    for document in documents:
        if document.id in seen:
            raise DataError(f"two documents have the id {document.id!r}; ids must be unique")
        seen.add(document.id)
        writer.add(document.id, document_line(document))
        if len(seen) % 1000 == 0:
            progress("read documents", len(seen), None)
    if not seen:
        raise DataError("there are no documents to index")
    writer.close()
    progress("read documents", len(seen), len(seen))
    return writer.folders


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

    Vectors are kept by what the segment's documents are: the same documents find them again.

    Args:
        path: the index folder, locked.
        folders: the segments, which get their `embeddings.npy`.
        encoder, progress, known: as in `write_dense`.
    """
    vectors = partial(path, fingerprint(encoder.describe()["fingerprint"]))
    with writing(path):
        hashes = [file_hash(folder / "documents.jsonl") for folder in folders]
    files = [vectors / f"{fingerprint(each)}.npy" for each in hashes]
    stores = [DocumentStore([folder]) for folder in folders]
    encoded = write_dense(stores, files, encoder, progress, known)
    with writing(path):
        for folder, file in zip(folders, files, strict=True):
            link(file, folder / "embeddings.npy")
    return encoded


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


def write_ann(
    place: Path,
    folders: Sequence[Path],
    settings: AnnSettings,
    manifest: dict[str, Any],
    progress: Progress,
    training_vectors: int = TRAINING_VECTORS,
) -> None:
    """Build the approximate index over staged segments, if one is asked for, and name it.

    Args:
        place: where it is staged.
        folders: the segments, with their embeddings.
        settings: which index.
        manifest: gets `ann`: the settings, and the index's file, hash, factory string, number of
            vectors, and the search that it was tuned to.
        progress: told of the vectors done.
        training_vectors: as in `build_ann`.
    """
    manifest["ann"] = asdict(settings) | {"file": None}
    arrays = [np.load(folder / "embeddings.npy", mmap_mode="r") for folder in folders]
    covers = sum(len(array) for array in arrays)
    factory = settings.factory_for(covers, arrays[0].shape[1])
    if not factory:
        return
    name = ann_name()

    told = functools.partial(progress, factory)
    build_ann(arrays, settings, place / name, told, training_vectors)
    manifest["ann"] |= {"file": name, "hash": file_hash(place / name), "built": factory}
    manifest["ann"]["covers"] = covers
    if settings.recall_wanted():
        manifest["ann"]["tuned"] = asdict(tune(arrays, place / name, settings, factory, progress))


def segment_record(folder: Path) -> dict[str, Any]:
    """Return what the manifest keeps of a finished segment."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        "name": folder.name,
        "documents": len(DocumentStore([folder])),
        "files": {file.relative_to(folder).as_posix(): file_hash(file) for file in files},
    }


def publish(path: Path, place: Path, manifest: dict[str, Any]) -> None:
    """Seal a manifest with its checksum, and commit what is staged for it."""
    manifest["checksum"] = fingerprint(manifest)
    ann = manifest.get("ann", {}).get("file")
    live = {segment["name"] for segment in manifest["segments"]} | ({ann} if ann else set())
    commit(path, place, manifest, live)
