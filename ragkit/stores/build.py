"""Building an index folder: stage everything, then move it into place and rename the manifest."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..artefacts import file_hash, fingerprint, write_json
from ..errors import DataError, SettingsError
from ..types import Document, Progress
from .analysis import Analyser
from .bm25 import Bm25Settings, write_postings
from .dense import AnnSettings, build_ann, check_ann
from .documents import DocumentStore, DocumentWriter
from .embeddings import DocumentEncoder, write_embeddings

FORMAT = 1
SEGMENT_DOCUMENTS = 100_000
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
    progress: Progress,
) -> None:
    """Build an index folder; arguments and errors are those of `Index.build`."""
    check_build(path, stores, replace)
    if "dense" in stores and encoder is None:
        raise SettingsError("the dense store needs an encoder")
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
    with _staging(path) as staging:
        folders = _write_documents(staging, documents, progress)
        if "bm25" in stores:
            analyser = analyser or Analyser()
            _write_bm25(folders, analyser, progress)
            manifest["analyser"] = analyser.to_json()
            manifest["bm25"] = asdict(bm25 or Bm25Settings())
        if dense_encoder:
            manifest["encoder"] = dict(dense_encoder.describe())
            manifest["ann"] = asdict(ann) | {"file": None}
            _write_dense(folders, dense_encoder, progress)
            _write_ann(staging, folders, ann, manifest, progress)
        _commit(path, staging, folders, manifest)


def check_build(path: Path, stores: Sequence[str], replace: bool) -> None:
    """Refuse a build that cannot end well, before any work is done.

    Raises:
        SettingsError: an unknown store, or an index in the way.
    """
    unknown = [store for store in stores if store not in STORES]
    if unknown or not stores:
        named = ", ".join(unknown) or "nothing"
        raise SettingsError(f"stores are {' and '.join(STORES)}; asked for: {named}")
    if (path / "manifest.json").exists():
        if not replace:
            raise SettingsError(
                f"{path}: there is an index here already. Choose another folder, or pass --replace."
            )
    elif path.exists() and (not path.is_dir() or _foreign(path)):
        raise SettingsError(f"{path} exists and is not an index. Choose another folder.")


def _foreign(path: Path) -> list[str]:
    """Name what lies in a folder and is no remainder of an interrupted build."""
    return [child.name for child in path.iterdir() if child.name not in ("segments", "ann")]


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """Yield a folder for a build's files, removed at the end whatever happens."""
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    staging = path / "segments" / f".new-{secrets.token_hex(4)}"
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in [path / "segments", *created]:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _write_documents(
    staging: Path, documents: Iterable[Document], progress: Progress
) -> list[Path]:
    folders: list[Path] = []
    writer: DocumentWriter | None = None
    seen: set[str] = set()
    for document in documents:
        if document.id in seen:
            raise DataError(f"two documents have the id {document.id!r}; ids must be unique")
        seen.add(document.id)
        if writer is None or len(writer) == SEGMENT_DOCUMENTS:
            if writer:
                writer.close()
            folders.append(staging / f"{len(folders) + 1:06d}-{secrets.token_hex(3)}")
            folders[-1].mkdir()
            writer = DocumentWriter(folders[-1])
        writer.add(document)
        if len(seen) % 1000 == 0:
            progress("read documents", len(seen), None)
    if writer is None:
        raise DataError("there are no documents to index")
    writer.close()
    progress("read documents", len(seen), len(seen))
    return folders


def _write_bm25(folders: Sequence[Path], analyser: Analyser, progress: Progress) -> None:
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


def _write_dense(folders: Sequence[Path], encoder: DocumentEncoder, progress: Progress) -> None:
    total = len(DocumentStore(folders))
    before = 0
    for folder in folders:
        store = DocumentStore([folder])

        def texts(start: int, stop: int, store: DocumentStore = store) -> list[str]:
            return [store[row].contents for row in range(start, stop)]

        def report(done: int, before: int = before) -> None:
            progress("encode", before + done, total)

        write_embeddings(folder / "embeddings.npy", encoder, texts, len(store), report)
        before += len(store)


def _write_ann(
    staging: Path,
    folders: Sequence[Path],
    settings: AnnSettings,
    manifest: dict[str, Any],
    progress: Progress,
) -> None:
    factory = settings.factory_for(len(DocumentStore(folders)))
    if not factory:
        return
    arrays = [np.load(folder / "embeddings.npy", mmap_mode="r") for folder in folders]
    name = f"{secrets.token_hex(6)}.faiss"
    build_ann(arrays, settings, staging / name, lambda done, total: progress(factory, done, total))
    manifest["ann"] |= {"file": name, "hash": file_hash(staging / name), "built": factory}


def _commit(path: Path, staging: Path, folders: Sequence[Path], manifest: dict[str, Any]) -> None:
    """Move a build's files to their places, then replace the manifest, then drop the old files."""
    manifest["segments"] = [
        {
            "name": folder.name,
            "documents": len(DocumentStore([folder])),
            "files": {
                file.relative_to(folder).as_posix(): file_hash(file)
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            },
        }
        for folder in folders
    ]
    for folder in folders:
        folder.replace(path / "segments" / folder.name)
    ann = manifest.get("ann")
    if ann and ann["file"]:
        (path / "ann").mkdir(exist_ok=True)
        (staging / ann["file"]).replace(path / "ann" / ann["file"])
    manifest["checksum"] = fingerprint(manifest)
    write_json(path / "manifest.json", manifest)
    live = {folder.name for folder in folders} | {ann["file"] if ann else None, staging.name}
    for leftover in [*(path / "segments").iterdir(), *(path / "ann").glob("*")]:
        if leftover.name not in live:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
