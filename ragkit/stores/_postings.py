"""The compiled loops under the BM25 store: counting terms, filling postings, scoring.

They release the interpreter lock, so that threads run them side by side, and they are compiled once
and cached on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any

import numpy as np
from numba import njit

Array = Any  # numba's loops take arrays of several element types


@njit(cache=True, nogil=True)
def count_terms(numbers: Array, lengths: Array, terms: int) -> Array:
    """Return in how many documents each term occurs, shape [terms]."""
    sizes = np.zeros(terms, np.int64)
    last = np.full(terms, -1, np.int64)
    position = 0
    for row in range(len(lengths)):
        for _ in range(lengths[row]):
            term = numbers[position]
            position += 1
            if last[term] != row:
                last[term] = row
                sizes[term] += 1
    return sizes


@njit(cache=True, nogil=True)
def fill_postings(numbers: Array, lengths: Array, indptr: Array) -> tuple[Array, Array]:
    """Return the postings' rows and frequencies, each of shape [postings]."""
    rows = np.empty(indptr[-1], np.int32)
    counts = np.zeros(indptr[-1], np.int32)
    ends = indptr[:-1].copy()
    position = 0
    for row in range(len(lengths)):
        for _ in range(lengths[row]):
            term = numbers[position]
            position += 1
            end = ends[term]
            if end > indptr[term] and rows[end - 1] == row:
                counts[end - 1] += 1
            else:
                rows[end] = row
                counts[end] = 1
                ends[term] = end + 1
    return rows, counts


@njit(cache=True, nogil=True)
def count_chosen(indptr: Array, postings: Array, chosen: Array) -> Array:
    """Return in how many of the chosen documents each term occurs, shape [terms].

    Shape [0], if a posting is of no document.
    """
    sizes = np.zeros(len(indptr) - 1, np.int64)
    for term in range(len(sizes)):
        if not _fits(indptr[term], indptr[term + 1], postings, len(chosen)):
            return sizes[:0]
        for i in range(indptr[term], indptr[term + 1]):
            sizes[term] += chosen[postings[i]]
    return sizes


@njit(cache=True, nogil=True)
def _fits(start: int, stop: int, postings: Array, documents: int) -> bool:
    """Tell whether there are such postings, and all of them are of documents: files can be damaged,
    and nothing else would keep a loop from reading and writing beyond its arrays."""
    if not 0 <= start <= stop <= len(postings):
        return False
    fits = True
    for i in range(start, stop):
        fits &= 0 <= postings[i] < documents
    return fits


@njit(cache=True, nogil=True)
def _worse(score: float, row: int, other_score: float, other_row: int) -> bool:
    return score < other_score or (score == other_score and row > other_row)


@njit(cache=True, nogil=True)
def _sift(rows: Array, scores: Array, start: int, size: int) -> None:
    """Restore a heap whose root is its worst hit."""
    row, score, place = rows[start], scores[start], start
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        right = child + 1
        if right < size and _worse(scores[right], rows[right], scores[child], rows[child]):
            child = right
        if not _worse(scores[child], rows[child], score, row):
            break
        rows[place], scores[place] = rows[child], scores[child]
        place = child
    rows[place], scores[place] = row, score


