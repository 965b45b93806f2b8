import itertools
import math
import time
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.errors import DataError, SettingsError
from ragkit.evaluation.statistics import (
    Estimate,
    bootstrap_mean,
    bootstrap_means,
    bootstrap_ratio,
    holm,
    paired_differences,
)


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
@pytest.mark.parametrize(
    "estimate",
    [
        lambda **options: bootstrap_mean([0.0, 1.0], **options),
        lambda **options: bootstrap_means([[0.0, 1.0]], **options),
        lambda **options: bootstrap_ratio([0.0, 1.0], [1.0, 1.0], **options),
        lambda **options: paired_differences([([0.0, 1.0], [1.0, 1.0])], **options),
    ],
)
def test_bad_options_are_refused(estimate, options):
    with pytest.raises(SettingsError):
        estimate(**options)


def test_text():
    assert str(Estimate(0.5118, 0.47, 0.553, 9)) == "0.512 [0.470, 0.553]"


# --- several columns, several seeds


def test_columns_have_the_intervals_that_they_have_alone():
    random = np.random.default_rng(3)
    columns = [random.random(400), random.random(400) < 0.2, np.full(400, 0.1)]
    together = bootstrap_means(columns)
    for column, estimate in zip(columns, together, strict=True):
        alone = bootstrap_mean(column)
        error = column.std() / 20
        assert estimate.mean == pytest.approx(alone.mean)
        assert estimate.n == 400
        assert estimate.low == pytest.approx(alone.low, abs=0.1 * error)
        assert estimate.high == pytest.approx(alone.high, abs=0.1 * error)
    assert together[2] == Estimate(0.1, 0.1, 0.1, 400)


def test_seeds_are_drawn_too():
    # Questions do not differ. The mean of two of the two seeds, drawn again, is .4, .5 or .6, with
    # chances of 1/4, 1/2 and 1/4; the root of 2 / (2 - 1) widens that.
    [estimate] = bootstrap_means([[[0.4] * 9, [0.6] * 9]])
    assert estimate.mean == pytest.approx(0.5)
    assert estimate.low == pytest.approx(0.5 - 0.1 * math.sqrt(2))
    assert estimate.high == pytest.approx(0.5 + 0.1 * math.sqrt(2))


