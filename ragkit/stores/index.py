"""The index folder: immutable segments and one manifest that names the live ones.

manifest.json                the only file that changes, replaced by write-then-rename; it names the
                             segments, and the documents in them that are deleted
segments/000001-ab12cd/      documents.jsonl offsets.npy ids.json · bm25/ · embeddings.npy
ann/000001-ab12cd.faiss      an approximate index over the segments, if one was asked for
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..artefacts import fingerprint, read_json
from ..errors import DataError, IndexStateError
from ..types import Document, Progress, Where, quiet
from .analysis import Analyser
from .ann_settings import AnnSettings, search_settings
from .bm25 import Bm25Settings, Bm25Store
from .build import STORES, Spread, build_index
from .check import check_index, live_files
from .compact import compact_index
from .dense import DenseStore
from .documents import DocumentStore, matches
from .embeddings import DocumentEncoder
from .folder import MANIFEST
from .grow import Split, add_documents, delete_documents, whole
from .live import live_rows
from .manifest import read_manifest
from .refresh import refresh_index

T = TypeVar("T")


class Index:
    """An index folder, open for reading: `Index.open` opens one, `Index.build` makes one.

    `add`, `delete` and `compact` change its documents, `refresh` gives it another encoder.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.live = live_rows(manifest)
        self.folders = [path / "segments" / segment["name"] for segment in manifest["segments"]]

    @classmethod
    def open(cls, path: str | Path) -> Index:
        """Open an index folder; its stores are mapped into memory when they are first used.

        What is mapped outlives a build that replaces the index.

        Raises:
            IndexStateError: there is no index at `path`, or it is of another format.
        """
        path = Path(path)
        manifest = read_manifest(path)
        try:
            return cls(path, manifest)
        except (KeyError, TypeError, ValueError, MemoryError) as error:
            raise IndexStateError(
                f"{path / MANIFEST}: its segments cannot be read. Build the index again."
            ) from error

    @classmethod
    def build(
        cls,
        path: str | Path,
        documents: Iterable[Document],
        *,
        encoder: DocumentEncoder | None = None,
        stores: Sequence[str] = STORES,
        analyser: Analyser | None = None,
        bm25: Bm25Settings | None = None,
        ann: AnnSettings | None = None,
        replace: bool = False,
        settings: Mapping[str, Any] | None = None,
        max_memory: int | None = None,
        spread: Spread | None = None,
        progress: Progress = quiet,
    ) -> Index:
        """Build an index; until its last step, the renaming of the manifest, `path` is as it was.

        All documents are read and checked before anything is encoded. Memory holds all ids, and one
        segment's terms or one window of vectors at a time.

        Args:
            path: the index folder.
            documents: read once; ids must be unique.
            encoder: for the dense store.
            stores: `bm25`, `dense` or both.
            analyser: for BM25; the English one if None.
            bm25: the default variant and parameters of searches.
            ann: the approximate index over the embeddings; none if None.
            replace: whether an index at `path` may be replaced.
            settings: kept in the manifest, for the record.
            max_memory: the bytes that the process may take in all; segments are made to fit.
            spread: writes segments elsewhere; here if None.
            progress: told of each stage.

        Raises:
            SettingsError: an unknown store, a dense store without encoder, an index in the way.
            DataError: no documents, a repeated id, a text that cannot be stored.
        """
        stated = (analyser, bm25, ann, replace, settings, max_memory, spread, progress)
        build_index(Path(path), documents, encoder, stores, *stated)
        return cls.open(path)

    def refresh(self, encoder: DocumentEncoder, *, progress: Progress = quiet) -> Index:
        """Give the index another encoder, or its first, and open the index that is then there.

        Documents and BM25 are kept as they are; an approximate index is built again as it was.
        Until the last step the old index is there; a refresh that is stopped goes on where it was.

        Raises:
            IndexStateError: damaged or replaced since it was opened, or another build is running.
            SettingsError: the folder cannot be written, or FAISS refuses the new dimension.
            ModelError: the encoder gives what is no vector.
        """
        refresh_index(self, encoder, progress)
        return Index.open(self.path)

    def add(
        self,
        documents: Iterable[Document],
        *,
        encoder: DocumentEncoder | None = None,
        update: bool = False,
        split: Split = whole,
        progress: Progress = quiet,
    ) -> Index:
        """Add documents, and open the index that is then there; nothing else is built again.

        What the index holds already, byte for byte, stays as it is, and only texts that its
        document had no vector of are encoded. Until the last step the old index is there.

        Args:
            documents: read once; ids must be unique.
            encoder: the one that the index was built with; for the dense store.
            update: whether a document may take the place of one of the same id, and of its pieces.
            split: gives the pieces of a document, as `ragkit.splitting.split` does.
            progress: told of each stage.

        Raises:
            DataError: an id that is there already, or as `build` does.
            IndexStateError: the index was built with another encoder, or as `refresh` does.
        """
        add_documents(self, documents, encoder, update, split, progress)
        return Index.open(self.path)

    def delete(self, ids: Iterable[str]) -> Index:
        """Delete documents, with all pieces split off them, and open the index that is then there.

        Raises:
            DataError: there is no document of such an id.
            SettingsError: no document would be left. Other errors are those of `refresh`.
        """
        delete_documents(self, ids)
        return Index.open(self.path)

    def compact(self, *, progress: Progress = quiet) -> Index:
        """Merge segments, without their deleted rows, and open the index that is then there.

        It is as one that was built of the same documents; nothing is encoded. Errors are those of
        `refresh`.
        """
        compact_index(self, progress)
        return Index.open(self.path)

    def __len__(self) -> int:
        return len(self.live)

    @cached_property
    def documents(self) -> DocumentStore:
        """The documents, by row and by id."""
        return self._opened(lambda: DocumentStore(self.folders, self.live.deleted))

    @cached_property
    def bm25(self) -> Bm25Store:
        """The BM25 store.

        Raises:
            IndexStateError: the index was built without one.
        """
        self._require("bm25", "analyser")

        def load() -> Bm25Store:
            analyser = Analyser.from_json(self.manifest["analyser"])
            settings = Bm25Settings(**self.manifest["bm25"])
            folders = [folder / "bm25" for folder in self.folders]
            return Bm25Store(folders, analyser, settings, live=self.live)

        return self._opened(load)

    @cached_property
    def dense(self) -> DenseStore:
        """The dense store.

        Raises:
            IndexStateError: the index was built without one.
        """
        self._require("dense", "encoder")

        def load() -> DenseStore:
            ann = self.manifest["ann"]
            file = self.path / "ann" / ann["file"] if ann["file"] else None
            found = (*search_settings(ann), ann.get("hash", "")) if file else ()
            return DenseStore.open(self.folders, self.live, file, *found)

        return self._opened(load)

    @property
    def stores(self) -> tuple[str, ...]:
        """Which of `bm25` and `dense` the index holds."""
        keys = zip(STORES, ("analyser", "encoder"), strict=True)
        return tuple(store for store, key in keys if key in self.manifest)

    def mask(self, where: Where) -> NDArray[np.bool_] | None:
        """Return which rows pass a metadata filter, shape [documents]; None where all do."""
        return self.documents.mask(where)

    def passing(self, where: Where) -> Iterator[Document]:
        """Yield the documents that pass a metadata filter, in the order of their rows."""
        mask, documents = self.mask(where), self.documents
        if mask is None:
            return iter(documents)
        return (documents[row] for row in np.flatnonzero(mask).tolist())

    def pieces(self, document: str, where: Where | None = None) -> list[Document]:
        """Return the document of this id, or the pieces that were split off it, or nothing.

        Those that do not pass the metadata filter are left out.
        """
        rows = self.documents.rows
        found: list[Document] = []
        if document in rows:
            found.append(self.documents[rows[document]])
        else:
            while (row := rows.get(f"{document}#{len(found) + 1}")) is not None:
                found.append(self.documents[row])
        return [each for each in found if matches(where or {}, each)]

    def documents_fingerprint(self) -> str:
        """Return one hash of the documents alone, whatever the stores over them."""
        kept, deleted = self.manifest["segments"], self.manifest.get("deleted", [])
        files = (each["files"]["documents.jsonl"] for each in kept)
        return self._opened(lambda: fingerprint([*files, *deleted]))

    def fingerprint(self) -> str:
        """Return one hash of all that the index holds."""
        return fingerprint(self.manifest)

    def check(self, progress: Progress = quiet) -> list[str]:
        """Compare every file with its checksum and every store with the documents.

        Returns:
            What is wrong, a message each; empty for a sound index.
        """
        return check_index(self, progress)

    def files(self) -> dict[str, str]:
        """Return the checksums of all live files, by their paths in the folder."""
        return self._opened(lambda: live_files(self.manifest))

    def size(self) -> int:
        """Return the bytes on disk of all live files."""
        return self._opened(lambda: sum((self.path / name).stat().st_size for name in self.files()))

    def _require(self, store: str, key: str) -> None:
        if key not in self.manifest:
            add = f", or add it: ragkit-index refresh --index {self.path} --encoder NAME"
            raise IndexStateError(
                f"{self.path}: built with the stores {', '.join(self.stores)}, not with {store}. "
                f"Build it again with --stores {','.join(STORES)}{add if store == 'dense' else '.'}"
            )

    def _opened(self, load: Callable[[], T]) -> T:
        try:
            return load()
        except Exception as error:  # a damaged file can make its reader raise anything
            if self._replaced():
                raise IndexStateError(
                    f"{self.path}: replaced since it was opened. Open it again."
                ) from error
            if isinstance(error, IndexStateError):
                raise
            raise IndexStateError(
                f"{self.path}: damaged ({error}). See `ragkit-index check --index {self.path}`."
            ) from error

    def _replaced(self) -> bool:
        try:
            return read_json(self.path / MANIFEST) != self.manifest
        except DataError:
            return False
