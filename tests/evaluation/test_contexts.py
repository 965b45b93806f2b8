"""What the reader is given instead, and what that tells of it."""

import random

import pytest

from ragkit import Answer, Document, Hit, Query
from ragkit.errors import SettingsError
from ragkit.evaluation.contexts import (
    CONTEXTS,
    build_contexts,
    check_contexts,
    context_figures,
    noise_sizes,
    why_not_swept,
)


def hits(*names):
    return [Hit(Document(name, f"Text of {name}."), 1.0) for name in names]


def names(found):
    return [hit.document.id for hit in found]


def build(contexts=CONTEXTS, noise=(), **changes):
    given = {
        "query": "q",
        "retrieved": hits("d1", "g", "d2"),
        "gold": hits("g"),
        "distractors": hits("d1", "d2", "d3", "d4"),
        "keep": 3,
        "seed": 0,
    }
    built = build_contexts(contexts, noise, **given | changes)
    return {name: names(found) for name, found in built.items()}


def test_contexts_by_value():
    built = build()
    assert list(built) == list(CONTEXTS)
    assert built["none"] == []
    assert built["retrieved"] == ["d1", "g", "d2"]
    assert built["gold"] == ["g"]
    assert built["wrong"] == ["d1", "d2", "d3"]
    assert sorted(built["gold+distractors"]) == ["d1", "d2", "g"]
    assert [name for name in built["gold+distractors"] if name != "g"] == ["d1", "d2"]
    assert sorted(built["shuffled"]) == ["d1", "d2", "g"] and built["shuffled"] != ["d1", "g", "d2"]


def test_the_gold_passage_stands_at_every_place():
    built = [build(query=f"q{n}")["gold+distractors"] for n in range(3000)]
    places = [found.index("g") for found in built]
    assert all(900 <= places.count(place) <= 1100 for place in range(3))


def test_equal_seeds_and_questions_give_equal_contexts():
    random.seed(1)
    one = build(noise=[0.5])
    random.seed(2)
    assert build(noise=[0.5]) == one
    assert any(build(query=f"q{n}") != build(query=f"q{n}", seed=1) for n in range(20))


def test_what_cannot_be_built_is_left_out():
    assert list(build(gold=[])) == ["none", "retrieved", "wrong", "shuffled"]
    assert list(build(distractors=[])) == ["none", "retrieved", "gold", "shuffled"]
    assert list(build(retrieved=hits("g"))) == [
        "none",
        "retrieved",
        "gold",
        "gold+distractors",
        "wrong",
    ]
    # A gold passage that holds no answer looks like a distractor, and is none.
    assert build(distractors=hits("g", "d9"))["wrong"] == ["d9"]


def test_as_many_gold_passages_as_are_kept_still_meet_one_distractor():
    found = build(gold=hits("g", "h", "i"))["gold+distractors"]
    assert sorted(found) == ["d1", "g", "h", "i"]


def test_the_noise_sweep_holds_its_shares():
    shares = [0.0, 0.5, 0.75, 1.0]
    built = build((), shares)
    assert built["noise 0 %"] == ["g"]
    assert sorted(built["noise 50 %"]) == ["d1", "g"]
    assert sorted(built["noise 75 %"]) == ["d1", "d2", "d3", "g"]
    assert built["noise 100 %"] == ["d1", "d2", "d3"]
    two = build((), shares, gold=hits("g", "h"), distractors=hits(*"abcdef"))
    assert [len(found) for found in two.values()] == [2, 4, 8, 6]
    # 75 % of a context with two gold passages asks for six distractors: no share is left in part.
    assert build((), shares, gold=hits("g", "h")) == {}
    assert build((), shares, gold=[]) == {}


@pytest.mark.parametrize(
    ("contexts", "noise", "message"),
    [
        (["golden"], [], r"\['golden'\]; known are none, retrieved"),
        ([], [0.5, 50], r"\[50\]"),
        ([], [0.67, 0.5, 0.6666], r"same name, such as 'noise 67 %'.* among \[0.67, 0.6666\]"),
        ([], [0.5, 0.5], r"among \[0.5, 0.5\]"),
    ],
)
def test_bad_names_and_shares(contexts, noise, message):
    with pytest.raises(SettingsError, match=message):
        check_contexts(contexts, noise)


