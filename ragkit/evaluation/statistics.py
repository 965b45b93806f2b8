"""Means and differences, with the intervals and tests that say how far to trust them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap, norm

from ..errors import DataError, SettingsError
from .resampling import (
    ROUNDING,
    Matrix,
    drawn_means,
    drawn_seeds,
    finite,
    same_questions,
    sign_flips,
)

ALPHA = 0.05
"""The chance of a false alarm that tests accept."""

POWER = 0.8
"""How often a difference of the size of `Difference.detectable` would be found."""

_BATCH_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `n` questions and the interval from `low` to `high` that holds it."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_mean(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Estimate a mean with its percentile bootstrap interval (Efron 1979).

    Questions are what is drawn again, so the interval speaks about other questions of the same
    kind, for this same system. 10,000 values x 10,000 resamples take under a second and 30 MB.

    Args:
        values: one value per question.
        level: the share of such intervals that would hold the true mean, between 0 and 1.
        resamples: how many times to draw.
        seed: equal seeds and values give equal intervals.

    Raises:
        DataError: there are no values, or one is NaN or infinite.
        SettingsError: `level` or `resamples` is out of its range.
    """
    _check_options(level, resamples)
    data = finite(values)
    if data.min() == data.max():
        return Estimate(float(data[0]), float(data[0]), float(data[0]), data.size)
    interval = bootstrap(
        (data,),
        np.mean,
        vectorized=True,
        method="percentile",
        confidence_level=level,
        n_resamples=resamples,
        batch=max(1, _BATCH_BYTES // (2 * data.nbytes)),
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(float(data.mean()), float(interval.low), float(interval.high), data.size)


def bootstrap_means(
    values: Sequence[ArrayLike], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> list[Estimate]:
    """Estimate the means of several columns over the same questions, each of one or more seeds.

    Questions and seeds are both drawn again, independently, and what they move the mean by is
    added. Seeds are few, and draws of S of them vary too little by (S - 1) / S: their deviations
    are widened by the root of its inverse (Rao and Wu 1988). Where most of the spread is between
    seeds, intervals of 95 % hold the mean in 86 % (2 seeds), 92 % (3) and 94 % (5). With one seed
    this is the percentile bootstrap over questions.

    Args:
        values: matrices [seeds, questions], all of the same questions; seeds may differ in number.
        level, resamples, seed: as in `bootstrap_mean`.

    Raises:
        DataError: there are no values, one is NaN or infinite, or numbers of questions differ.
        SettingsError: `level` or `resamples` is out of its range.
    """
    _check_options(level, resamples)
    matrices = same_questions(values)
    random = np.random.default_rng(seed)
    columns = np.column_stack([matrix.mean(axis=0) for matrix in matrices])
    drawn = drawn_means(columns, resamples, random)
    for place, matrix in enumerate(matrices):
        drawn[:, place] += drawn_seeds(matrix, resamples, random)
    low, high = _interval(drawn, level)
    return [
        Estimate(_mean(column), float(low[place]), float(high[place]), column.size)
        for place, column in enumerate(columns.T)
    ]


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Estimate a ratio of sums over questions, such as precision, with its percentile interval.

    Questions are drawn again with both of their values. Draws whose denominators are all 0 have no
    ratio, and are left out. `n` counts the questions with a positive denominator.

    Args:
        numerators: one value per question.
        denominators: one value per question, not negative.
        level, resamples, seed: as in `bootstrap_mean`.

    Raises:
        DataError: the denominators' sum is 0, one is negative, their number is not that of the
            numerators, or a value is NaN or infinite.
        SettingsError: `level` or `resamples` is out of its range.
    """
    _check_options(level, resamples)
    above, below = same_questions([numerators, denominators])
    if below.min() < 0:
        raise DataError(f"a denominator is {below.min()}; a ratio of sums needs 0 or more")
    if below.sum() == 0:
        raise DataError(f"the denominators of all {below.size} questions are 0: there is no ratio")
    drawn = drawn_means(np.vstack([above, below]).T, resamples, np.random.default_rng(seed))
    drawn = drawn[drawn[:, 1] > 0]
    ratio = float(above.sum() / below.sum())
    low, high = _interval(drawn[:, 0] / drawn[:, 1], level) if len(drawn) else (ratio, ratio)
    return Estimate(ratio, float(low), float(high), int(np.count_nonzero(below)))


@dataclass(frozen=True, slots=True)
class Difference:
    """How B differs from A over `n` questions that both answered.

    Attributes:
        mean: the mean of B - A.
        low, high: the interval that holds it.
        bootstrap_p: of the hypothesis that it is 0, by the interval's draws: at most 1 - level
            where the interval leaves 0 out.
        permutation_p: of the hypothesis that A and B are exchangeable in each question.
        wins, ties, losses: the questions where B is above A, equal, below.
        n: how many questions there are.
        detectable: the true difference that a test of these questions finds four times in five,
            (z[1 - ALPHA / 2] + z[POWER]) sd / sqrt(n); None where all questions differ alike.
    """

    mean: float
    low: float
    high: float
    bootstrap_p: float
    permutation_p: float
    wins: int
    ties: int
    losses: int
    n: int
    detectable: float | None


def paired_differences(
    pairs: Sequence[tuple[ArrayLike, ArrayLike]],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Difference]:
    """Compare pairs (A, B) of values, question by question, all over the same questions.

    Each question's mean over seeds is what is compared. The interval draws questions, and the
    seeds of A and of B, again (see `bootstrap_means`). The permutation test flips the signs of
    questions' differences (Fisher 1935): all of the 2^n ways where they are no more than
    `resamples`, else that many at random. It draws no seeds: its p speaks of these seeds' means.
    A p value by draws counts what was observed as one draw more, so that it is never 0 (Davison
    and Hinkley 1997, section 4.2). Two equal runs have difference 0, interval [0, 0] and p = 1.

    Eight measures of 10,000 questions x 10,000 resamples take about 2 seconds and 60 MB.

    Args:
        pairs: matrices [seeds, questions] of A and of B, with as many seeds as each has; a pair
            for each measure, say.
        level, resamples, seed: as in `bootstrap_mean`.

    Raises:
        DataError: there are fewer than 2 questions, numbers of questions differ, or a value is NaN
            or infinite.
        SettingsError: `level` or `resamples` is out of its range.
    """
    _check_options(level, resamples)
    matrices = same_questions([matrix for pair in pairs for matrix in pair])
    if matrices[0].shape[1] < 2:
        raise DataError("a paired comparison needs at least 2 questions")
    columns = np.column_stack(
        [_differences(a, b) for a, b in zip(matrices[::2], matrices[1::2], strict=True)]
    )
    random = np.random.default_rng(seed)
    drawn = drawn_means(columns, resamples, random)
    for place in range(len(pairs)):
        drawn[:, place] += drawn_seeds(matrices[2 * place + 1], resamples, random)
        drawn[:, place] -= drawn_seeds(matrices[2 * place], resamples, random)
    low, high = _interval(drawn, level)
    zero = ROUNDING * np.abs(columns).max(axis=0)
    tail = np.minimum((drawn <= zero).sum(axis=0), (drawn >= -zero).sum(axis=0))
    bootstrap_p = np.minimum(1.0, 2 * (1 + tail) / (1 + resamples))
    permutation_p = sign_flips(columns, resamples, random)
    return [
        Difference(
            _mean(column),
            float(low[place]),
            float(high[place]),
            float(bootstrap_p[place]),
            float(permutation_p[place]),
            int((column > 0).sum()),
            int((column == 0).sum()),
            int((column < 0).sum()),
            column.size,
            _detectable(column),
        )
        for place, column in enumerate(columns.T)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p values of a family of tests by Holm's step-down method (Holm 1979).

    The i-th smallest of m is multiplied by m - i + 1, is at least as large as the one before it,
    and at most 1. Rejecting what is at most alpha keeps the chance of any false alarm below alpha,
    however the tests depend on each other.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def _check_options(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise SettingsError(f"the level of an interval lies between 0 and 1, not at {level}")
    if resamples < 1:
        raise SettingsError(f"at least 1 resample is needed, not {resamples}")


def _mean(values: Matrix) -> float:
    """Return the mean; of equal values exactly what they are."""
    return float(values[0] if values.min() == values.max() else values.mean())


def _differences(a: Matrix, b: Matrix) -> Matrix:
    difference = b.mean(axis=0) - a.mean(axis=0)
    size = max(np.abs(a).max(), np.abs(b).max())
    return np.where(np.abs(difference) <= ROUNDING * size, 0.0, difference)


def _detectable(column: Matrix) -> float | None:
    if column.min() == column.max():
        return None
    error = float(column.std(ddof=1)) / math.sqrt(column.size)
    return float(norm.ppf(1 - ALPHA / 2) + norm.ppf(POWER)) * error


def _interval(drawn: Matrix, level: float) -> Matrix:
    return np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
