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
def _keep_best(
    touched: Array, size: int, sums: Array, seen: Array, allowed: Array, rows: Array, scores: Array
) -> None:
    """Write the touched documents' best to `rows` and `scores`, best first, and reset sums."""
    k = len(rows)
    kept = 0
    for i in range(size):
        row = touched[i]
        score = sums[row]
        sums[row] = 0.0
        seen[row] = False
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
    for end in range(kept - 1, 0, -1):
        rows[0], rows[end] = rows[end], rows[0]
        scores[0], scores[end] = scores[end], scores[0]
        _sift(rows, scores, 0, end)


@njit(cache=True, nogil=True)
def search_segment(
    indptr: Array, postings: Array, counts: Array, norms: Array,
    query_terms: Array, query_weights: Array, query_indptr: Array, allowed: Array,
    bm25l: bool, k1: float, gain: float, delta: float,
    part: int, parts: int, out_rows: Array, out_scores: Array,
) -> None:  # fmt: skip
    """Score queries `part`, `part + parts`, … and write their best rows and scores.

    `norms` are 1 - b + b · length / average length, shape [documents]; `out_rows` and `out_scores`
    have shape [queries, k]; places without a hit keep row -1.
    """
    sums = np.zeros(len(norms))
    seen = np.zeros(len(norms), np.bool_)  # a sum can be 0: BM25 Okapi has negative weights
    touched = np.empty(len(norms), np.int32)
    for query in range(part, len(query_indptr) - 1, parts):
        size = 0
        for at in range(query_indptr[query], query_indptr[query + 1]):
            term, weight = query_terms[at], query_weights[at]
            for i in range(indptr[term], indptr[term + 1]):
                row = postings[i]
                frequency = float(counts[i])
                if bm25l:
                    c = frequency / norms[row] + delta
                    score = weight * frequency * gain * c / (k1 + c)
                else:
                    score = weight * gain * frequency / (frequency + k1 * norms[row])
                if not seen[row]:
                    seen[row] = True
                    touched[size] = row
                    size += 1
                sums[row] += score
        _keep_best(touched, size, sums, seen, allowed, out_rows[query], out_scores[query])
