"""Adding and deleting documents: new segments, deleted rows, and nothing built again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from ..errors import DataError, IndexStateError, SettingsError
from ..types import Document, Progress
from .analysis import Analyser
from .build import publish
from .compact import covered, next_number
from .dense import DenseStore
from .documents import check_document, document_line
from .embeddings import DocumentEncoder, Vector, same_documents
from .folder import changing, writing
from .live import Live, deleted_records
from .manifest import unsealed
from .origins import Origins
from .segments import SegmentsWriter, segment_record, write_bm25, write_vectors

if TYPE_CHECKING:
    from .index import Index

Split: TypeAlias = Callable[[Iterable[Document]], Iterable[Document]]


def whole(documents: Iterable[Document]) -> Iterable[Document]:
    """Return documents as they are: the `Split` that splits none."""
    return documents


@dataclass(frozen=True, slots=True)
class Grown:
    """What an addition, an update or a deletion did.

    Documents are counted as they were given, rows by their pieces.
    """

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    deleted: int = 0
    rows_written: int = 0
    rows_deleted: int = 0
    encoded: int = 0


def add_documents(
    index: Index,
    documents: Iterable[Document],
    encoder: DocumentEncoder | None,
    update: bool,
    split: Split,
    progress: Progress,
) -> Grown:
    """Add documents to an index; arguments and errors are those of `Index.add`."""
    _check_encoder(index, encoder)
    with changing(index.path, index.manifest) as place:
        changes = _Changes(index, update, split)
        writer = SegmentsWriter(place, next_number(index.manifest))
        for identifier, line in changes.lines(documents, progress):
            with writing(index.path):
                writer.add(identifier, line)
        changes.check()
        if not changes.written and not changes.dropped:
            return changes.grown(0)
        with writing(index.path):
            writer.close()
        encoded = _write_stores(index, writer.folders, encoder, changes.vector, progress)
        with writing(index.path):
            _publish(index, place, changes.dropped, writer.folders)
    return changes.grown(encoded)


def delete_documents(
    index: Index, ids: Iterable[str], missing: Literal["refuse", "skip"] = "refuse"
) -> Grown:
    """Delete documents and all pieces split off them, as `Index.delete` does.

    Args:
        index: where they are.
        ids: their ids, or those of pieces.
        missing: whether an id that the index does not hold is refused, with all others, or skipped.
    """
    with changing(index.path, index.manifest) as place:
        origins = Origins(index.documents)
        given = [ids] if isinstance(ids, str) else ids
        found = {identifier: origins.rows(identifier) for identifier in given}
        unknown = [identifier for identifier, rows in found.items() if not rows]
        if unknown and missing == "refuse":
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise DataError(
                f"{index.path}: no document has the id {', '.join(map(repr, unknown[:5]))}{more}. "
                "Nothing was deleted. Leave such ids out, or pass --missing skip."
            )
        rows = {row for rows in found.values() for row in rows}
        if rows:
            with writing(index.path):
                _publish(index, place, rows, [])
    return Grown(deleted=len(found) - len(unknown), rows_deleted=len(rows))


class _Changes:
    """What documents that are added change in an index, found while they are read."""

    def __init__(self, index: Index, update: bool, split: Split) -> None:
        self._index, self._update, self._split = index, update, split
        self._origins = Origins(index.documents)
        self._given: set[str] = set()
        self._vectors_of: dict[int, int] = {}  # new row -> row of a document with these contents
        self._kept: set[int] = set()
        self._counts = {"added": 0, "changed": 0, "unchanged": 0}
        self.written: dict[str, int] = {}  # id -> new row
        self.dropped: set[int] = set()

    def lines(
        self, documents: Iterable[Document], progress: Progress
    ) -> Iterator[tuple[str, bytes]]:
        """Yield the ids and lines that are to be written."""
        for document in documents:
            check_document(document)
            if document.id in self._given:
                raise _twice(document.id)
            self._given.add(document.id)
            rows = self._origins.rows(document.id)
            if rows and not self._update:
                raise DataError(
                    f"{self._index.path}: holds a document {document.id!r} already. Nothing was "
                    "added. To leave out what is there unchanged and replace what has changed: "
                    "ragkit-index update"
                )
            if rows and self._origins.holds(document, rows):
                self._counts["unchanged"] += 1
                self._kept |= set(rows)
            else:
                self._counts["changed" if rows else "added"] += 1
                yield from self._new(document, rows)
            if len(self._given) % 1000 == 0:
                progress("read documents", len(self._given), None)
        progress("read documents", len(self._given), len(self._given))
        if not self._given:
            raise DataError("there are no documents to add")

    def _new(self, document: Document, rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        stored = self._origins.documents
        old = {stored[row].id: row for row in rows}
        alike = {stored[row].contents: row for row in rows}
        dropped = set(rows)
        for piece in self._split((document,)):
            if piece.id in self.written:
                raise _twice(piece.id)
            line, row = document_line(piece), old.get(piece.id)
            if row is not None and stored.line(row) == line:
                dropped.discard(row)
                self._kept.add(row)
                continue
            if piece.contents in alike:
                self._vectors_of[len(self.written)] = alike[piece.contents]
            self.written[piece.id] = len(self.written)
            yield piece.id, line
        self.dropped |= dropped

    def check(self) -> None:
        """Refuse an id that a document and a piece of another one would both have.

        Raises:
            DataError: there is one.
        """
        stored = self._origins.documents
        old = {id_: row for id_ in self.written if (row := stored.rows.get(id_)) is not None}
        for row in [*(set(old.values()) - self.dropped), *(self._kept & self.dropped)]:
            raise _twice(stored.ids[row])

    @cached_property
    def _vectors(self) -> DenseStore:
        return DenseStore.open(self._index.folders, self._index.live)

    def vector(self, row: int) -> Vector | None:
        """Return the vector of a new row that the index holds already."""
        if row not in self._vectors_of:
            return None
        found: Vector = self._vectors.vectors(np.array([self._vectors_of[row]]))[0]
        return found

    def grown(self, encoded: int) -> Grown:
        """Return what was done."""
        rows = {"rows_written": len(self.written), "rows_deleted": len(self.dropped)}
        return Grown(**self._counts, **rows, encoded=encoded)


def _twice(identifier: str) -> DataError:
    return DataError(f"two documents have the id {identifier!r}; ids must be unique")


def _check_encoder(index: Index, encoder: DocumentEncoder | None) -> None:
    built = index.manifest.get("encoder")
    if built is None:
        return
    if encoder is None:
        raise SettingsError(f"{index.path}: its dense store needs the encoder {built['name']!r}")
    given = encoder.describe()
    if not same_documents(built, given):
        raise IndexStateError(
            f"{index.path}: built with the encoder {built['name']!r}; the vectors of "
            f"{given['name']!r} cannot be compared with its. Use the encoder it was built with, "
            "or first give the index the other one: "
            f"ragkit-index refresh --index {index.path} --encoder {given['name']}"
        )


def _write_stores(
    index: Index,
    folders: Sequence[Path],
    encoder: DocumentEncoder | None,
    known: Callable[[int], Vector | None],
    progress: Progress,
) -> int:
    """Write what the index's stores hold of staged segments; return how many were encoded."""
    if "bm25" in index.stores:
        with writing(index.path):
            write_bm25(folders, Analyser.from_json(index.manifest["analyser"]), progress)
    if "dense" not in index.stores or encoder is None:
        return 0
    return write_vectors(index.path, folders, encoder, progress, known)


