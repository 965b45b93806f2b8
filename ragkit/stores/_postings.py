"""The compiled loops under BM25's search: weighing postings, scoring documents.

They release the interpreter lock, so that threads run them side by side, and they are compiled once
and cached on disk. Unsigned indices halve the time of the innermost ones: of signed ones it is
asked each time whether they count from the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from ._counting import fit

Array = Any  # numba's loops take arrays of several element types
Index = Any  # and indices of both signs

_BLOCK = 1 << 13  # documents that are scored at once: their sums stay in the cache
# Non-essential terms are added to all documents until those to come add less than this share of the
# least score of the k best: then few documents are left, and each is looked up in their postings.
_SHARE = 0.5
_ROUNDING = 1e-9  # of a score: more than what adding the parts of a sum in turn may lose


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
def _heapify(rows: Array, scores: Array, size: int) -> None:
    for start in range(size // 2 - 1, -1, -1):
        _sift(rows, scores, start, size)


@njit(cache=True, nogil=True)
def _keep_best(
    candidates: Array, size: int, base: int, start: int, sums: Array, floor: float, allowed: Array,
    kept: int, rows: Array, scores: Array,
) -> int:  # fmt: skip
    """Offer candidates to the best, a heap once it is full; return how many it holds."""
    k = len(rows)
    for i in range(size):
        if len(allowed) > 0 and not allowed[base + candidates[i]]:
            continue
        row, score = start + base + candidates[i], floor + sums[candidates[i]]
        if kept < k:
            rows[kept], scores[kept] = row, score
            kept += 1
            if kept == k:
                _heapify(rows, scores, k)
        elif _worse(scores[0], rows[0], score, row):
            rows[0], scores[0] = row, score
            _sift(rows, scores, 0, k)
    return kept


@njit(cache=True, nogil=True)
def weigh_postings(
    terms: Array, indptr: Array, postings: Array, counts: Array, scales: Array,
    bm25l: bool, k1: float, delta: float, impacts: Array, peaks: Array,
) -> bool:  # fmt: skip
    """Fill in the impacts of these terms' postings, once, and each term's greatest.

    Returns False at postings that do not `fit`, before anything is computed from them.

    An impact is what a term of weight 1 adds to the document. `scales` are
    k1 (1 - b + b · length / average length), shape [documents]; the peak of a term whose impacts
    are not filled in is below 0; a term that no document here holds is -1.
    """
    for term in terms:
        if term < 0 or peaks[term] >= 0:
            continue
        if not fit(indptr[term], indptr[term + 1], postings, len(scales)):
            return False
        peak = 0.0
        for i in range(indptr[term], indptr[term + 1]):
            frequency, scale = float(counts[i]), scales[postings[i]]
            if frequency < 1 or scale <= 0:
                return False
            if bm25l:
                c = frequency * k1 / scale + delta
                impact = frequency * c / (k1 + c)
            else:
                impact = frequency / (frequency + scale)
            if not impact < np.inf:
                return False
            impacts[i] = impact
            peak = max(peak, impact)
        peaks[term] = peak
    return True


@njit(cache=True, nogil=True)
def _add(
    weight: float, postings: Array, impacts: Array, at: Index, stop: int, base: int, sums: Array
) -> Index:
    """Add a term to the sums of the block's documents; return where its next block begins."""
    end = base + _BLOCK
    i = np.uint64(at)
    while i < np.uint64(stop) and postings[i] < end:
        sums[np.uint64(postings[i] - base)] += weight * impacts[i]
        i += np.uint64(1)
    return np.int64(i)


@njit(cache=True, nogil=True)
def _add_listed(
    weight: float, postings: Array, impacts: Array, at: Index, stop: int, base: int, sums: Array,
    touched: Array, size: Index,
) -> tuple[Index, Index]:  # fmt: skip
    """Do as `_add`, and list the documents that had no sum; return also how many are listed."""
    end = base + _BLOCK
    i, size = np.uint64(at), np.uint64(size)
    while i < np.uint64(stop) and postings[i] < end:
        row = np.uint64(postings[i] - base)
        known = sums[row] != -np.inf
        touched[size] = row
        size += np.uint64(not known)
        sums[row] = (sums[row] if known else 0.0) + weight * impacts[i]
        i += np.uint64(1)
    return np.int64(i), np.int64(size)


@njit(cache=True, nogil=True)
def _add_to_candidates(
    weight: float, postings: Array, impacts: Array, at: Index, stop: int, base: int, sums: Array,
    candidates: Array, size: int,
) -> Index:  # fmt: skip
    """Add a term to the sums of the candidates; return where its next block begins.

    What it does to other documents' sums does not matter.
    """
    if size == 0:
        return at
    at += np.searchsorted(postings[at:stop], base)
    end = at + np.searchsorted(postings[at:stop], base + _BLOCK)
    if 8 * size > end - at:
        return _add(weight, postings, impacts, at, end, base, sums)
    for i in range(size):
        row = base + candidates[i]
        place = at + np.searchsorted(postings[at:end], row)
        if place < end and postings[place] == row:
            sums[candidates[i]] += weight * impacts[place]
    return end