def test_spread_between_seeds_adds_its_variance():
    random = np.random.default_rng(5)
    questions = random.normal(0, 1, 300)
    shifts = random.normal(0, 0.1, 8)
    seeds = questions + shifts[:, None]
    [alone] = bootstrap_means([questions[None] + shifts.mean()])
    [narrow] = bootstrap_means([np.repeat(seeds.mean(axis=0)[None], 8, axis=0)])
    [wide] = bootstrap_means([seeds])
    assert narrow.high - narrow.low == pytest.approx(alone.high - alone.low, rel=1e-9)
    error = math.sqrt(questions.var() / 300 + shifts.var(ddof=1) / 8)
    assert (wide.high - wide.low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert wide.high - wide.low > 1.05 * (narrow.high - narrow.low)


@pytest.mark.parametrize("values", [[], [[]], [[[0.1, math.nan]]], [[0.1, 0.2], [0.1, 0.2, 0.3]]])
def test_columns_that_have_no_means_are_refused(values):
    with pytest.raises(DataError):
        bootstrap_means(values)


# --- ratios


def test_a_ratio_against_all_of_its_draws():
    above, below = np.array([1.0, 0, 1, 0, 2]), np.array([1.0, 1, 1, 0, 3])
    draws = np.array(list(itertools.product(range(5), repeat=5)))
    sums = above[draws].sum(axis=1), below[draws].sum(axis=1)
    ratios = (sums[0] / np.where(sums[1], sums[1], np.nan))[sums[1] > 0]
    estimate = bootstrap_ratio(above, below, level=0.7)
    assert estimate.mean == pytest.approx(4 / 6)
    assert estimate.n == 4
    assert [estimate.low, estimate.high] == pytest.approx(np.quantile(ratios, [0.15, 0.85]))


def test_a_ratio_agrees_with_the_delta_method():
    random = np.random.default_rng(1)
    below = random.integers(0, 4, 4000).astype(float)
    above = np.array([random.binomial(int(count), 0.3) for count in below])
    estimate = bootstrap_ratio(above, below)
    ratio = above.sum() / below.sum()
    error = math.sqrt(((above - ratio * below) ** 2).sum()) / below.sum()
    assert estimate.mean == pytest.approx(ratio)
    assert estimate.n == np.count_nonzero(below)
    assert estimate.low == pytest.approx(ratio - 1.96 * error, abs=0.06 * error)
    assert estimate.high == pytest.approx(ratio + 1.96 * error, abs=0.06 * error)


def test_draws_without_a_denominator_have_no_ratio():
    assert bootstrap_ratio([1, 0, 0], [2, 0, 0]) == Estimate(0.5, 0.5, 0.5, 1)
    # One draw, without the one question that counts: nothing is known but the ratio itself.
    seed = next(s for s in range(50) if 0 not in np.random.default_rng(s).integers(0, 3, 3))
    assert bootstrap_ratio([1, 0, 0], [2, 0, 0], resamples=1, seed=seed).low == 0.5


@pytest.mark.parametrize(
    ("above", "below", "message"),
    [
        ([0, 0], [0, 0], "denominators of all 2 questions are 0"),
        ([1, 1], [1, -1], "a denominator is -1.0"),
        ([1, 1], [1], r"found \[1, 2\]"),
        ([math.nan, 1], [1, 1], "value 0 of 2 is nan"),
        ([], [], "no values"),
    ],
)
def test_values_that_have_no_ratio_are_refused(above, below, message):
    with pytest.raises(DataError, match=message):
        bootstrap_ratio(above, below)


# --- differences

A = [0.0, 1.0, 1.0, 0.0, 0.5, 0.25]
B = [1.0, 1.0, 0.0, 1.0, 0.75, 0.5]


def all_flips(differences):
    """Return the share of sign flips whose sum is at least as far from 0 as the real one."""
    flips = np.array(list(itertools.product([1, -1], repeat=len(differences))))
    return float(np.mean(np.abs(flips @ differences) >= abs(sum(differences)) - 1e-9))


def test_a_difference_by_hand():
    # B - A is 1, 0, -1, 1, .25, .25: their sum is 1.5, that of their squares 3.125.
    [found] = paired_differences([(A, B)])
    assert found.mean == pytest.approx(0.25)
    assert (found.wins, found.ties, found.losses, found.n) == (4, 1, 1, 6)
    sd = math.sqrt((3.125 - 1.5**2 / 6) / 5)
    assert found.detectable == pytest.approx((1.959964 + 0.841621) * sd / math.sqrt(6), rel=1e-5)
    # Of the 2^5 sums ±1 ±1 ±1 ±.25 ±.25, 1.5 is reached by 3 with any quarters (4 ways) and by
    # 1 (3 ways) with both; -1.5 as often.
    assert found.permutation_p == 2 * (4 + 3) / 32
    draws = np.random.default_rng(1).choice(np.subtract(B, A), (100_000, 6)).mean(axis=1)
    assert [found.low, found.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.03)
    tail = min((draws <= 0).mean(), (draws >= 0).mean())
    assert found.bootstrap_p == pytest.approx(2 * tail, abs=0.03)


@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.1, 1 / 3, 1.0]), min_size=2, max_size=9))
def test_few_questions_are_permuted_exactly(differences):
    [found] = paired_differences([(np.zeros(len(differences)), differences)], resamples=600)
    assert found.permutation_p == all_flips(differences)


def test_many_questions_are_permuted_at_random():
    differences = np.random.default_rng(2).normal(0.4, 1, 14)
    exact = all_flips(differences)
    assert 0.02 < exact < 0.5
    [found] = paired_differences([(np.zeros(14), differences)], resamples=16_000)
    error = math.sqrt(exact * (1 - exact) / 16_000)
    assert found.permutation_p == pytest.approx(exact, abs=4 * error)
    assert found.permutation_p != exact


def test_p_values_by_draws_are_never_zero():
    differences = np.random.default_rng(2).normal(5, 1, 40)
    [found] = paired_differences([(np.zeros(40), differences)], resamples=999)
    assert found.permutation_p == 1 / 1000
    assert found.bootstrap_p == 2 / 1000


