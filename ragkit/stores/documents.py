"""The document store: one JSON line a document, found by row or by id, filtered by metadata."""

from __future__ import annotations

import json
import logging
import mmap
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artefacts import to_json
from ..errors import DataError, IndexStateError, SettingsError
from ..types import Document, Where
from .live import Live, Rows

log = logging.getLogger(__name__)

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
    "in": lambda value, operand: value in operand,
}

_DECODER = json.JSONDecoder()
_MASK_BYTES = 1 << 27  # of filters' masks that a store remembers


def matches(where: Where, document: Document) -> bool:
    """Tell whether a document passes a metadata filter. Every store filters by this function.

    `where` maps fields to conditions, and all must hold. A field is a key of the metadata, or `id`
    or `title`. A condition is a value (equal to it), a list (equal to one of them), or a mapping
    of operators: `eq ne gt gte lt lte in exists`, e.g. `{"year": {"gte": 1990, "lt": 2000}}`.
    Where the document's value is a list, one of its items must pass. A missing field passes
    only `ne` and `{"exists": false}`; values that cannot be compared do not pass.

    Raises:
        SettingsError: an unknown operator.
    """
    return all(_passes(_field(document, field), condition) for field, condition in where.items())


def _field(document: Document, field: str) -> Any:
    if field == "id":
        return document.id
    if field == "title":
        return document.title
    return document.metadata.get(field)


def _passes(value: Any, condition: Any) -> bool:
    if isinstance(condition, Mapping):
        return all(_holds(value, name, operand) for name, operand in condition.items())
    if isinstance(condition, list | tuple):
        return _holds(value, "in", condition)
    return _holds(value, "eq", condition)


def _holds(value: Any, name: str, operand: Any) -> bool:
    if name == "exists":
        return (value is not None) == bool(operand)
    if name not in _COMPARE:
        known = ", ".join([*_COMPARE, "exists"])
        raise SettingsError(f"unknown filter operator {name!r}; known are {known}")
    if name == "in" and not isinstance(operand, list | tuple):
        raise SettingsError(f"the filter operator 'in' takes a list, not {operand!r}")
    if name == "ne":
        return not _holds(value, "eq", operand)
    if value is None:
        return False
    items = value if isinstance(value, list | tuple) else (value,)
    try:
        return any(_COMPARE[name](item, operand) for item in items)
    except TypeError:
        return False


def check_document(document: Document) -> None:
    """Refuse a document that a file of documents could not hold either.

    Raises:
        DataError: id or text is empty or no string, the title no string, the metadata no mapping.
    """
    for name in ("id", "text", "title"):
        value = getattr(document, name)
        if not isinstance(value, str):
            raise DataError(f"document {document.id!r}: its {name} is {value!r}, not a string")
        if name != "title" and not value.strip():
            raise DataError(f"document {document.id!r}: its {name} is empty")
    if not isinstance(document.metadata, Mapping):
        raise DataError(f"document {document.id!r}: its metadata is {document.metadata!r}, no dict")


def document_line(document: Document) -> bytes:
    """Return the line of `documents.jsonl` that holds a document.

    Raises:
        DataError: as `check_document` does, or its text cannot be stored as UTF-8, or its metadata
            not as JSON.
    """
    check_document(document)
    quoted = json.encoder.encode_basestring
    try:  # to_json(document_record(document)), in a third of the time
        line = (
            f'{{"id": {quoted(document.id)}, "metadata": {to_json(dict(document.metadata))}, '
            f'"text": {quoted(document.text)}, "title": {quoted(document.title)}}}\n'
        )
        return line.encode("utf-8")
    except (UnicodeEncodeError, DataError) as error:
        raise DataError(f"document {document.id!r} cannot be stored: {error}") from error


