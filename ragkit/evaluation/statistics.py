"""Means with the intervals that say how far to trust them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

from ..errors import DataError, SettingsError

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
    if not 0 < level < 1:
        raise SettingsError(f"the level of an interval lies between 0 and 1, not at {level}")
    if resamples < 1:
        raise SettingsError(f"at least 1 resample is needed, not {resamples}")
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise DataError("there are no values to take a mean of")
    if not np.isfinite(data).all():
        place = int(np.flatnonzero(~np.isfinite(data))[0])
        raise DataError(f"value {place} of {data.size} is {data[place]}, not a finite number")
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