def test_intervals_and_p_values_agree_with_normal_theory():
    random = np.random.default_rng(4)
    a = random.normal(0, 1, 2000)
    b = a + random.normal(0.02, 0.5, 2000)
    [found] = paired_differences([(a, b)])
    error = (b - a).std(ddof=1) / math.sqrt(2000)
    z = (b - a).mean() / error
    p = math.erfc(abs(z) / math.sqrt(2))
    assert 0.01 < p < 0.5
    assert found.mean == pytest.approx((b - a).mean())
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.06 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.06 * error)
    assert found.bootstrap_p == pytest.approx(p, abs=0.02)
    assert found.permutation_p == pytest.approx(p, abs=0.02)


def test_the_bootstrap_p_says_what_the_interval_says():
    random = np.random.default_rng(6)
    pairs = [(random.normal(0, 1, 60), random.normal(0.3, 1, 60)) for _ in range(200)]
    found = paired_differences(pairs, resamples=2000)
    apart = [not one.low <= 0 <= one.high for one in found]
    assert 20 < sum(apart) < 180
    for one, beyond in zip(found, apart, strict=True):
        assert (one.bootstrap_p <= 0.05) == beyond or abs(one.bootstrap_p - 0.05) < 0.002


@pytest.mark.parametrize("n", [2, 5, 300])
def test_a_run_with_itself_differs_by_exactly_nothing(n):
    values = np.random.default_rng(n).random(n)
    [found] = paired_differences([(values, values)])
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert (found.bootstrap_p, found.permutation_p) == (1, 1)
    assert (found.wins, found.ties, found.losses) == (0, n, 0)
    assert found.detectable is None


def test_rounding_is_no_difference():
    # .1 + .2 is not .3: the same scores in another order of seeds.
    a = [[0.1, 0.0], [0.2, 1.0], [0.3, 1.0]]
    [found] = paired_differences([(a, a[::-1])])
    assert (found.mean, found.ties) == (0, 2)


def test_measures_together_are_what_they_are_alone():
    random = np.random.default_rng(8)
    pairs = [(random.random(50), random.random(50)) for _ in range(3)]
    together = paired_differences(pairs, resamples=500)
    for pair, found in zip(pairs, together, strict=True):
        [alone] = paired_differences([pair], resamples=500)
        assert found.low == pytest.approx(alone.low)
        assert found.high == pytest.approx(alone.high)
        assert found.bootstrap_p == alone.bootstrap_p
        assert found.permutation_p == alone.permutation_p
    assert paired_differences(pairs, seed=1) == paired_differences(pairs, seed=1)
    assert paired_differences(pairs, seed=1) != paired_differences(pairs, seed=2)


def test_swapped_sides_have_swapped_signs():
    [forth], [back] = paired_differences([(A, B)]), paired_differences([(B, A)])
    assert back.mean == -forth.mean
    assert (back.wins, back.losses) == (forth.losses, forth.wins)
    assert back.low == pytest.approx(-forth.high)
    assert back.permutation_p == forth.permutation_p


def test_seeds_of_both_sides_widen_the_interval():
    random = np.random.default_rng(9)
    a = random.normal(0, 1, 500)
    b = a + random.normal(0.1, 0.4, 500)
    shifts = np.array([-0.1, -0.05, 0.0, 0.05, 0.1])
    one_seed, a_seeds, b_seeds, both = (
        paired_differences([(left, right)])[0]
        for left, right in itertools.product((a, a + shifts[:, None]), (b, b + shifts[:, None]))
    )
    for found in (a_seeds, b_seeds, both):
        assert found.mean == pytest.approx(one_seed.mean)
        assert found.permutation_p == one_seed.permutation_p
    spread = shifts.var(ddof=1) / 5
    error = (b - a).var(ddof=1) / 500
    for found, seeds in ((one_seed, 0), (a_seeds, 1), (b_seeds, 1), (both, 2)):
        width = 2 * 1.96 * math.sqrt(error + seeds * spread)
        assert found.high - found.low == pytest.approx(width, rel=0.08)


def test_a_sides_seeds_are_not_paired_with_the_others():
    a = np.random.default_rng(9).normal(0, 1, 200) + np.array([[-0.2], [0.2]])
    [found] = paired_differences([(a, a)])
    assert found.mean == 0
    assert found.low < -0.3 and found.high > 0.3


