"""The compiled loops under BM25's build: numbering words, counting terms, filling postings."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = Any  # numba's loops take arrays of several element types

IN_WORDS = np.zeros(256, np.bool_)
"""Which bytes are part of a word: ASCII's letters, digits and _, and all beyond ASCII."""
IN_WORDS[[*range(ord("0"), ord("9") + 1), *range(ord("a"), ord("z") + 1), ord("_")]] = True
IN_WORDS[128:] = True

_PRIME = np.uint64((1 << 31) - 1)


@njit(cache=True, nogil=True)
def number_words(
    text: Array, ends: Array, in_words: Array, key: np.uint64,
    slots: Array, known: Array, known_ends: Array,
) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
    """Number the words of texts; a new word gets the next number.

    The table has open addresses, and the hash is a polynomial of the bytes modulo 2³¹ - 1
    (Dietzfelbinger et al., 1992): who does not know the key cannot choose words that share one.

    Args:
        text: the texts' bytes, one after the other.
        ends: where each text ends in them.
        in_words: which bytes are part of a word, shape [256].
        key: the polynomial's variable, drawn from 2 … 2³¹ - 2.
        slots: the table: word numbers, -1 where none is; its size is a power of two.
        known: the bytes of the known words, one after the other.
        known_ends: where each known word ends in them.

    Returns:
        The numbers of all words; how many each text has; `slots`, `known` and `known_ends` with the
        new words.
    """
    numbers = np.empty(len(text) // 2 + len(ends) + 1, np.int32)  # words of two texts may touch
    counts = np.empty(len(ends), np.int64)
    words = len(known_ends)
    used = known_ends[words - 1] if words else 0
    found = at = 0
    for row in range(len(ends)):
        before, end = found, ends[row]
        while at < end:
            if not in_words[text[at]]:
                at += 1
                continue
            start = at
            while at < end and in_words[text[at]]:
                at += 1
            slot = _slot(key, text, start, at, slots, known, known_ends)
            number = slots[slot]
            if number < 0:
                number, size = words, at - start
                if used + size > len(known):
                    known = _longer(known, used + size)
                known[used : used + size] = text[start:at]
                used += size
                if words == len(known_ends):
                    known_ends = _longer(known_ends, words)
                known_ends[words] = used
                slots[slot] = words
                words += 1
                if 2 * words > len(slots):
                    slots = _rebuilt(2 * len(slots), key, known, known_ends[:words])
            numbers[found] = number
            found += 1
        counts[row] = found - before
    return numbers[:found], counts, slots, known, known_ends[:words]


@njit(cache=True, nogil=True)
def _slot(
    key: np.uint64, text: Array, start: int, end: int,
    slots: Array, known: Array, known_ends: Array,
) -> np.uint64:  # fmt: skip
    """Return the place in the table of a word, `text[start:end]`, or the free one for it."""
    hashed = np.uint64(1)
    for i in range(start, end):  # below 2³² all the time, so that the product fits in 64 bits
        hashed = hashed * key + np.uint64(text[i])
        hashed = (hashed & _PRIME) + (hashed >> np.uint64(31))
    last = np.uint64(len(slots) - 1)
    slot = hashed % _PRIME & last
    while slots[slot] >= 0:
        number = slots[slot]
        first = known_ends[number - 1] if number else 0
        size = known_ends[number] - first
        if size == end - start:
            same = 0
            while same < size and known[first + same] == text[start + same]:
                same += 1
            if same == size:
                break
        slot = (slot + np.uint64(1)) & last
    return slot


@njit(cache=True, nogil=True)
def _rebuilt(size: int, key: np.uint64, known: Array, known_ends: Array) -> Array:
    slots = np.full(size, -1, np.int32)
    start = 0
    for number in range(len(known_ends)):
        end = known_ends[number]
        slots[_slot(key, known, start, end, slots, known, known_ends)] = number
        start = end
    return slots


@njit(cache=True, nogil=True)
def _longer(array: Array, least: int) -> Array:
    """Return the array with room for `least` items and as many again."""
    longer = np.empty(2 * least + 16, array.dtype)
    longer[: len(array)] = array
    return longer


@njit(cache=True, nogil=True)
def number_terms(words: Array, counts: Array, term_of: Array) -> Array:
    """Return the words' terms but for those of -1, and make `counts` the texts' numbers of them."""
    terms = np.empty(len(words), np.int32)
    found = at = 0
    for row in range(len(counts)):
        before = found
        for _ in range(counts[row]):
            term = term_of[words[at]]
            at += 1
            terms[found] = term
            found += term >= 0
        counts[row] = found - before
    return terms[:found]


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

    Shape [0], if postings do not `fit`.
    """
    sizes = np.zeros(len(indptr) - 1, np.int64)
    for term in range(len(sizes)):
        if not fit(indptr[term], indptr[term + 1], postings, len(chosen)):
            return sizes[:0]
        for i in range(indptr[term], indptr[term + 1]):
            sizes[term] += chosen[postings[i]]
    return sizes


@njit(cache=True, nogil=True)
def fit(start: int, stop: int, postings: Array, documents: int) -> bool:
    """Tell whether there are such postings, of documents, in their order: files can be damaged, and
    nothing else would keep a loop from reading and writing beyond its arrays."""
    if not 0 <= start <= stop <= len(postings):
        return False
    fits, last = True, -1
    for i in range(start, stop):
        fits &= last < postings[i] < documents
        last = postings[i]
    return fits
