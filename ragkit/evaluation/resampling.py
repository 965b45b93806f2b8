"""Draws of questions, seeds and signs, shared by all columns of values over the same questions.

scipy's `bootstrap` and `permutation_test` draw again for each column, and gather its values for
each draw: eight columns of 10,000 questions take several times as long. Here questions are drawn
once, as a matrix of how often each was drawn, and the matrix is multiplied with all columns, on one
thread: products of few columns gain nothing by more, and on a busy machine wait for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import ThreadpoolController

from ..errors import DataError

Matrix = NDArray[np.float64]

ROUNDING = 1e-12
"""Differences below it, relative to the values, are the rounding of sums."""

_BATCH = 1 << 18  # numbers drawn at a time; larger batches leave the processor's cache


def finite(values: ArrayLike) -> Matrix:
    """Return values as an array.

    Raises:
        DataError: there are none, or one is NaN or infinite.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise DataError("there are no values to take a mean of")
    if not np.isfinite(data).all():
        place = int(np.flatnonzero(~np.isfinite(data))[0])
        raise DataError(f"value {place} of {data.size} is {data.flat[place]}, not a finite number")
    return data


def same_questions(values: Sequence[ArrayLike]) -> list[Matrix]:
    """Return values as matrices [seeds, questions] of equally many questions.

    Raises:
        DataError: as `finite` does, or numbers of questions differ.
    """
    matrices = [np.atleast_2d(finite(matrix)) for matrix in values]
    if len(sizes := sorted({matrix.shape[1] for matrix in matrices})) != 1:
        raise DataError(f"values of the same questions are needed, found {sizes} of them")
    return matrices


def drawn_means(columns: Matrix, resamples: int, random: np.random.Generator) -> Matrix:
    """Return the columns' means [resamples, columns] over questions drawn with replacement."""
    n = len(columns)
    means = np.empty((resamples, columns.shape[1]))
    rows = max(1, _BATCH // n)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = random.integers(0, n, size=(size, n))
        drawn += n * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        means[start : start + size] = _product(counts, columns) / n
    alike = columns.min(axis=0) == columns.max(axis=0)
    means[:, alike] = columns[0, alike]
    return means


def drawn_seeds(matrix: Matrix, resamples: int, random: np.random.Generator) -> Matrix:
    """Return by how much drawing seeds again moves the mean, `resamples` times."""
    seeds = len(matrix)
    means = matrix.mean(axis=1)
    if means.min() == means.max():
        return np.zeros(resamples)
    deviations = (means - means.mean()) * math.sqrt(seeds / (seeds - 1))
    return np.asarray(deviations[random.integers(0, seeds, size=(resamples, seeds))].mean(axis=1))


def sign_flips(columns: Matrix, resamples: int, random: np.random.Generator) -> Matrix:
    """Return the columns' two-sided p values under flips of their values' signs.

    All 2^n flips are tried where they are at most `resamples`; else so many are drawn, and what
    was observed counts as one more.
    """
    n = len(columns)
    exact = n < resamples.bit_length()  # 2^n <= resamples
    total = 2**n if exact else resamples
    sums = columns.sum(axis=0)
    least = np.abs(sums) - ROUNDING * np.abs(columns).sum(axis=0)
    extreme = np.zeros(columns.shape[1], dtype=np.int64)
    rows = max(1, _BATCH // n)
    flipped: NDArray[Any]
    for start in range(0, total, rows):
        size = min(rows, total - start)
        if exact:
            flipped = np.arange(start, start + size)[:, None] >> np.arange(n) & 1
        else:
            bits = random.integers(0, 256, size=(size, -(-n // 8)), dtype=np.uint8)
            flipped = np.unpackbits(bits, axis=1, count=n)
        extreme += (np.abs(sums - 2 * _product(flipped, columns)) >= least).sum(axis=0)
    return extreme / total if exact else (1 + extreme) / (1 + total)


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def _product(weights: NDArray[Any], columns: Matrix) -> Matrix:
    with _libraries().limit(limits=1, user_api="blas"):
        return weights.astype(np.float64) @ columns