class DocumentWriter:
    """Writes a segment's documents: `documents.jsonl`, `offsets.npy` (bytes) and `ids.json`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handle = (folder / "documents.jsonl").open("wb")
        self._offsets = [0]
        self._ids: list[str] = []

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def size(self) -> int:
        """The bytes written."""
        return self._offsets[-1]

    def add(self, identifier: str, line: bytes) -> None:
        """Append a document, by its id and its `document_line`."""
        self._handle.write(line)
        self._offsets.append(self._offsets[-1] + len(line))
        self._ids.append(identifier)

    def close(self) -> None:
        """Write the offsets and the ids beside the documents."""
        self._handle.close()
        np.save(self._folder / "offsets.npy", np.array(self._offsets, dtype=np.int64))
        (self._folder / "ids.json").write_text(json.dumps(self._ids), encoding="utf-8")


class _Segment:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Reading one number of a plain array costs a tenth of reading it of a memmap.
        offsets: NDArray[np.int64] = np.load(folder / "offsets.npy", mmap_mode="r")
        self.offsets = offsets.view(np.ndarray)
        self._bytes = _mapped(folder / "documents.jsonl")
        self._ids = _mapped(folder / "ids.json")
        if len(self._bytes) != self.offsets[-1]:
            raise IndexStateError(
                f"{folder / 'documents.jsonl'}: {len(self._bytes)} bytes, expected "
                f"{self.offsets[-1]}. The index is damaged: build it again."
            )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def line(self, row: int) -> bytes:
        return self._bytes[int(self.offsets[row]) : int(self.offsets[row + 1])]

    def __getitem__(self, row: int) -> Document:
        try:
            line = self.line(row).decode()
            record, end = _DECODER.raw_decode(line)  # json.loads takes twice the time
            if line[end:] != "\n":
                raise ValueError(f"more than a document: {line[end:][:40]!r}")
            return Document(record["id"], record["text"], record["title"], record["metadata"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise IndexStateError(
                f"{self.folder / 'documents.jsonl'}:{row + 1}: the line is damaged ({error}). "
                "Build the index again."
            ) from error

    def ids(self) -> list[str]:
        path = self.folder / "ids.json"
        try:
            ids: list[str] = json.loads(self._ids[:])
        except (ValueError, RecursionError) as error:
            raise IndexStateError(
                f"{path}: cannot be read ({error}). Build the index again."
            ) from error
        if not isinstance(ids, list) or {*map(type, ids)} != {str} or len(ids) != len(self):
            raise IndexStateError(f"{path}: not {len(self)} ids. Build the index again.")
        return ids


def _mapped(path: Path) -> bytes | mmap.mmap:
    with path.open("rb") as handle:
        empty = handle.seek(0, 2) == 0
        return b"" if empty else mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)


class DocumentStore:
    """All documents of an index, by row (0 … n-1 over its segments in order) and by id.

    Rows count live documents alone; `deleted` holds the others' rows within each segment.
    """

    def __init__(self, folders: Sequence[Path], deleted: Sequence[Rows] = ()) -> None:
        self._segments = [_Segment(folder) for folder in folders]
        self._live = Live([len(segment) for segment in self._segments], deleted)
        self._masks: dict[str, NDArray[np.bool_]] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __getitem__(self, row: int) -> Document:
        segment, within = self._found(row)
        return segment[within]

    def line(self, row: int) -> bytes:
        """Return the line that holds the document in this row."""
        segment, within = self._found(row)
        return segment.line(within)

    def _found(self, row: int) -> tuple[_Segment, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} documents")
        place = bisect_right(self._live.starts, row) - 1
        return self._segments[place], self._live.within(place, row)

    def __iter__(self) -> Iterator[Document]:
        for place, segment in enumerate(self._segments):
            for row in self._live.rows(place):
                yield segment[row]

    @cached_property
    def ids(self) -> list[str]:
        """Every document's id, by row."""
        found: list[str] = []
        for place, segment in enumerate(self._segments):
            ids, rows = segment.ids(), self._live.rows(place)
            found += ids if len(rows) == len(ids) else [ids[row] for row in rows]
        return found

    @cached_property
    def rows(self) -> dict[str, int]:
        """Every id's row."""
        return {id_: row for row, id_ in enumerate(self.ids)}

    @cached_property
    def _without_text(self) -> list[Document]:
        return [
            Document(d.id, "", d.title, d.metadata) for d in map(self.__getitem__, range(len(self)))
        ]

    def mask(self, where: Where) -> NDArray[np.bool_] | None:
        """Return which rows pass the filter, shape [documents]; None when `where` is empty."""
        if not where:
            return None
        key = to_json(dict(where))
        if key not in self._masks:
            passing = (matches(where, document) for document in self._without_text)
            if len(self._masks) >= max(1, min(1024, _MASK_BYTES // max(1, len(self)))):
                self._masks.pop(next(iter(self._masks)))
            self._masks[key] = np.fromiter(passing, dtype=bool, count=len(self))
            if not self._masks[key].any():
                self._warn_of_unknown_fields(where)
        return self._masks[key]

    def _warn_of_unknown_fields(self, where: Where) -> None:
        known = {"id", "title"}.union(*(document.metadata for document in self._without_text))
        if unknown := sorted(set(where) - known):
            log.warning(
                "No document passes the filter, and none has %s in its metadata.",
                ", ".join(map(repr, unknown)),
            )