@njit(cache=True, nogil=True)
def _select(
    touched: Array, size: int, sums: Array, allowed: Array, rows: Array, scores: Array
) -> int:
    """Make `rows` and `scores` a heap of the touched documents' best; return how many it holds."""
    k, kept = len(rows), 0
    for i in range(size):
        row = touched[i]
        score = sums[row]
        if len(allowed) > 0 and not allowed[row]:
            continue
        if kept < k:
            rows[kept], scores[kept] = row, score
            kept += 1
            if kept == k:
                for start in range(k // 2 - 1, -1, -1):
                    _sift(rows, scores, start, k)
        elif _worse(scores[0], rows[0], score, row):
            rows[0], scores[0] = row, score
            _sift(rows, scores, 0, k)
    if kept < k:
        for start in range(kept // 2 - 1, -1, -1):
            _sift(rows, scores, start, kept)
    return kept


@njit(cache=True, nogil=True)
def _sort(rows: Array, scores: Array, size: int) -> None:
    """Turn a heap into a list, best first."""
    for end in range(size - 1, 0, -1):
        rows[0], rows[end] = rows[end], rows[0]
        scores[0], scores[end] = scores[end], scores[0]
        _sift(rows, scores, 0, end)


def pack_queries(
    weights: Sequence[Mapping[str, float]], terms: Mapping[str, int]
) -> tuple[Array, Array, Array]:
    """Return the queries' terms as numbers (-1: not in this segment), weights, and their places."""
    numbers: list[int] = []
    factors: list[float] = []
    indptr = [0]
    for weighted in weights:
        numbers.extend(map(terms.get, weighted, repeat(-1)))
        factors.extend(weighted.values())
        indptr.append(len(numbers))
    return np.array(numbers, np.int64), np.array(factors), np.array(indptr, np.int64)


@njit(cache=True, nogil=True)
def weigh_postings(
    terms: Array, indptr: Array, postings: Array, counts: Array, scales: Array,
    bm25l: bool, k1: float, delta: float, impacts: Array, peaks: Array,
) -> bool:  # fmt: skip
    """Fill in the impacts of these terms' postings, once, and each term's greatest.

    Returns False at a posting of no document, before anything is computed from it.

    An impact is what a term of weight 1 adds to the document. `scales` are
    k1 (1 - b + b · length / average length), shape [documents]; the peak of a term whose impacts
    are not filled in is below 0; a term that no document here holds is -1.
    """
    for term in terms:
        if term < 0 or peaks[term] >= 0:
            continue
        if not _fits(indptr[term], indptr[term + 1], postings, len(scales)):
            return False
        peak = 0.0
        for i in range(indptr[term], indptr[term + 1]):
            frequency, scale = float(counts[i]), scales[postings[i]]
            if bm25l:
                c = frequency * k1 / scale + delta
                impact = frequency * c / (k1 + c)
            else:
                impact = frequency / (frequency + scale)
            impacts[i] = impact
            peak = max(peak, impact)
        peaks[term] = peak
    return True


@njit(cache=True, nogil=True)
def _drop(touched: Array, size: int, sums: Array, least: float) -> int:
    """Forget the touched documents whose sum is below `least`; return how many are left."""
    kept = 0
    for i in range(size):
        row = touched[i]
        if sums[row] < least:
            sums[row] = -np.inf
        else:
            touched[kept] = row
            kept += 1
    return kept


@njit(cache=True, nogil=True)
def _look_up(
    weight: float, postings: Array, impacts: Array, touched: Array, size: int, sums: Array
) -> None:
    """Add a term to the sums of the touched documents that hold it, by binary search."""
    for i in range(size):
        row = touched[i]
        place = np.searchsorted(postings, row)
        if place < len(postings) and postings[place] == row:
            sums[row] += weight * impacts[place]


@njit(cache=True, nogil=True)
def _add(
    weight: float, postings: Array, impacts: Array,
    touched: Array, size: int, sums: Array, closed: bool,
) -> int:  # fmt: skip
    """Add a term to its documents' sums, to new ones unless closed; return how many are touched."""
    for i in range(len(postings)):
        row = postings[i]
        old = sums[row]
        known = old > -np.inf
        if closed and not known:
            continue
        touched[size] = row
        size += not known
        sums[row] = (old if known else 0.0) + weight * impacts[i]
    return size


@njit(cache=True, nogil=True)
def search_segment(
    indptr: Array, postings: Array, impacts: Array, peaks: Array,
    query_terms: Array, query_weights: Array, query_indptr: Array, allowed: Array,
    documents: int, part: int, parts: int, out_rows: Array, out_scores: Array,
) -> None:  # fmt: skip
    """Score queries `part`, `part + parts`, … and write their best rows and scores.

    Terms are taken in the order of falling weight. Once a document that holds only the terms still
    to come cannot reach the k best any more, no new document is taken in, and those that fell
    behind are dropped: the "continue" strategy of Moffat and Zobel, 1996, with bounds (weight times
    peak) that keep it exact. A negative weight, which BM25 Okapi may give, turns this off.

    A query's term that no document here holds is -1; `out_rows` and `out_scores` have shape
    [queries, k]; places without a hit keep row -1.
    """
    sums = np.full(documents, -np.inf)  # -inf is untouched: a sum can be 0 or below
    touched = np.empty(documents + 1, np.int32)
    for query in range(part, len(query_indptr) - 1, parts):
        begin, end = query_indptr[query], query_indptr[query + 1]
        order = begin + np.argsort(-query_weights[begin:end], kind="mergesort")
        rows, scores = out_rows[query], out_scores[query]
        done, to_come, size, closed, exhaustive = 0.0, 0.0, 0, False, False
        for at in order:
            exhaustive |= query_weights[at] < 0
            if query_terms[at] >= 0:
                to_come += query_weights[at] * peaks[query_terms[at]] * 1.000001  # for rounding
        for at in order:
            term, weight = query_terms[at], query_weights[at]
            if term < 0:
                continue
            start, stop = indptr[term], indptr[term + 1]
            if not exhaustive and to_come < done and len(rows) <= size < stop - start:
                full = _select(touched, size, sums, allowed, rows, scores) == len(rows)
                if full and to_come < scores[0]:
                    size, closed = _drop(touched, size, sums, scores[0] - to_come), True
            if closed and 32 * size < stop - start:
                _look_up(weight, postings[start:stop], impacts[start:stop], touched, size, sums)
            else:
                found, added = postings[start:stop], impacts[start:stop]
                size = _add(weight, found, added, touched, size, sums, closed)
            bound = weight * peaks[term] * 1.000001
            done += bound
            to_come -= bound
        _sort(rows, scores, _select(touched, size, sums, allowed, rows, scores))
        for i in range(size):
            sums[touched[i]] = -np.inf
