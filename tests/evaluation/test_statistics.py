import math
import warnings

import numpy as np
import pytest

from ragkit.errors import DataError, SettingsError
from ragkit.evaluation.statistics import Estimate, bootstrap_mean


def test_interval_agrees_with_normal_theory():
    values = np.random.default_rng(1).normal(2, 3, 5000)
    estimate = bootstrap_mean(values)
    error = values.std() / math.sqrt(len(values))
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.n == 5000
    assert estimate.low == pytest.approx(values.mean() - 1.96 * error, abs=0.05 * error)
    assert estimate.high == pytest.approx(values.mean() + 1.96 * error, abs=0.05 * error)


def test_level_sets_the_width():
    values = np.random.default_rng(1).normal(0, 1, 2000)
    error = values.std() / math.sqrt(len(values))
    estimate = bootstrap_mean(values, level=0.5)
    assert estimate.high - estimate.low == pytest.approx(2 * 0.6745 * error, rel=0.05)


@pytest.mark.parametrize("draw", ["normal", "exact match"])
def test_intervals_hold_the_true_mean_as_often_as_they_say(draw):
    random = np.random.default_rng(7)
    held = 0
    for trial in range(600):
        values = random.normal(0.3, 1, 200) if draw == "normal" else random.random(200) < 0.3
        estimate = bootstrap_mean(values, resamples=500, seed=trial)
        held += estimate.low <= 0.3 <= estimate.high
    assert 0.93 <= held / 600 <= 0.97


def test_a_seed_settles_the_interval():
    values = [0.0, 1.0, 1.0, 0.5, 0.2]
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    wide = np.random.default_rng(0).random(50)
    assert bootstrap_mean(wide, seed=3) != bootstrap_mean(wide, seed=4)


@pytest.mark.parametrize("values", [[0.4], [0.4] * 7])
def test_without_spread_the_interval_is_the_mean(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bootstrap_mean(values) == Estimate(0.4, 0.4, 0.4, len(values))


@pytest.mark.parametrize("values", [[], [0.1, math.nan], [math.inf, 1.0]])
def test_values_that_have_no_mean_are_refused(values):
    with pytest.raises(DataError):
        bootstrap_mean(values)


@pytest.mark.parametrize("options", [{"level": 0.0}, {"level": 95}, {"resamples": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(SettingsError):
        bootstrap_mean([0.0, 1.0], **options)


def test_text():
    assert str(Estimate(0.5118, 0.47, 0.553, 9)) == "0.512 [0.470, 0.553]"
