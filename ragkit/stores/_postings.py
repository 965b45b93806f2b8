"""The compiled loops under the BM25 store: counting terms, filling postings, scoring.

They release the interpreter lock, so that threads run them side by side, and they are compiled once
and cached on disk.
"""

from __future__ import annotations

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


@njit(cache=True, nogil=True)
def _score(
    weight: float, frequency: float, scale: float, bm25l: bool, k1: float, delta: float
) -> float:
    """Return what a term adds; `scale` is k1 (1 - b + b · length / average length)."""
    if bm25l:
        c = frequency * k1 / scale + delta
        return weight * frequency * c / (k1 + c)
    return weight * frequency / (frequency + scale)


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
def search_segment(
    indptr: Array, postings: Array, counts: Array, scales: Array,
    query_terms: Array, query_weights: Array, query_indptr: Array, allowed: Array,
    bm25l: bool, k1: float, delta: float,
    part: int, parts: int, out_rows: Array, out_scores: Array,
) -> None:  # fmt: skip
    """Score queries `part`, `part + parts`, … and write their best rows and scores.

    Terms are taken in the order of falling weight. Once a document that holds only the terms still
    to come cannot reach the k best any more (a term adds less than its weight, but in BM25L), no
    new document is taken in, and those that fell behind are dropped: the "continue" strategy of
    Moffat and Zobel, 1996, with bounds that keep it exact.

    `scales` are k1 (1 - b + b · length / average length), shape [documents]; a query's term that no
    document here holds is -1; `out_rows` and `out_scores` have shape [queries, k]; places without a
    hit keep row -1.
    """
    sums = np.full(len(scales), -np.inf)  # -inf is untouched: a sum can be 0 or below (BM25 Okapi)
    touched = np.empty(len(scales) + 1, np.int32)
    for query in range(part, len(query_indptr) - 1, parts):
        begin, end = query_indptr[query], query_indptr[query + 1]
        order = begin + np.argsort(-query_weights[begin:end], kind="mergesort")
        rows, scores = out_rows[query], out_scores[query]
        exhaustive = bm25l or (end > begin and query_weights[order[-1]] < 0)
        to_come = query_weights[begin:end].sum() * 1.000001  # a margin for rounding
        done, size, closed = 0.0, 0, False
        for at in order:
            term, weight = query_terms[at], query_weights[at]
            start, stop = (indptr[term], indptr[term + 1]) if term >= 0 else (0, 0)
            if not (exhaustive or closed) and to_come < done and len(rows) <= size < stop - start:
                full = _select(touched, size, sums, allowed, rows, scores) == len(rows)
                if full and to_come < scores[0]:
                    size, closed = _drop(touched, size, sums, scores[0] - to_come), True
            if closed and 16 * size < stop - start:
                for i in range(size):
                    row = touched[i]
                    place = start + np.searchsorted(postings[start:stop], row)
                    if place < stop and postings[place] == row:
                        frequency = float(counts[place])
                        sums[row] += _score(weight, frequency, scales[row], bm25l, k1, delta)
            else:
                for i in range(start, stop):
                    row = postings[i]
                    known = sums[row] > -np.inf
                    if closed and not known:
                        continue
                    score = _score(weight, float(counts[i]), scales[row], bm25l, k1, delta)
                    touched[size] = row
                    size += not known
                    sums[row] = sums[row] + score if known else score
            done += weight
            to_come -= weight
        _sort(rows, scores, _select(touched, size, sums, allowed, rows, scores))
        for i in range(size):
            sums[touched[i]] = -np.inf
