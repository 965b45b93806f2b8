"""Deleted rows: how the manifest keeps them, and the numbers of the rows that are live."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]


class Live:
    """The live rows of segments, numbered 0 … n-1 over the segments in order.

    A segment is never changed, so its files hold deleted rows too. Stores take and give the numbers
    of live rows alone, as if the others had never been.

    Args:
        sizes: the segments' numbers of rows.
        deleted: the deleted rows of each segment, ascending; empty if there are none at all.
    """

    def __init__(self, sizes: Sequence[int], deleted: Sequence[Rows] = ()) -> None:
        self.sizes = list(sizes)
        self.deleted = list(deleted) or [np.empty(0, np.int64) for _ in sizes]
        self._kept = [
            np.delete(np.arange(size, dtype=np.int64), rows) if len(rows) else None
            for size, rows in zip(self.sizes, self.deleted, strict=True)
        ]
        self._alive = [
            None if kept is None else _mask(size, kept)
            for size, kept in zip(self.sizes, self._kept, strict=True)
        ]
        counts = [size - len(rows) for size, rows in zip(self.sizes, self.deleted, strict=True)]
        self.starts: list[int] = [0, *np.cumsum(counts, dtype=int).tolist()]
        self.held: list[int] = [0, *np.cumsum(self.sizes, dtype=int).tolist()]

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def whole(self) -> bool:
        """Whether no row is deleted."""
        return self.starts == self.held

    def count(self, place: int) -> int:
        """Return how many rows of a segment are live."""
        return self.starts[place + 1] - self.starts[place]

    def rows(self, place: int) -> Sequence[int]:
        """Return the live rows of a segment, numbered within it."""
        kept = self._kept[place]
        return range(self.sizes[place]) if kept is None else kept.tolist()

    def within(self, place: int, number: int) -> int:
        """Return the row within a segment of the live row of this number, which lies in it."""
        kept, row = self._kept[place], number - self.starts[place]
        return row if kept is None else int(kept[row])

    def locate(self, numbers: Rows) -> tuple[Rows, Rows]:
        """Return the segments of live rows, and the rows within them."""
        places = np.searchsorted(self.starts, numbers, side="right") - 1
        rows = numbers - np.asarray(self.starts, np.int64)[places]
        for place in np.unique(places):
            if (kept := self._kept[place]) is not None:
                rows[places == place] = kept[rows[places == place]]
        return places, rows

    def number(self, place: int, rows: Rows) -> Rows:
        """Return the numbers of live rows of a segment."""
        kept = self._kept[place]
        return (rows if kept is None else np.searchsorted(kept, rows)) + self.starts[place]

    def allowed(self, place: int, mask: Mask | None) -> Mask | None:
        """Return which rows of a segment may be hits; None where all may.

        Args:
            place: the segment.
            mask: which live rows may be hits, by number; None is all.
        """
        if mask is None:
            return self._alive[place]
        kept, passing = self._kept[place], mask[self.starts[place] : self.starts[place + 1]]
        return passing if kept is None else _mask(self.sizes[place], kept[passing])

    def allowed_anywhere(self, mask: Mask | None) -> Mask | None:
        """Return which rows of all segments, one after another, may be hits; None where all may."""
        if self.whole:
            return mask
        return self._live if mask is None else np.concatenate(self._parts(mask))

    def number_anywhere(self, rows: Rows) -> Rows:
        """Return the numbers of live rows that are counted over all segments; -1 stays -1."""
        return rows if self.whole else np.where(rows < 0, -1, self._numbers[rows])

    @cached_property
    def _live(self) -> Mask:
        return np.concatenate(self._parts(None))

    @cached_property
    def _numbers(self) -> Rows:
        return np.cumsum(self._live, dtype=np.int64) - 1

    def _parts(self, mask: Mask | None) -> list[Mask]:
        parts = [self.allowed(place, mask) for place in range(len(self.sizes))]
        return [
            np.ones(size, np.bool_) if part is None else part
            for size, part in zip(self.sizes, parts, strict=True)
        ]


def _mask(size: int, rows: Rows) -> Mask:
    mask = np.zeros(size, np.bool_)
    mask[rows] = True
    return mask


def deleted_records(names: Sequence[str], live: Live) -> list[dict[str, Any]]:
    """Return the deleted rows as the manifest keeps them: a bit a row, of segments that have any.

    Compressed, they take some tens of bytes where few rows are deleted, and at most a sixth of a
    byte for each row of the segment.

    Args:
        names: the segments' names.
        live: their rows.
    """
    records = []
    for name, size, rows in zip(names, live.sizes, live.deleted, strict=True):
        if len(rows):
            bits = np.packbits(_mask(size, rows), bitorder="little")
            packed = zlib.compress(bits.tobytes(), 9)
            text = base64.b64encode(packed).decode("ascii")
            records.append({"segment": name, "rows": len(rows), "bits": text})
    return records


def live_rows(manifest: Mapping[str, Any]) -> Live:
    """Return the live rows that a manifest tells of.

    Raises:
        KeyError: as TypeError and ValueError, what it tells is no such thing.
    """
    segments = manifest["segments"]
    sizes = {segment["name"]: int(segment["documents"]) for segment in segments}
    deleted = {name: np.empty(0, np.int64) for name in sizes}
    for record in manifest.get("deleted", ()):
        size = sizes[record["segment"]]
        try:
            packed = zlib.decompress(base64.b64decode(record["bits"], validate=True))
        except zlib.error as error:
            raise ValueError(str(error)) from error
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
        rows = np.flatnonzero(bits)
        if len(rows) != record["rows"] or (len(rows) and rows[-1] >= size):
            raise ValueError(f"{record['segment']}: not {record['rows']} deleted rows of {size}")
        deleted[record["segment"]] = rows
    return Live(list(sizes.values()), list(deleted.values()))
