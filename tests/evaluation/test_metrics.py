import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.errors import DataError, SettingsError
from ragkit.evaluation.metrics import (
    judged_ids,
    judged_run,
    retrieval_measures,
    strictly_decreasing,
)


def ranked(*documents):
    return {document: float(-place) for place, document in enumerate(documents)}


def test_hand_computed_values():
    qrels = {"q": {"a": 2, "b": 1, "c": 1, "x": 0}}
    values = retrieval_measures({"q": ranked("x", "a", "b")}, qrels, ks=(1, 2, 3))
    gain = 2 / math.log2(3) + 1 / math.log2(4)
    ideal = 2 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    expected = {
        "nDCG@10": gain / ideal,
        "MRR@10": 1 / 2,
        "MAP": (1 / 2 + 2 / 3) / 3,
        "recall@1": 0,
        "recall@2": 1 / 3,
        "recall@3": 2 / 3,
        "hit@1": 0,
        "hit@2": 1,
        "hit@3": 1,
    }
    assert {name: value["q"] for name, value in values.items()} == pytest.approx(expected)
    assert list(values) == list(expected)


@given(
    st.permutations([f"d{n}" for n in range(15)]),
    st.dictionaries(st.sampled_from([f"d{n}" for n in range(18)]), st.integers(0, 3), min_size=1),
)
def test_values_equal_their_definitions(order, grades):
    values = retrieval_measures({"q": ranked(*order)}, {"q": grades}, ks=(1, 5))
    gains = [grades.get(document, 0) for document in order]
    relevant = sum(grade > 0 for grade in grades.values())
    ranks = [rank for rank, gain in enumerate(gains, 1) if gain > 0]

    def dcg(ordered):
        return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(ordered[:10], 1))

    best = dcg(sorted(grades.values(), reverse=True))
    expected = {
        "nDCG@10": dcg(gains) / best if best else 0,
        "MRR@10": 1 / ranks[0] if ranks and ranks[0] <= 10 else 0,
        "MAP": sum(n / r for n, r in enumerate(ranks, 1)) / relevant if relevant else 0,
        "recall@1": sum(r <= 1 for r in ranks) / relevant if relevant else 0,
        "recall@5": sum(r <= 5 for r in ranks) / relevant if relevant else 0,
        "hit@1": float(any(r <= 1 for r in ranks)),
        "hit@5": float(any(r <= 5 for r in ranks)),
    }
    assert {name: value["q"] for name, value in values.items()} == pytest.approx(expected)


def test_queries_without_a_ranking_count_zero_and_unjudged_ones_not_at_all():
    qrels = {"found": {"a": 1}, "empty": {"a": 1}, "absent": {"a": 1}, "no grades": {}}
    run = {"found": ranked("a"), "empty": {}, "unjudged": ranked("a"), "no grades": ranked("a")}
    values = retrieval_measures(run, qrels, ks=[1])
    for scores in values.values():
        assert scores == {"found": 1.0, "empty": 0.0, "absent": 0.0}


def test_only_unfound_queries():
    assert retrieval_measures({}, {"q": {"a": 1}}, ks=[1])["MAP"] == {"q": 0.0}


@pytest.mark.parametrize(("rank", "value"), [(1, 1.0), (9, 1 / 9), (10, 0.1), (11, 0.0), (50, 0.0)])
def test_mrr_is_cut_at_ten(rank, value):
    run = {"q": ranked(*(f"x{n}" for n in range(1, rank)), "gold", "y")}
    measured = retrieval_measures(run, {"q": {"gold": 1}}, ks=[1])["MRR@10"]["q"]
    assert measured == pytest.approx(value)


def test_grades_below_one_are_not_relevant():
    values = retrieval_measures({"q": ranked("a", "b")}, {"q": {"a": -1, "b": 0}}, ks=[5])
    assert all(scores == {"q": 0.0} for scores in values.values())


def test_ties_are_measured_as_trec_eval_orders_them_or_as_they_stand():
    qrels = {"q": {"a": 1}}
    # Equal in single precision: trec_eval puts the larger id first.
    run = {"q": {"a": 1.000000001, "b": 1.0}}
    assert retrieval_measures(run, qrels, ks=[1])["hit@1"]["q"] == 0.0
    assert retrieval_measures(strictly_decreasing(run), qrels, ks=[1])["hit@1"]["q"] == 1.0


@given(st.lists(st.sampled_from([-1e30, -1.5, 0.0, 0.1, 0.25, 1.0, 1e-45, 1e30]), max_size=30))
def test_strictly_decreasing_keeps_order_and_is_as_close_as_can_be(scores):
    documents = [f"d{n:02}" for n in range(len(scores))]
    result = strictly_decreasing({"q": dict(zip(documents, scores, strict=True))})["q"]
    assert list(result) == documents
    values = list(result.values())
    assert all(before > after for before, after in pairwise(values))
    for place, (value, score) in enumerate(zip(values, scores, strict=True)):
        assert value == np.float32(value)
        if value != np.float32(score):  # lowered: to the next number below the one before
            assert value == np.nextafter(np.float32(values[place - 1]), np.float32(-np.inf))
            assert value < np.float32(score)


def test_decreasing_scores_are_only_rounded():
    run = {"q": {"a": 3.25, "b": 0.1, "c": -2.0}, "empty": {}}
    expected = {"q": {"a": 3.25, "b": float(np.float32(0.1)), "c": -2.0}, "empty": {}}
    assert strictly_decreasing(run) == expected


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, 1e39])
@pytest.mark.parametrize("measure", [strictly_decreasing, lambda run: retrieval_measures(run, {})])
def test_scores_that_are_not_finite_are_refused(score, measure):
    with pytest.raises(DataError, match=r"query 'q7': document 'd9' has the score"):
        measure({"q7": {"d1": 1.0, "d9": score}})


@pytest.mark.parametrize("k", [0, -1, 2.5])
def test_bad_depths_are_refused(k):
    with pytest.raises(SettingsError, match="positive integers"):
        retrieval_measures({}, {}, ks=[k])


PARENTS = {"A#0": "A", "A#1": "A", "B#0": "B", "B#1": "B"}


def test_pieces_are_judged_as_their_parent_by_the_best():
    run = {"q": {"B#1": 5.0, "A#0": 4.0, "A#1": 4.5, "B#0": 1.0, "C": 0.5}}
    assert judged_run(run, {"other": {"A": 1}}, PARENTS) == {"q": {"B": 5.0, "A": 4.5, "C": 0.5}}
    assert list(judged_run(run, {"q": {"A": 1}}, PARENTS)["q"]) == ["B", "A", "C"]


def test_pieces_that_the_qrels_judge_stay_as_they_are():
    run = {"q": {"B#1": 5.0, "A#0": 4.0}}
    assert judged_run(run, {"q": {"A#0": 1}}, PARENTS) == run
    assert judged_ids({"q": {"A#0": 1, "B": 1}}, PARENTS) == {"A#1": "A", "B#0": "B", "B#1": "B"}