def _publish(index: Index, place: Path, dropped: set[int], folders: Sequence[Path]) -> None:
    """Commit staged segments and the deletion of rows.

    A segment without a live row is left out, unless the approximate index counts its rows.

    Raises:
        SettingsError: no document would be left.
    """
    if not folders and len(dropped) == len(index):
        raise SettingsError(
            f"{index.path}: no document would be left, and an index holds one at least. Nothing "
            "was changed. Remove the folder, or build it again with --replace."
        )
    manifest = unsealed(index.manifest)
    live, covers = index.live, 0
    if manifest.get("ann", {}).get("file"):
        covers = covered(manifest)
        manifest["ann"] = manifest["ann"] | {"covers": covers}
    places, rows = live.locate(np.array(sorted(dropped), np.int64))
    deleted = [np.union1d(old, rows[places == n]) for n, old in enumerate(live.deleted)]
    kept = [
        n for n, size in enumerate(live.sizes) if len(deleted[n]) < size or live.held[n] < covers
    ]
    segments: list[dict[str, Any]] = [manifest["segments"][n] for n in kept]
    after = Live([live.sizes[n] for n in kept], [deleted[n] for n in kept])
    manifest["deleted"] = deleted_records([segment["name"] for segment in segments], after)
    manifest["segments"] = [*segments, *(segment_record(folder) for folder in folders)]
    publish(index.path, place, manifest)
