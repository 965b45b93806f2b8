"""Which rows of an index came from which document: itself, or the pieces that it was split into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..splitting import parent_of, piece_of
from ..types import Document
from .documents import DocumentStore, document_line


class Origins:
    """The rows of an index by the id of the document that they came from."""

    def __init__(self, documents: DocumentStore) -> None:
        self.documents = documents
        self._families: dict[str, list[int]] = {}
        for row, identifier in enumerate(documents.ids):
            for base in _bases(identifier):
                self._families.setdefault(base, []).append(row)

    def rows(self, identifier: str) -> list[int]:
        """Return the rows of the document of this id, if there is one, and of all its pieces."""
        row = self.documents.rows.get(identifier)
        pieces = self._families.get(identifier, ())
        own = [piece for piece in pieces if _is_piece(self.documents[piece], identifier)]
        return own if row is None else [row, *own]

    def holds(self, document: Document, rows: Sequence[int]) -> bool:
        """Tell whether rows hold a document as it is given, whole or in pieces that cover it.

        How long pieces are is not looked at: those of an unchanged document stay as they are.
        """
        if len(rows) == 1 and self.documents[rows[0]].id == document.id:
            return self.documents.line(rows[0]) == document_line(document)
        pieces = {row: self.documents[row] for row in rows}
        if any(piece.id == document.id for piece in pieces.values()):
            return False
        base = document.metadata["start"] if parent_of(document) else 0
        reached = 0
        for row, piece in sorted(pieces.items(), key=lambda pair: _number(pair[1].id)):
            start, end = piece.metadata["start"] - base, piece.metadata["end"] - base
            missed = document.text[reached:start].strip()
            if start < 0 or missed or document.text[start:end] != piece.text:
                return False
            expected = piece_of(document, _number(piece.id), start, end)
            if document_line(expected) != self.documents.line(row):
                return False
            reached = end
        return not document.text[reached:].strip()


def _bases(identifier: str) -> Iterator[str]:
    """Yield the ids of documents that one of this id may have been split off."""
    while "#" in identifier:
        identifier, _, number = identifier.rpartition("#")
        if not (number.isascii() and number.isdigit() and len(number) < 10):
            return
        yield identifier


def _number(identifier: str) -> int:
    return int(identifier.rpartition("#")[2])


def _is_piece(document: Document, of: str) -> bool:
    parent = parent_of(document)  # of a piece's piece it is the first document
    return parent is not None and (of == parent or of.startswith(f"{parent}#"))