@njit(cache=True, nogil=True)
def _find(sums: Array, least: float, candidates: Array) -> int:
    """List the documents whose sum is above 0 and at least `least`; return how many they are."""
    size = 0
    for part in range(_BLOCK // 64):  # 64 are compared at once, and mostly none is
        some = 0
        for i in range(64):
            some += sums[64 * part + i] >= least
        if some:
            for i in range(64):
                total = sums[64 * part + i]
                candidates[size] = 64 * part + i
                size += total >= least and total > 0
    return size


@njit(cache=True, nogil=True)
def _drop(candidates: Array, size: int, sums: Array, least: float, left: Array) -> int:
    """List the candidates whose sum is at least `least`; return how many are left."""
    kept = 0
    for i in range(size):
        left[kept] = candidates[i]
        kept += sums[candidates[i]] >= least
    return kept


@njit(cache=True, nogil=True)
def _least(scores: Array, kept: int, floor: float) -> float:
    """Return what a document's terms must add up to, at least, to be one of the best."""
    if kept < len(scores):
        return -np.inf
    return float(scores[0] - floor - _ROUNDING * abs(scores[0]))


@njit(cache=True, nogil=True)
def search_segment(
    indptr: Array, postings: Array, impacts: Array, peaks: Array,
    query_terms: Array, query_weights: Array, query_indptr: Array, floors: Array, allowed: Array,
    documents: int, start: int, part: int, parts: int, all_rows: Array, all_scores: Array,
    all_kept: Array,
) -> None:  # fmt: skip
    """Score queries `part`, `part + parts`, … and offer a segment's documents to their best.

    A query's term that no document here holds is -1, and its floor is added to all scores. The
    segment's rows are counted from `start`.
    `all_rows` and `all_scores`, shape [queries, k], hold the best so far, `all_kept` of them, in
    heaps once they are k.
    """
    zeros, none = np.zeros(_BLOCK), np.full(_BLOCK, -np.inf)  # sums, as they are between blocks
    touched, candidates = np.empty(_BLOCK + 1, np.int32), np.empty(_BLOCK + 1, np.int32)
    for query in range(part, len(query_indptr) - 1, parts):
        begin, end = query_indptr[query], query_indptr[query + 1]
        order = begin + np.argsort(-query_weights[begin:end], kind="mergesort")
        order = order[query_terms[order] >= 0]
        if len(order) == 0:
            continue
        terms, weights = query_terms[order], query_weights[order]
        bounds = np.zeros(len(terms) + 1)  # the most that the terms from here on add
        for i in range(len(terms) - 1, -1, -1):
            bounds[i] = bounds[i + 1] + weights[i] * peaks[terms[i]]
        all_kept[query] = _search(
            postings, impacts, indptr[terms], indptr[terms + 1], weights, bounds, floors[query],
            allowed, documents, start, zeros, none, touched, candidates,
            all_rows[query], all_scores[query], all_kept[query],
        )  # fmt: skip


@njit(cache=True, nogil=True)
def _search(
    postings: Array, impacts: Array, at: Array, stop: Array, weights: Array, bounds: Array,
    floor: float, allowed: Array, documents: int, start: int, zeros: Array, none: Array,
    touched: Array, candidates: Array, rows: Array, scores: Array, kept: int,
) -> int:  # fmt: skip
    """Offer documents to one query's best; return how many it holds.

    Documents are scored in blocks, and in a block term after term in the order of falling weight.
    Documents that hold only the last terms are not looked for once they cannot reach the k best any
    more, and others are dropped when they cannot: MaxScore (Turtle and Flood, 1995), whose upper
    bounds (weight times peak) keep it exact. A weight that is not above 0, which BM25 Okapi may
    give, turns this off.
    """
    positive, lengths = weights[-1] > 0, stop - at
    # Of the terms, the first `needed` are essential: documents without them are not looked for.
    needed = summed = len(weights)
    for base in range(0, documents, _BLOCK):
        least = _least(scores, kept, floor)
        while positive and needed > 0 and bounds[needed - 1] < least:
            needed -= 1
        if needed == 0:
            break
        while summed > needed and bounds[summed - 1] < _SHARE * least:
            summed -= 1
        dense = positive and 4 * lengths[:needed].sum() > documents
        sums = zeros if dense else none
        met = 0
        for i in range(summed):
            if dense or i >= needed:
                at[i] = _add(weights[i], postings, impacts, at[i], stop[i], base, sums)
            else:
                at[i], met = _add_listed(
                    weights[i], postings, impacts, at[i], stop[i], base, sums, touched, met
                )
        if dense:
            size = _find(sums, least - bounds[summed], candidates)
        else:
            size = _drop(touched, met, sums, least - bounds[summed], candidates)
        for i in range(summed, len(weights)):
            at[i] = _add_to_candidates(
                weights[i], postings, impacts, at[i], stop[i], base, sums, candidates, size
            )
            size = _drop(candidates, size, sums, least - bounds[i + 1], candidates)
        kept = _keep_best(candidates, size, base, start, sums, floor, allowed, kept, rows, scores)
        if dense:
            sums[:] = 0.0
        for i in range(met):
            sums[touched[i]] = -np.inf
    return kept


@njit(cache=True, nogil=True)
def sort_best(all_rows: Array, all_scores: Array, all_kept: Array) -> None:
    """Sort the documents that `search_segment` kept, best first."""
    for query in range(len(all_kept)):
        rows, scores, kept = all_rows[query], all_scores[query], all_kept[query]
        if kept < len(rows):
            _heapify(rows, scores, kept)
        for end in range(kept - 1, 0, -1):
            rows[0], rows[end] = rows[end], rows[0]
            scores[0], scores[end] = scores[end], scores[0]
            _sift(rows, scores, 0, end)
