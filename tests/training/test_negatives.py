"""Which hits become hard negatives: each filter by a case, and all together by brute force."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkit.errors import DataError, SettingsError
from ragkit.evaluation.answers import normalize_answer
from ragkit.training.negative_rules import Rules
from ragkit.training.negatives import mine
from ragkit.types import Document, Example, Hit, Query

GOLD = Document("gold", "Gallium melts in the hand, at thirty degrees.", "Gallium")
EXAMPLE = Example(Query("q", "Which metal melts in the hand?"), (GOLD,), answers=("gallium",))
PLAIN = {
    "lead": "Lead is heavy and grey, and was once used for pipes.",
    "brie": "Brie is a soft cheese from the north of France.",
    "iron": "Iron rusts where water and air come to it together.",
    "zinc": "Zinc keeps roofs and buckets from the weather.",
}


def hits(*documents, top=9.0):
    return [Hit(document, top - rank) for rank, document in enumerate(documents)]


def plain(*names):
    return [Document(name, PLAIN[name]) for name in names]


def mined(found, example=EXAMPLE, *, score=None, judged=None, **rules):
    examples, counts = mine(
        [example], [found], Rules(**rules), retriever="bm25", judged=judged, score=score
    )
    return [each.id for each in examples[0].negatives], dict(counts)


def piece(parent, number, text):
    return Document(f"{parent}#{number}", text, "", {"parent": parent, "start": 0, "end": 9})


@pytest.mark.parametrize(
    ("reason", "document", "without"),
    [
        ("relevant", GOLD, None),
        ("relevant", Document("judged", PLAIN["iron"]), {"judged": {}}),
        ("relevant", piece("judged", 4, PLAIN["iron"]), {"judged": {}}),
        ("relevant", Document("copy", GOLD.text), None),
        ("held_out", Document("dev", PLAIN["iron"]), {"held_out": frozenset()}),
        ("held_out", piece("dev", 2, PLAIN["iron"]), {"held_out": frozenset()}),
        (
            "duplicate",
            Document("near", "gallium melts in the hand at thirty degree"),
            {"similarity": 1.0},
        ),
        ("answer", Document("told", "Some hold that GALLIUM is odd."), {"allow_answers": True}),
        ("answer", Document("titled", PLAIN["iron"], "Gallium"), {"allow_answers": True}),
    ],
)
def test_each_filter_takes_what_it_is_for_and_nothing_else(reason, document, without):
    found = hits(*plain("lead"), document, *plain("brie"))
    given = {
        "judged": {"q": {"judged": 1, "lead": 0}, "other": {"brie": 1}},
        "held_out": frozenset({"dev"}),
    }
    names, counts = mined(found, **given)
    assert names == ["lead", "brie"]
    assert counts == {"seen": 3, reason: 1, "kept": 2}
    if without is not None:
        answers = {"answer", "duplicate"} & {reason}
        kept, _ = mined(found, **(given | {"allow_answers": bool(answers)} | without))
        assert kept == ["lead", document.id, "brie"]


def test_answers_that_most_texts_hold_keep_no_negative_away():
    texts = [
        Document("no", "There is no doubt of these 3."),
        Document("odd", "Some say it is odd."),
    ]
    for answers, kept in ((("No", "3"), ["no", "odd"]), (("no", "odd"), ["no"])):
        assert mined(hits(*texts), replace(EXAMPLE, answers=answers))[0] == kept


def test_a_text_that_differs_in_case_and_punctuation_alone_is_always_a_duplicate():
    found = hits(Document("same", GOLD.text.upper().replace(",", " -")), *plain("lead"))
    assert mined(found, allow_answers=True, similarity=1.0)[0] == ["lead"]


def test_another_piece_of_the_positives_parent_is_no_negative():
    example = replace(EXAMPLE, positives=(piece("metals", 1, GOLD.text),))
    found = hits(piece("metals", 2, PLAIN["iron"]), piece("cheeses", 2, PLAIN["brie"]))
    assert mined(found, example) == (["cheeses#2"], {"seen": 2, "relevant": 1, "kept": 1})
    # A field of the user's own that is called "parent" makes no pieces.
    thread = Document("reply", PLAIN["iron"], "", {"parent": "metals"})
    assert mined(hits(thread), example)[0] == ["reply"]


def test_ranks_and_their_provenance():
    found = hits(*plain("lead"), GOLD, *plain("brie", "iron", "zinc"))
    [example], counts = mine([EXAMPLE], [found], Rules(from_rank=2, negatives=2), retriever="dense")
    assert [each.id for each in example.negatives] == ["brie", "iron"]
    assert counts == {"seen": 4, "rank": 1, "relevant": 1, "kept": 2}
    told = [each.metadata["mined"] for each in example.negatives]
    assert told[0].pop("similarity") == pytest.approx(_jaccard(PLAIN["brie"], GOLD.text), abs=1e-4)
    assert told[0] == {"retriever": "dense", "rank": 3, "score": 7.0, "margin": 1.0}
    assert (told[1]["rank"], told[1]["margin"]) == (4, 2.0)
    assert example.positives[0].metadata["mined"] == {
        "retriever": "dense", "rank": 2, "score": 8.0,
    }  # fmt: skip
    assert GOLD.metadata == {} and example.positives[0].text == GOLD.text


def test_margins_are_to_the_best_relevant_document():
    second = Document("second", "A melt in the hand is what gallium is known for.")
    example = replace(EXAMPLE, positives=(second, GOLD))
    found = [Hit(*plain("lead"), 10.5), Hit(GOLD, 10.0), Hit(*plain("brie"), 9.6)]
    found += [Hit(*plain("iron"), 9.5), Hit(*plain("zinc"), 9.0), Hit(second, 1.0)]
    assert mined(found, example)[0] == ["lead", "brie", "iron", "zinc"]
    assert mined(found, example, margin=0.0)[0] == ["brie", "iron", "zinc"]
    assert mined(found, example, margin=0.5)[0] == ["iron", "zinc"]
    assert mined(found, example, relative_margin=0.05)[0] == ["iron", "zinc"]
    names, counts = mined(found, example, margin=0.5, relative_margin=0.1)
    assert names == ["zinc"] and counts["margin"] == 3
    below = [Hit(hit.document, hit.score - 20) for hit in found]  # the best relevant: -10
    assert mined(below, example, relative_margin=0.05)[0] == ["iron", "zinc"]


def test_nothing_keeps_a_margin_to_what_was_not_found():
    names, counts = mined(hits(*plain("lead", "brie")), margin=0.0)
    assert names == [] and counts == {"seen": 2, "unfound": 2}
    assert mined(hits(*plain("lead", "brie")))[0] == ["lead", "brie"]
    # A positive of a file without ids is known by its text.
    other = replace(EXAMPLE, positives=(replace(GOLD, id="5f2a"),))
    assert mined(hits(GOLD, *plain("lead")), other, margin=0.5)[0] == ["lead"]


class Scorer:
    """Scores texts by a table, and remembers what it was asked."""

    def __init__(self, **scores):
        self.scores = {PLAIN.get(name, name): score for name, score in scores.items()}
        self.asked = []

    def __call__(self, pairs):
        self.asked.append(list(pairs))
        return [self.scores[text] for _, text in pairs]


def test_a_cross_encoder_is_asked_for_as_many_as_are_still_needed():
    scores = {GOLD.contents: 0.9, "lead": 0.8, "brie": 0.1, "iron": 0.5, "zinc": 0.2}
    found = hits(*plain("lead", "brie"), GOLD, *plain("iron", "zinc"))
    scorer = Scorer(**scores)
    [example], counts = mine(
        [EXAMPLE], [found], Rules(negatives=2, max_score=0.7), retriever="bm25", score=scorer
    )
    query = EXAMPLE.query.text
    assert scorer.asked == [
        [(query, GOLD.contents), (query, PLAIN["lead"]), (query, PLAIN["brie"])],
        [(query, PLAIN["iron"])],
    ]
    assert [each.id for each in example.negatives] == ["brie", "iron"]
    assert counts == {"seen": 4, "relevant": 1, "cross_encoder": 1, "kept": 2}
    told = example.negatives[1].metadata["mined"]
    assert told["cross_encoder"] == 0.5 and told["cross_encoder_margin"] == pytest.approx(0.4)
    assert example.positives[0].metadata["mined"]["cross_encoder"] == 0.9
    for rules, names in [
        ({"score_margin": 0.45}, ["brie", "zinc"]),
        ({"score_margin": 0.45, "max_score": 0.15}, ["brie"]),
        ({}, ["lead", "brie", "iron", "zinc"]),  # the scores are told, and refuse nothing
    ]:
        assert mined(found, score=Scorer(**scores), **rules)[0] == names


def test_a_generator_is_asked_about_what_the_cross_encoder_left():
    scores = {GOLD.contents: 0.9, "lead": 0.8, "brie": 0.1, "iron": 0.5, "zinc": 0.2}
    gains = {"brie": 0.3, "iron": -0.2, "zinc": 0.0}
    asked = []

    def weigh(questions):
        asked.extend((e.query.id, [d.id for d in documents]) for e, documents in questions)
        return [[gains[d.id] for d in documents] for _, documents in questions]

    found = hits(*plain("lead", "brie"), GOLD, *plain("iron", "zinc"))
    rules = Rules(negatives=2, max_score=0.7, max_utility=0.0)
    [example], counts = mine(
        [EXAMPLE], [found], rules, retriever="bm25", score=Scorer(**scores), weigh=weigh
    )
    assert asked == [("q", ["brie"]), ("q", ["iron", "zinc"])]
    assert [each.id for each in example.negatives] == ["iron", "zinc"]
    assert counts == {"seen": 5, "relevant": 1, "cross_encoder": 1, "utility": 1, "kept": 2}
    assert [each.metadata["mined"]["utility"] for each in example.negatives] == [-0.2, 0.0]


def test_random_draws_are_from_all_ranks_and_follow_the_seed():
    documents = [Document(f"d{i}", f"{i} {i} stands for number {i * 7}") for i in range(40)]
    draws = [mined(hits(*documents, top=99.0), negatives=5, seed=seed)[0] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 5 and max(int(name[1:]) for name in draws[0]) >= 10
    all_of_them = mined(hits(*documents, top=99.0), negatives=40, seed=3)[0]
    assert sorted(all_of_them) == sorted(each.id for each in documents)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"negatives": 0}, "negatives must be at least 1, not 0"),
        ({"from_rank": 0}, "from_rank must be at least 1"),
        ({"margin": -0.1}, "margin must be a number from 0 up, not -0.1"),
        ({"relative_margin": 1.0}, "from 0 up and below 1, not 1.0"),
        ({"score_margin": float("nan")}, "score_margin must be a number"),
        ({"max_score": float("inf")}, "max_score must be a number"),
        ({"max_utility": float("nan")}, "max_utility must be a number"),
        ({"similarity": 0.0}, "similarity must lie above 0"),
    ],
)
def test_rules_out_of_their_range_are_refused(rules, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        Rules(**rules)


def test_what_cannot_be_mined_is_told():
    with pytest.raises(DataError, match="'q' has no positives"):
        mined(hits(*plain("lead")), replace(EXAMPLE, positives=()))
    with pytest.raises(SettingsError, match="need a cross-encoder"):
        mined(hits(*plain("lead")), max_score=0.5)
    with pytest.raises(SettingsError, match="needs a generator"):
        mined(hits(*plain("lead")), max_utility=0.0)


# --- all filters at once, by brute force


def _jaccard(one, other):
    def runs(text):
        words = "".join(" " if character in ".,?" else character for character in text.lower())
        padded = f" {' '.join(words.split())} "
        return {padded[i : i + 3] for i in range(len(padded) - 2)}

    return len(runs(one) & runs(other)) / len(runs(one) | runs(other))


WORDS = st.lists(
    st.sampled_from("tin lead melts cold the gallium of".split()), min_size=1, max_size=6
)


@st.composite
def cases(draw):
    names = draw(st.lists(st.sampled_from("abcdefghij"), unique=True, min_size=2))
    documents = []
    for name in names:
        parent = draw(st.sampled_from([None, "a", "p"]))
        place = {"parent": parent, "start": 0, "end": 1} if parent else {}
        documents.append(Document(name, " ".join(draw(WORDS)), "", place))
    positives = draw(
        st.lists(st.sampled_from(documents), unique_by=lambda d: d.id, min_size=1, max_size=2)
    )
    scores = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0])
    found = draw(st.lists(st.sampled_from(documents), unique_by=lambda d: d.id))
    values = sorted((draw(scores) for _ in found), reverse=True)
    example = Example(
        Query("q", "what"),
        tuple(positives),
        answers=draw(st.sampled_from([(), ("gallium",), ("the tin",)])),
    )
    grades = draw(
        st.dictionaries(st.sampled_from([*names, "p"]), st.sampled_from([0, 1]), max_size=2)
    )
    amount = st.none() | st.sampled_from([0.0, 0.3, 0.9])
    rules = Rules(
        negatives=draw(st.integers(1, 3)), from_rank=draw(st.integers(1, 3)), margin=draw(amount),
        relative_margin=draw(amount), max_score=draw(amount), score_margin=draw(amount),
        allow_answers=draw(st.booleans()), similarity=draw(st.sampled_from([0.3, 0.8, 1.0])),
        held_out=draw(st.frozensets(st.sampled_from([*names, "p"]), max_size=2)),
    )  # fmt: skip
    cross = {document.text: draw(scores) for document in documents}
    return example, [Hit(*pair) for pair in zip(found, values, strict=True)], rules, grades, cross


def _reference(example, found, rules, grades, cross):
    def ids(document):
        return {document.id, document.metadata.get("parent")} - {None}

    relevant = {name for name, grade in grades.items() if grade > 0}
    relevant |= set().union(*map(ids, example.positives))
    texts = [document.text for document in example.positives]

    def is_relevant(document):
        return bool(ids(document) & relevant) or document.text in texts

    best = max((hit.score for hit in found if is_relevant(hit.document)), default=None)
    best_cross = max(cross[text] for text in texts)

    def passes(rank, hit):
        text, score = hit.document.text, cross[hit.document.text]
        if (
            rank < rules.from_rank
            or is_relevant(hit.document)
            or ids(hit.document) & rules.held_out
        ):
            return False
        margins = (rules.margin, None if best is None else (rules.relative_margin or 0) * abs(best))
        if (rules.margin, rules.relative_margin) != (None, None) and (
            best is None or any(hit.score > best - (margin or 0) for margin in margins)
        ):
            return False
        if any(_jaccard(text, other) >= rules.similarity for other in texts):
            return False
        answers = [f" {normalize_answer(answer)} " for answer in example.answers]
        if not rules.allow_answers and any(a in f" {normalize_answer(text)} " for a in answers):
            return False
        if rules.max_score is not None and score > rules.max_score:
            return False
        return rules.score_margin is None or best_cross - score >= rules.score_margin

    passing = [hit.document.id for rank, hit in enumerate(found, 1) if passes(rank, hit)]
    return passing[: rules.negatives]


@settings(max_examples=300, deadline=None)
@given(st.lists(cases(), min_size=1, max_size=3))
def test_negatives_are_those_of_brute_force(several):
    for number, (_, _, rules, _, _) in enumerate(several):
        same = [
            (replace(example, query=Query(f"q{n}", f"what {n}")), found, grades, cross)
            for n, (example, found, _, grades, cross) in enumerate(several)
        ]
        tables = {f"what {n}": cross for n, (_, _, _, cross) in enumerate(same)}
        examples, counts = mine(
            [example for example, *_ in same],
            [found for _, found, *_ in same],
            rules,
            retriever="bm25",
            judged={f"q{n}": grades for n, (_, _, grades, _) in enumerate(same)},
            score=lambda pairs, of=tables: [of[query][text] for query, text in pairs],
        )
        expected = [
            _reference(example, found, rules, grades, cross)
            for example, found, grades, cross in same
        ]
        assert [[d.id for d in example.negatives] for example in examples] == expected, number
        assert counts["kept"] == sum(map(len, expected))
        assert counts["seen"] == sum(counts.values()) - counts["seen"]
