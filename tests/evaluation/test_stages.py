"""Where questions are lost, and what that advises."""

from dataclasses import replace

import pytest

from ragkit.evaluation.stages import STAGES, Trace, stage_losses, stage_of

READ = Trace(True, True, True, True, shown=True, correct=True)


@pytest.mark.parametrize(
    ("changes", "reranked", "stage"),
    [
        ({}, False, "correct"),
        ({"correct": False}, False, "misread"),
        ({"correct": False, "abstained": True}, False, "abstained wrongly"),
        ({"correct": False, "shown": False}, False, "cut from the prompt"),
        ({"correct": False, "shown": False, "kept": False}, False, "ranked too low"),
        ({"correct": False, "kept": False}, True, "dropped by the reranker"),
        ({"correct": False, "kept": False, "leading": False}, True, "ranked too low"),
        ({"correct": False, "retrieved": False, "kept": False}, True, "not retrieved"),
        (
            {"correct": False, "retrieved": False, "kept": False, "fits": False},
            False,
            "not retrieved",
        ),
        (
            {"correct": False, "kept": False, "fits": False},
            True,
            "needs more passages than kept",
        ),
        ({"correct": None, "kept": False, "fits": False}, False, "needs more passages than kept"),
        ({"correct": False, "held": False, "retrieved": False}, True, "not in the corpus"),
        ({"correct": False, "answerable": False, "held": False}, True, "should have abstained"),
        ({"held": False, "retrieved": False, "kept": False}, False, "correct"),  # by heart
        ({"correct": None, "shown": False}, False, "correct"),  # no reader
        ({"correct": None, "shown": False, "kept": False}, False, "ranked too low"),
    ],
)
def test_the_first_stage_that_lost_a_question(changes, reranked, stage):
    assert stage_of(replace(READ, **changes), reranked=reranked) == stage
    assert stage in STAGES


def traces(**counts):
    kinds = {
        "right": READ,
        "misread": replace(READ, correct=False),
        "unfound": Trace(True, False, False, False, correct=False),
        "missing": Trace(False, False, False, False, correct=False),
        "fooled": Trace(False, False, False, False, correct=False, answerable=False),
    }
    return {f"{kind}{n}": kinds[kind] for kind, count in counts.items() for n in range(count)}


def test_counts_bounds_and_gains_by_value():
    asked = traces(right=30, misread=10, unfound=40, missing=10, fooled=10)
    losses = stage_losses(asked, reranked=False)
    assert losses.counts == {
        "not in the corpus": 10,
        "not retrieved": 40,
        "misread": 10,
        "should have abstained": 10,
        "correct": 30,
    }
    bounds = {name: (value.mean, value.n) for name, value in losses.bounds.items()}
    assert bounds == {
        "corpus": (pytest.approx(8 / 9), 90),
        "retrieval": (pytest.approx(4 / 9), 90),
        "ranking": (pytest.approx(4 / 9), 90),
        "prompt": (pytest.approx(4 / 9), 90),
        "answer": (pytest.approx(3 / 10), 100),
    }
    # With the evidence in its prompt the reader answers 3 of 4.
    gains = {part: value.mean for part, value in losses.gains.items()}
    assert gains == {
        "retriever": pytest.approx(0.4 * 0.75),
        "reader": pytest.approx(0.2),
        "corpus": pytest.approx(0.1 * 0.75),
    }
    assert list(gains) == ["retriever", "reader", "corpus"]
    assert losses.stages["unfound2"] == "not retrieved"
    assert "stages" not in losses.to_json()


def test_advice_names_the_part_that_would_bring_most():
    advice = stage_losses(traces(right=300, misread=50, unfound=650), reranked=False).advice
    assert advice == (
        "Train the retriever next: by it 650 of 1000 questions were lost, and a perfect retriever "
        "would raise the share of right answers from 0.30 to 0.86; a perfect reader would to 0.35."
    )
    advice = stage_losses(traces(right=30, misread=50), reranked=False).advice
    assert advice.startswith("Train the reader next: by it 50 of 80 questions")
    advice = stage_losses(traces(right=3, missing=50), reranked=False).advice
    assert advice.startswith("Add the missing documents: for want of them 50 of 53")


def test_a_reader_that_saw_too_little_evidence_is_not_judged_by_it():
    advice = stage_losses(traces(misread=4, unfound=56), reranked=False).advice
    assert advice == (
        "Train the retriever next: by it 56 of 60 questions were lost, and a perfect retriever "
        "would raise the share of right answers from 0.00 to 0.93; a perfect reader would to 0.07, "
        "if the reader read them all rightly: only 4 questions came to it with their evidence, "
        "too few to tell."
    )


def test_advice_says_when_two_parts_cannot_be_told_apart():
    advice = stage_losses(traces(right=10, misread=4, unfound=5), reranked=False).advice
    assert "hardly tell the two apart" in advice


def test_without_losses_or_questions():
    assert "Nothing was lost" in stage_losses(traces(right=3), reranked=False).advice
    assert stage_losses({}, reranked=False) is None


def test_without_a_reader_ranking_is_what_counts():
    found = {
        name: replace(trace, correct=None) for name, trace in traces(right=6, unfound=4).items()
    }
    losses = stage_losses(found, reranked=False)
    assert losses.counts == {"not retrieved": 4, "correct": 6}
    assert list(losses.bounds) == ["corpus", "retrieval", "ranking"]
    assert "whose evidence reaches the reader from 0.60 to 1.00" in losses.advice
