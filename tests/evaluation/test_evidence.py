"""What questions need, and who gives it."""

import pytest

from ragkit import Document, Example, Hit, Query
from ragkit.errors import SettingsError
from ragkit.evaluation.evidence import ANSWER, Evidence, gold_passages, in_corpus
from ragkit.evaluation.gold import gold_of
from ragkit.stores.documents import matches


def piece(name, text="", parent="m"):
    return Document(name, text or f"Text of {name}.", "", {"parent": parent, "start": 0, "end": 9})


DOCUMENTS = [
    Document("p", "Paris is the capital."),
    Document("l", "Lyon, too, is old."),
    piece("m#1", "Mars is red."),
    piece("m#2", "Mars has two moons."),
    Document("n", "Nothing of note."),
]


class Shelf:
    def passing(self, where):
        return (d for d in DOCUMENTS if matches(where, d))

    def pieces(self, name, where=None):
        own = [d for d in DOCUMENTS if d.id == name]
        found = own or [d for d in DOCUMENTS if d.metadata.get("parent") == name]
        return [d for d in found if matches(where or {}, d)]

    def documents_fingerprint(self):
        return "f"


def example(name, *answers, positives=()):
    return Example(Query(name, f"{name}?"), positives=positives, answers=answers)


EXAMPLES = [
    example("judged", "Paris"),
    example("two", "moons"),
    example("free", "two moons", "the The"),
    example("absent", "Atlantis", "old too"),
    example("unanswerable"),
]
QRELS = {"judged": {"p": 1, "l": 0}, "two": {"p": 1, "m": 2, "gone": 0}}


def hits(*names):
    return [Hit(document, 1.0) for name in names for document in DOCUMENTS if document.id == name]


@pytest.fixture
def gold():
    return gold_of(EXAMPLES, QRELS)


def test_needs(gold):
    evidence = Evidence(gold)
    needs = {e.query.id: evidence.needs(e.query.id) for e in EXAMPLES}
    assert needs == {
        "judged": {"p"},
        "two": {"p", "m"},
        "free": {ANSWER},
        "absent": {ANSWER},
        "unanswerable": set(),
    }


@pytest.mark.parametrize(
    ("query", "found", "one", "every"),
    [
        ("judged", ["l", "n"], False, False),
        ("judged", ["l", "p"], True, True),
        ("two", ["m#2"], True, False),
        ("two", ["m#1", "m#2", "p"], True, True),
        ("two", [], False, False),
        ("free", ["m#1"], False, False),
        ("free", ["m#1", "m#2"], True, True),
    ],
)
def test_what_hits_give(gold, query, found, one, every):
    assert Evidence(gold, "any").suffices(query, hits(*found)) is one
    assert Evidence(gold, "all").suffices(query, hits(*found)) is every
    with pytest.raises(SettingsError, match="any, all"):
        Evidence(gold, "most")


def test_distractors_are_neither_relevant_nor_hold_an_answer(gold):
    evidence = Evidence(gold)
    misleading = {
        query: [
            h.document.id for h in hits("p", "l", "m#1", "m#2", "n") if evidence.misleads(query, h)
        ]
        for query in ("judged", "two", "free")
    }
    assert misleading == {
        "judged": ["l", "m#1", "m#2", "n"],
        "two": ["l", "n"],
        "free": ["p", "l", "m#1", "n"],
    }


def test_gold_passages(gold):
    def passages(example, limit=5, corpus=Shelf()):  # noqa: B008
        return [hit.document.id for hit in gold_passages(example, gold, corpus, limit)]

    assert passages(EXAMPLES[0]) == ["p"]
    assert passages(EXAMPLES[1]) == ["m#2", "p"]  # the higher grade; its piece with the answer
    assert passages(EXAMPLES[1], 1) == ["m#2"]
    assert passages(example("two", "no such words")) == ["m#1", "p"]
    assert passages(EXAMPLES[2]) == []
    own = Document("own", "Of the question's own.")
    assert passages(example("free", "x", positives=(own,))) == ["own"]
    assert passages(EXAMPLES[0], corpus=None) == []


def test_what_the_corpus_holds(gold):
    names = ["judged", "two", "free", "absent"]
    queries = [Query(name, f"{name}?") for name in names]
    # "old too" stands across two documents' ends in no text.
    expected = {"judged": True, "two": True, "free": True, "absent": False}
    assert in_corpus(Evidence(gold), gold, queries, Shelf()) == expected
    assert in_corpus(Evidence(gold), gold, queries, None) == dict.fromkeys(names, True)
    wanting = gold_of(EXAMPLES, {"two": {"p": 1, "gone": 1}})
    two = [Query("two", "two?")]
    assert in_corpus(Evidence(wanting, "any"), wanting, two, Shelf()) == {"two": True}
    assert in_corpus(Evidence(wanting, "all"), wanting, two, Shelf()) == {"two": False}


def test_what_a_filter_does_not_let_through_is_not_in_the_corpus(gold):
    def held(need, **wheres):
        queries = [Query(name, "?", where) for name, where in wheres.items()]
        return in_corpus(Evidence(gold, need), gold, queries, Shelf())

    whole, pieces = {"parent": {"exists": False}}, {"parent": "m"}
    assert held("any", judged=whole, two=whole, free=whole) == {
        "judged": True,
        "two": True,  # p passes, the pieces of m do not
        "free": False,
    }
    assert held("all", two=whole) == {"two": False}
    assert held("all", two={"id": ["p", "m#1"]}) == {"two": True}
    # Each question is sought in what its own filter lets through, and nothing may pass at all.
    assert held("any", judged=pieces, free=pieces, absent={"year": 1}) == {
        "judged": False,
        "free": True,
        "absent": False,
    }


def test_how_many_hits_can_suffice(gold):
    assert [Evidence(gold, "any").least(name) for name in ("judged", "two", "free")] == [1, 1, 1]
    assert [Evidence(gold, "all").least(name) for name in ("judged", "two", "free")] == [1, 2, 1]


def test_a_title_that_holds_the_answer_is_no_distractor(gold):
    titled = Hit(Document("t", "The red planet's company.", "Two moons"), 1.0)
    assert not Evidence(gold).misleads("free", titled)


def test_judgements_without_anything_relevant_leave_the_answers_to_be_needed():
    known = gold_of(EXAMPLES, {"free": {"p": 0}, "judged": {"p": 1}})
    assert Evidence(known).needs("free") == {ANSWER}


def test_each_relevant_document_has_a_gold_passage_before_another_has_two():
    long = [piece(f"m#{n}", "It has two moons.") for n in range(1, 4)]

    class Pieces(Shelf):
        def pieces(self, name, where=None):
            return long if name == "m" else super().pieces(name)

    known = gold_of([example("q", "moons")], {"q": {"m": 1, "p": 1}})
    found = gold_passages(example("q", "moons"), known, Pieces(), 3)
    assert [hit.document.id for hit in found] == ["m#1", "p", "m#2"]