@pytest.mark.parametrize(
    ("golds", "shares", "expected"),
    [
        (1, [0, 0.5, 0.67, 0.75, 0.8, 1], [0, 1, 2, 3, 4, 4]),
        (1, [0.05, 0.45, 0.7], [0, 1, 2]),
        (1, [0.3], None),
        (1, [0.5, 0.1], None),
        (1, [0.6], None),  # 1 and 2 distractors are 50 % and 67 %
        (2, [0.3, 0.6], [1, 3]),
        (9, [0.1, 0.9], [1, 81]),
        (2, [0, 1], [0, 1]),
        (2, [1], [2]),
        (0, [0.5], None),
    ],
)
def test_a_share_is_had_within_5_points_or_not_at_all(golds, shares, expected):
    found = noise_sizes(shares, golds)
    assert (found and list(found.values())) == expected
    for share in found or ():
        assert share == 1 or abs(found[share] / (found[share] + golds) - share) <= 0.05
    enough = hits(*(f"d{n}" for n in range(99)))
    built = build((), shares, gold=hits(*"abcdefghi"[:golds]), distractors=enough)
    assert [len(found) for found in built.values()] == [
        size + golds * (share < 1) for share, size in (found or {}).items()
    ]


def test_why_a_question_is_left_out_of_the_sweep():
    assert "gold passages that suffice" in why_not_swept([0.5], 0)
    assert "cannot be had" in why_not_swept([0.5, 0.3], 1)
    assert "too few distractors" in why_not_swept([0.5], 1)


def test_figures_by_value():
    def both(**values):
        return {"F1": values, "cover": {query: float(v > 0.4) for query, v in values.items()}}

    scores = {
        "none": both(a=0.5, b=0.0),
        "retrieved": both(a=1.0, b=0.5, c=0.25),
        "gold": both(a=1.0, b=1.0),
        "gold+distractors": both(a=1.0, b=0.5),
        "shuffled": both(a=1.0, b=0.25, c=0.25),
        "wrong": both(a=0.0, b=0.0, c=0.5, d=0.0),
    }

    def answer(cited):
        return Answer(Query("q", "?"), "x", tuple(hits("d")), "", (0,) if cited else ())

    # b declines or speaks from nowhere; c is right all the same.
    wrong = {"a": answer(True), "b": answer(False), "c": answer(True), "d": answer(True)}
    figures = context_figures(scores, {"wrong": wrong}, seed=0)
    found = {name: (value.mean, value.n) for name, value in figures.items()}
    assert found == {
        "context gain (F1)": (0.5, 2),
        "context gain (cover)": (0.5, 2),
        "distraction loss (F1)": (0.25, 2),
        "distraction loss (cover)": (0.0, 2),
        "over-reliance": (0.5, 4),
        "order gain (F1)": (pytest.approx(0.25 / 3), 3),
        "order gain (cover)": (pytest.approx(1 / 3), 3),
        "position sensitivity (F1)": (pytest.approx(1 / 3), 3),
        "position sensitivity (cover)": (pytest.approx(1 / 3), 3),
    }
    assert context_figures({"gold": scores["gold"]}, {}, seed=0) == {}


def test_a_refusal_that_cites_is_no_reliance_on_a_wrong_passage():
    scores = {"wrong": {"F1": {"a": 0.0, "b": 0.0}, "cover": {"a": 0.0, "b": 0.0}}}
    said = Answer(Query("q", "?"), "Tin [1]", tuple(hits("d")), "", (0,))
    declined = Answer(Query("q", "?"), "I don't know [1].", said.hits, "", (0,), abstained=True)
    figures = context_figures(scores, {"wrong": {"a": said, "b": declined}}, seed=0)
    assert figures["over-reliance"].mean == 0.5


def test_equal_hits_cannot_be_shuffled():
    assert "shuffled" not in build(retrieved=hits("d1", "d1"))
