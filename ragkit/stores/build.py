"""Building an index: everything is staged, then committed."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..artefacts import file_hash, fingerprint
from ..errors import DataError, SettingsError
from ..types import Document, Progress
from .analysis import Analyser
from .ann import TRAINING_VECTORS, build_ann, check_ann
from .ann_settings import AnnSettings
from .bm25 import Bm25Settings
from .documents import DocumentStore, document_line
from .embeddings import DocumentEncoder
from .folder import ann_name, check_folder, commit, segment_name, staging, writing
from .limits import Memory
from .manifest import FORMAT, wrong
from .recall import tune
from .segments import (
    SegmentsWriter,
    link_vectors,
    segment_record,
    vector_files,
    write_bm25,
    write_vectors,
)

STORES = ("bm25", "dense")


class Spread(Protocol):
    """Writes what the stores hold of staged segments in other processes, on other machines."""

    def __call__(
        self,
        folders: Sequence[Path],
        vectors: Sequence[Path],
        analyser: Analyser | None,
        progress: Progress,
    ) -> None:
        """Call `write_segment` for each segment; it may be called again where one was stopped.

        Args:
            folders: the segments, with their documents.
            vectors: the files for their vectors, a file each; none without a dense store.
            analyser: for BM25, if there is that store.
            progress: told of the segments done.
        """
        ...


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
    spread: Spread | None,
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
        "segments": [{"name": segment_name(1), "documents": 1, "files": {}}],
    }
    if "bm25" in stores:
        analyser = analyser or Analyser()
        manifest["analyser"] = analyser.to_json()
        manifest["bm25"] = asdict(bm25 or Bm25Settings())
    if dense_encoder:
        manifest["encoder"] = dict(dense_encoder.describe())
        manifest["ann"] = asdict(ann) | {"file": None}
    if found := wrong(manifest):
        raise DataError(f"what the index would tell of itself cannot be read again: its {found}")
    with staging(path, replace) as place:
        folders = _write_documents(path, place, documents, memory, progress)
        if dense_encoder:
            memory.check_ann(ann, len(DocumentStore(folders)), dense_encoder.dimension)
        if analyser and "bm25" in stores and not spread:
            with writing(path):
                write_bm25(folders, analyser, progress)
        if spread:
            files = vector_files(path, folders, dense_encoder) if dense_encoder else []
            spread(folders, files, analyser if "bm25" in stores else None, progress)
            link_vectors(path, folders[: len(files)], files)
        elif dense_encoder:
            write_vectors(path, folders, dense_encoder, progress)
        with writing(path):
            if dense_encoder:
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


def _write_documents(
    path: Path, place: Path, documents: Iterable[Document], memory: Memory, progress: Progress
) -> list[Path]:
    writer = SegmentsWriter(place, size=memory.segment_bytes)
    seen: set[str] = set()
    for document in documents:
        if document.id in seen:
            raise DataError(f"two documents have the id {document.id!r}; ids must be unique")
        seen.add(document.id)
        line = document_line(document)
        with writing(path):
            writer.add(document.id, line)
        if len(seen) % 1000 == 0:
            progress("read documents", len(seen), None)
    if not seen:
        raise DataError("there are no documents to index")
    with writing(path):
        writer.close()
    progress("read documents", len(seen), len(seen))
    return writer.folders


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


def publish(path: Path, place: Path, manifest: dict[str, Any]) -> None:
    """Seal a manifest with its checksum, and commit what is staged for it."""
    manifest["checksum"] = fingerprint(manifest)
    ann = manifest.get("ann", {}).get("file")
    live = {segment["name"] for segment in manifest["segments"]} | ({ann} if ann else set())
    commit(path, place, manifest, live)