@pytest.mark.parametrize("kind", ["normal", "exact match"])
def test_paired_intervals_hold_the_true_difference_as_often_as_they_say(kind):
    random = np.random.default_rng(10)
    shape = (1500, 150)
    if kind == "normal":
        a = random.normal(0, 1, shape)
        b = a + random.normal(0.1, 0.5, shape)
    else:  # of 10 questions, A alone answers 2, B alone 3
        kinds = random.random(shape)
        a = np.where(kinds < 0.2, 1.0, np.where(kinds < 0.5, 0.0, kinds < 0.7))
        b = np.where(kinds < 0.2, 0.0, np.where(kinds < 0.5, 1.0, kinds < 0.7))
    found = paired_differences(list(zip(a, b, strict=True)), resamples=800)
    held = sum(one.low <= 0.1 <= one.high for one in found)
    assert 0.93 <= held / 1500 <= 0.97


def test_intervals_over_seeds_hold_the_true_difference_about_as_often_as_they_say():
    random = np.random.default_rng(11)
    pairs = []
    for _ in range(800):
        hardness = random.normal(0, 0.3, 100)
        a, b = (
            hardness + random.normal(0, 0.05, (5, 1)) + random.normal(0, 0.2, (5, 100))
            for _ in range(2)
        )
        pairs.append((a, b + 0.1))
    found = paired_differences(pairs, resamples=800)
    held = sum(one.low <= 0.1 <= one.high for one in found)
    assert 0.90 <= held / 800 <= 0.97  # five seeds tell little of how seeds spread
    means = [(a.mean(axis=0), b.mean(axis=0)) for a, b in pairs]
    held = sum(one.low <= 0.1 <= one.high for one in paired_differences(means, resamples=800))
    assert held / 800 < 0.8


def test_halves_of_one_population_differ_as_seldom_as_they_should():
    random = np.random.default_rng(12)
    population = np.concatenate([random.random(150), np.zeros(90), np.ones(60)])
    pairs = [np.split(random.permutation(population), 2) for _ in range(2000)]
    found = paired_differences(pairs, resamples=600)
    for p in ("permutation_p", "bootstrap_p"):
        quiet = sum(getattr(one, p) > 0.05 for one in found)
        assert 0.93 <= quiet / 2000 <= 0.97, p


def test_a_detectable_difference_is_detected_four_times_in_five():
    random = np.random.default_rng(13)
    shown = (1.959964 + 0.841621) * 0.5 / math.sqrt(200)
    differences = random.normal(shown, 0.5, (1500, 200))
    found = paired_differences([(np.zeros(200), one) for one in differences], resamples=600)
    assert np.mean([one.detectable for one in found]) == pytest.approx(shown, rel=0.01)
    assert 0.77 <= np.mean([one.permutation_p <= 0.05 for one in found]) <= 0.83


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], r"found \[\]"),
        ([([0.1], [0.2])], "at least 2 questions"),
        ([([0.1, 0.2], [0.2])], r"found \[1, 2\]"),
        ([([0.1, 0.2], [0.2, math.inf])], "value 1 of 2 is inf"),
        ([([[0.1, 0.2], [0.1, math.nan]], [0.2, 0.1])], "value 3 of 4 is nan"),
    ],
)
def test_values_that_cannot_be_paired_are_refused(pairs, message):
    with pytest.raises(DataError, match=message):
        paired_differences(pairs)


def test_ten_thousand_questions_and_resamples_take_seconds_and_little_memory():
    random = np.random.default_rng(14)
    pairs = [(random.random(10_000), random.random(10_000)) for _ in range(8)]
    tracemalloc.start()
    started = time.process_time()
    found = paired_differences(pairs, resamples=10_000)
    seconds = time.process_time() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 8
    assert seconds < 15
    assert peak < 200e6


# --- Holm


def test_holm_by_hand():
    # .005 x 4, .01 x 3, .03 x 2, and .04 x 1, raised to the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6, 0.7]) == [1, 1, 1]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.001, 0.999))
def test_holm_rejects_what_its_steps_reject(p_values, alpha):
    adjusted = holm(p_values)
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    assert all(adjusted[a] <= adjusted[b] for a, b in itertools.pairwise(order))
    assert all(p <= one <= 1 for p, one in zip(p_values, adjusted, strict=True))
    rejected = set()
    for rank, place in enumerate(order):  # Holm's own words: stop at the first that is too large
        if (len(order) - rank) * p_values[place] > alpha:
            break
        rejected.add(place)
    assert {place for place, one in enumerate(adjusted) if one <= alpha} == rejected
