"""A segment's postings: written once, mapped into memory when they are read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import IndexStateError
from . import _counting
from .analysis import Analyser, Vocabulary
from .live import Rows

_FILES = ("indptr", "rows", "counts", "lengths")
_KINDS = ((np.int64,), (np.int32,), (np.int32, np.uint16), (np.int32,))


def write_postings(folder: Path, texts: Iterable[str], analyser: Analyser) -> None:
    """Write a segment's postings: `terms.json` and, as .npy, indptr, rows, counts, lengths.

    The postings of term t are `rows[indptr[t]:indptr[t+1]]` (ascending) with frequencies `counts`;
    `lengths` are the documents' numbers of terms.
    """
    vocabulary = Vocabulary(analyser)
    numbers, lengths = vocabulary.number(texts)
    terms = vocabulary.terms
    sizes = _counting.count_terms(numbers, lengths, len(terms))
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    rows, counts = _counting.fill_postings(numbers, lengths, indptr)
    if not counts.size or counts.max() < 1 << 16:
        counts = counts.astype(np.uint16)
    folder.mkdir()
    arrays = (indptr, rows, counts, lengths.astype(np.int32))
    for name, array in zip(_FILES, arrays, strict=True):
        np.save(folder / f"{name}.npy", array)
    (folder / "terms.json").write_text(json.dumps(terms), encoding="utf-8")


class Postings:
    """A segment's postings, mapped; what they tell of is live documents alone.

    Raises:
        IndexStateError: they do not fit together.
    """

    def __init__(self, folder: Path, deleted: Rows) -> None:
        arrays = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in _FILES)
        self.indptr, self.rows, self.counts, self.lengths = arrays
        terms = json.loads((folder / "terms.json").read_text(encoding="utf-8"))
        self.terms: dict[str, int] = {term: number for number, term in enumerate(terms)}
        self._folder = folder
        if not self._fit(len(terms)):
            raise self.damaged()
        self._deleted: NDArray[np.int64] | None = None
        self.length = int(self.lengths.sum(dtype=np.int64))
        if len(deleted):
            chosen = np.zeros(len(self.lengths), np.bool_)
            chosen[deleted] = True
            self._deleted = _counting.count_chosen(self.indptr, self.rows, chosen)
            if len(self._deleted) != len(terms):
                raise self.damaged()
            self.length -= int(self.lengths[deleted].sum(dtype=np.int64))

    def _fit(self, terms: int) -> bool:
        """Tell whether the arrays are of the kinds that are written, and of sizes that fit."""
        arrays = (self.indptr, self.rows, self.counts, self.lengths)
        return (
            all(
                array.ndim == 1 and array.dtype in kinds
                for array, kinds in zip(arrays, _KINDS, strict=True)
            )
            and len(self.indptr) == len(self.terms) + 1 == terms + 1
            and len(self.rows) == len(self.counts) == self.indptr[-1]
            and bool((self.lengths >= 0).all())
        )

    def damaged(self) -> IndexStateError:
        """Return the error that tells of postings that do not fit together."""
        return IndexStateError(
            f"{self._folder}: postings, terms and documents do not fit. Build the index again."
        )

    def frequency(self, term: str) -> int:
        """Return in how many live documents a term occurs."""
        number = self.terms.get(term)
        if number is None:
            return 0
        held = int(self.indptr[number + 1] - self.indptr[number])
        return held if self._deleted is None else held - int(self._deleted[number])

    def frequencies(self) -> NDArray[np.int64]:
        """Return every term's frequency, shape [terms]."""
        held: NDArray[np.int64] = np.diff(self.indptr)
        return held if self._deleted is None else held - self._deleted
