import gzip
import io
import json
import os
import random
import subprocess
import sys
import unicodedata
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ragkit import Document, Example, Query
from ragkit.errors import DataError, SettingsError
from ragkit.evaluation import duplicates
from ragkit.evaluation.answers import cover_match
from ragkit.evaluation.containment import Phrases, seek
from ragkit.evaluation.duplicates import (
    Pair,
    answer_key,
    near_pairs,
    normalize_text,
    shingles,
)
from ragkit.evaluation.leaks import KINDS, Absent, Passage, Share, audit
from ragkit.evaluation.report import leaks_table

ROOT = Path(__file__).parents[2]

WORDS = (
    "when where why which who river mountain copper tin bronze empire treaty signed king queen "
    "battle army fleet harbour bridge built tallest oldest city capital country language spoken "
    "people live winter summer rain snow wind the of in a an is was were did does by for with "
    "author novel published first second war peace trade route silk spice tea coffee sugar"
).split()


def example(name, text, *answers):
    return Example(Query(name, text), answers=answers)


def cut(text):
    """A text's shingles by their definition."""
    return {f" {text} "[place : place + 3] for place in range(len(text))}


def jaccard(one, other):
    return len(cut(one) & cut(other)) / len(cut(one) | cut(other))


def brute_force(texts, threshold):
    """All pairs at or above the threshold: (place, place) -> similarity."""
    sets = [cut(text) for text in texts]
    pairs = {}
    for (i, one), (j, other) in combinations(enumerate(sets), 2):
        if (alike := len(one & other) / len(one | other)) >= threshold:
            pairs[i, j] = alike
    return pairs


def edited(text, rng):
    """One small change, as people make them: a letter, a word, a word's end."""
    words = text.split()
    place = rng.randrange(len(words))
    word = words[place]
    words[place] = rng.choice([word[1:] or "e", word + "s", "", word[::-1], rng.choice(WORDS)])
    return " ".join(filter(None, words)) or text


def planted(rng, texts):
    """Texts with one to three edited copies of each, all different."""
    copies = []
    for text in texts:
        for _ in range(2):
            copy = text
            for _ in range(rng.choice([1, 1, 2, 3])):
                copy = edited(copy, rng)
            copies.append(copy)
    return list(dict.fromkeys([*texts, *copies]))


# --- normalisation and shingles


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("What is the capital of Peru?", "what is the capital of peru"),
        ("  WHAT\tis\n the\u00a0capital … of “Peru” ", "what is the capital of peru"),
        ("Ｗｈａｔ is a ﬁsh？", "what is a fish"),
        ("Straße", "strasse"),
        ("ℋow", "how"),  # folded only after its compatible character is taken
        ("\u0390", "\u0390"),  # folding takes it apart
        ("cafe\u0301", "caf\u00e9"),
        ("Beyoncé's alter-ego", "beyoncé s alter ego"),
        ("¿Qué es C++?", "qué es c++"),
        ("What costs $5?", "what costs $5"),
        ("澳大利亚的首都是哪里？", "澳大利亚的首都是哪里"),
        ("?!", "?!"),
        (" ? ! ", "? !"),
        ("Why?", "why"),
    ],
)
def test_normalisation(text, normal):
    assert normalize_text(text) == normal


@given(st.text())
def test_normalisation_leaves_neither_case_nor_stray_spaces(text):
    normal = normalize_text(text)
    assert normal == " ".join(normal.split())
    assert bool(normal) == bool(text.strip())
    assert normalize_text(unicodedata.normalize("NFKC", text)) == normal
    if any(unicodedata.category(character)[0] != "P" for character in normal if character != " "):
        assert not any(unicodedata.category(character)[0] == "P" for character in normal)


def test_shingles():
    assert shingles("why") == {" wh", "why", "hy "}
    assert shingles("a") == {" a "}
    assert shingles("首都") == {" 首都", "首都 "}
    assert shingles("a b") == {" a ", "a b", " b "}
    assert shingles("aaaaaa") == {" aa", "aaa", "aa "}


# --- near-duplicates


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_nearly_all_pairs_of_brute_force_are_found_and_none_besides(threshold):
    rng = random.Random(7)
    base = [" ".join(rng.choices(WORDS, k=rng.randint(5, 15))) for _ in range(120)]
    texts = planted(rng, base)
    expected = brute_force(texts, threshold)
    at_the_threshold = {pair for pair, alike in expected.items() if alike < threshold + 0.03}
    assert len(expected) > 30 and len(at_the_threshold) > 10
    found = near_pairs(texts, threshold, seed=1)
    assert all(expected[one, other] == alike for one, other, alike in found)
    places = {(one, other) for one, other, _ in found}
    assert len(places) == len(found) >= 0.97 * len(expected)
    assert len(places & at_the_threshold) >= 0.97 * len(at_the_threshold)
    assert found == sorted(found, key=lambda pair: (-pair[2], pair[0], pair[1]))


@pytest.mark.data
@pytest.mark.parametrize("name", ["squad", "medquad", "policyqa", "squadshifts_reddit"])
def test_nearly_all_pairs_of_real_questions_are_found(name, data):
    with gzip.open(data / name / "queries.jsonl.gz", "rt", encoding="utf-8") as lines:
        questions = [normalize_text(json.loads(line)["text"]) for line in lines]
    rng = random.Random(11)
    texts = planted(rng, rng.sample(list(dict.fromkeys(questions)), 120))
    expected = brute_force(texts, 0.8)
    found = {(one, other): alike for one, other, alike in near_pairs(texts, 0.8)}
    assert expected.items() >= found.items()
    assert len(expected) > 50
    assert len(found) >= 0.97 * len(expected)


def test_the_threshold_itself_is_enough():
    # n letters and n + 1 share n - 1 shingles of n + 2: 12 of 15.
    texts = ["abcdefghijklm", "abcdefghijklmn"]
    assert near_pairs(texts, 0.8) == [(0, 1, 0.8)]
    assert near_pairs(texts, 0.8001) == []
    assert near_pairs(["abc", "abd"], 0.1) == [(0, 1, 0.2)]


def test_texts_with_the_same_shingles_are_a_pair_at_one():
    assert near_pairs(["ha haha", "ha hahaha", "ha"], 1.0) == [(0, 1, 1.0)]


def test_equal_seeds_give_equal_pairs():
    rng = random.Random(3)
    texts = planted(rng, [" ".join(rng.choices(WORDS, k=8)) for _ in range(40)])
    assert near_pairs(texts, 0.6, seed=5) == near_pairs(texts, 0.6, seed=5)


@pytest.mark.parametrize("threshold", [0, 0.09, 1.01, -1, float("nan")])
def test_thresholds_out_of_range_are_refused(threshold):
    with pytest.raises(SettingsError, match=r"between 0\.1 and 1, not"):
        audit([example("a", "Why?")], [example("b", "Why?")], threshold=threshold)


def test_too_many_pairs_are_refused_before_they_fill_the_memory(monkeypatch):
    monkeypatch.setattr(duplicates, "_MOST_PAIRS", 20)
    start = "answer the question by what you know of the history of the world and in few words "
    texts = [start + str(number) for number in range(12)]
    with pytest.raises(DataError, match=r"more than 20 pairs .* as similar as 0\.8"):
        near_pairs(texts)
    assert len(near_pairs(texts[:6])) == 15


# --- the audit of two sets


CHOPIN = "How old was Chopin when he moved to Warsaw with his family?"
CHOPIN_TOO = "How old was Chopin when his family moved to Warsaw?"
TRAIN = [
    example("t1", "Which metal melts in the hand?", "gallium"),
    example("t2", "which METAL melts in the hand", "caesium"),
    example("t3", CHOPIN_TOO, "seven months", "7 months"),
    example("t4", "Who wrote Emma?", "Jane Austen"),
    example("t5", "What is the tallest mountain of Peru?", "Huascarán"),
]
TEST = [
    example("q1", "Which metal melts in the hand?!", "Gallium.", "the metal gallium"),
    example("q2", "“Which metal melts — in the hand?”", "mercury"),
    example("q3", CHOPIN, "The 7 months", "Seven months"),
    example("q4", "How old was Chopin when he moved to Warsaw with family?", "seven months"),
    example("q5", "Who wrote Emma?"),
    example("q6", "Why do cats purr?", "nobody knows"),
]


def test_two_sets():
    leaks = audit(TRAIN, TEST)
    assert leaks.counts == {"train": 5, "test": 6, "unanswerable": 1}
    texts = [normalize_text(one.query.text) for one in (*TEST, *TRAIN)]
    alike = jaccard(texts[2], texts[8])
    short = jaccard(texts[3], texts[8])
    within = jaccard(texts[2], texts[3])
    assert within > alike >= 0.8 > short > 0.7  # brute force: q4 is not near enough to t3
    assert leaks.pairs == (
        Pair(
            ("q1", "q2"),
            ("t1", "t2"),
            "Which metal melts in the hand?!",
            "Which metal melts in the hand?",
            1.0,
            True,
            ("q1",),
        ),
        Pair(("q5",), ("t4",), "Who wrote Emma?", "Who wrote Emma?", 1.0, True, ()),
        Pair(("q3",), ("t3",), CHOPIN, CHOPIN_TOO, alike, False, ("q3",)),
    )
    metal = "Which metal melts in the hand?"
    assert leaks.train_pairs == (Pair(("t1", "t2"), ("t1", "t2"), metal, metal, 1.0, True, ()),)
    first, second = TEST[0].query.text, TEST[3].query.text
    assert leaks.test_pairs == (
        Pair(("q1", "q2"), ("q1", "q2"), first, first, 1.0, True, ()),
        Pair(("q3",), ("q4",), CHOPIN, second, within, False, ()),
    )
    assert leaks.shares == {
        "exact": Share(3, 6),
        "near": Share(1, 6),
        "leaked": Share(4, 6),
        "exact_answered": Share(1, 5),
        "near_answered": Share(1, 5),
        "train_duplicates": Share(2, 5),
        "test_duplicates": Share(4, 6),
    }
    assert not leaks.one_set
    assert leaks.passages == leaks.absent == ()


def test_a_lower_threshold_finds_more():
    leaks = audit(TRAIN, TEST, threshold=0.7)
    assert {pair.ids for pair in leaks.pairs if not pair.exact} == {("q3",), ("q4",)}
    # q4 has one of the two answers of t3: not the same set.
    assert leaks.shares["near_answered"] == Share(1, 5)
    assert leaks.threshold == 0.7


def test_the_same_answers_are_the_same_after_normalisation():
    train = [example("t", "Who?", "The Beatles"), example("u", "Who?", "The")]
    test = [example("a", "who", "beatles!"), example("b", "who", "THE"), example("c", "who", "a")]
    assert audit(train, test).pairs[0].answered == ("a", "b")
    blank = [example("t", "Who?", " ")], [example("a", "who", "")]
    leaks = audit(*blank)
    assert leaks.pairs[0].answered == ()
    assert leaks.counts["unanswerable"] == 1


def test_questions_without_answers_have_no_answers_in_common():
    train, test = [example("t", "abcdefghijklm")], [example("q", "abcdefghijklmn")]
    leaks = audit(train, test)
    assert [(pair.similarity, pair.answered) for pair in leaks.pairs] == [(0.8, ())]
    assert leaks.shares["near_answered"] == Share(0, 0)


def test_near_pairs_go_both_ways_between_sets():
    train = [example("t1", "abcdefghijklm"), example("t2", "abcdefghijklmn")]
    test = [example("q2", "abcdefghijklmn"), example("q1", "abcdefghijklm")]
    leaks = audit(train, test)
    assert [(pair.ids, pair.other_ids, pair.similarity) for pair in leaks.pairs] == [
        (("q2",), ("t2",), 1.0),
        (("q1",), ("t1",), 1.0),
        (("q2",), ("t1",), 0.8),
        (("q1",), ("t2",), 0.8),
    ]
    assert leaks.shares["leaked"] == leaks.shares["near"] == leaks.shares["exact"] == Share(2, 2)


def test_shares_equal_brute_force_over_planted_leaks():
    rng = random.Random(5)
    base = list(
        dict.fromkeys(" ".join(rng.choices(WORDS, k=rng.randint(5, 12))) for _ in range(90))
    )
    train = [example(f"t{place}", text.title() + "?") for place, text in enumerate(base)]
    fresh = [" ".join(rng.choices(WORDS, k=9)) for _ in range(40)]
    texts = [*base[:20], *(edited(text, rng) for text in base[20:60]), *fresh]
    test = [example(f"q{place}", text) for place, text in enumerate(texts)]
    leaks = audit(train, test)
    exact = {text for text in texts if text in set(base)}
    near = [
        text for text in texts if any(text != own and jaccard(text, own) >= 0.8 for own in base)
    ]
    assert len(near) > 10
    assert leaks.shares["exact"] == Share(sum(text in exact for text in texts), len(texts))
    assert leaks.shares["near"] == Share(len(near), len(texts))


def test_scripts_and_one_word():
    train = [
        example("t1", "澳大利亚的首都是哪里？"),
        example("t2", "ما هي عاصمة أستراليا؟"),
        example("t3", "Why?"),
        example("t4", "?"),
    ]
    test = [
        example("q1", "澳大利亚的首都是哪里"),
        example("q2", "ما هي عاصمة أستراليا"),
        example("q3", "WHY"),
        example("q4", "!"),
        example("q5", "Who?"),
    ]
    pairs = audit(train, test).pairs
    assert [(pair.ids, pair.other_ids) for pair in pairs] == [
        (("q1",), ("t1",)),
        (("q2",), ("t2",)),
        (("q3",), ("t3",)),
    ]


def test_many_questions_of_one_text_are_one_pair():
    train = [example(f"t{place}", "Summarise the text.", str(place)) for place in range(3000)]
    test = [example(f"q{place}", "summarise the text", str(place * 2)) for place in range(2000)]
    leaks = audit(train, test)
    assert len(leaks.pairs) == len(leaks.train_pairs) == len(leaks.test_pairs) == 1
    assert leaks.shares["exact"] == Share(2000, 2000)
    assert leaks.shares["exact_answered"] == Share(1500, 2000)
    assert leaks.train_pairs[0].answered == ()


# --- one set


def test_a_set_is_no_leak_of_itself():
    leaks = audit(TEST, TEST)
    assert leaks.one_set
    assert leaks.counts == {"train": 6, "test": 6, "unanswerable": 1}
    assert leaks.pairs == leaks.test_pairs == leaks.train_pairs == audit(TRAIN, TEST).test_pairs
    assert leaks.shares["exact"] == Share(2, 6)
    assert leaks.shares["near"] == Share(2, 6)
    assert leaks.shares["leaked"] == leaks.shares["test_duplicates"] == Share(4, 6)
    alone = [example("a", "Why?", "so"), example("b", "Who wrote Emma?", "so")]
    leaks = audit(alone, alone)
    assert leaks.pairs == ()
    assert leaks.shares["leaked"] == leaks.shares["exact_answered"] == Share(0, 2)


def test_answers_within_one_set_are_compared_with_those_of_others():
    questions = [
        example("a", "Who?", "x", "y"),
        example("b", "who", "y", "z"),
        example("c", "WHO", "w"),
        example("d", "abcdefghijklm", "x", "y"),
        example("e", "abcdefghijklmn", "y", "x"),
    ]
    leaks = audit(questions, questions)
    assert [pair.answered for pair in leaks.pairs] == [("a", "b"), ("d", "e")]
    assert leaks.shares["exact_answered"] == leaks.shares["near_answered"] == Share(2, 5)


def test_the_same_questions_in_two_sets_all_leak():
    leaks = audit(TEST, list(TEST))
    assert leaks.shares["exact"] == Share(6, 6)
    assert leaks.shares["exact_answered"] == Share(5, 5)
    assert not leaks.one_set


# --- documents


def documents(*texts):
    return [Document(f"d{place}", text) for place, text in enumerate(texts)]


def test_documents():
    train = [example("t", "What?", "never sought")]
    test = [
        example("q1", "How do the cats of Egypt purr?", "with the larynx", "by day"),
        example("q2", "How old is he?", "seven", "nine"),  # four words are too few
        example("q3", "how do the cats of egypt purr", "larynx muscles"),
        example("q4", "Who wrote the novel about copper mines?"),
        example("q5", "Is tin a metal or not?", "The"),
    ]
    corpus = [
        Document("a", "So: how do the CATS of Egypt… purr? With a larynx.", "Cats"),
        Document("b", "How old is he? He is seventy. It is well-known.", "Nine"),
        Document("c", "or not? larynx", "Is tin a metal"),
        Document("d", "muscles of the larynx, by day."),
    ]
    leaks = audit(train, test, iter(corpus))
    assert leaks.counts == {"train": 1, "test": 5, "unanswerable": 1, "documents": 4}
    cats = "How do the cats of Egypt purr?"
    assert leaks.passages == (
        Passage(("q1", "q3"), cats, "a"),
        Passage(("q5",), "Is tin a metal or not?", "c"),
    )
    # "with a larynx" and "with the larynx" are one after normalisation; "larynx" ends one document
    # and "muscles" begins the next; "seven" is no whole word; "nine" is in a title alone,
    # and "the" in a text.
    assert leaks.absent == (
        Absent("q2", "How old is he?", ("seven", "nine"), True),
        Absent("q3", "how do the cats of egypt purr", ("larynx muscles",), True),
    )
    assert leaks.shares["in_documents"] == Share(3, 4)
    assert leaks.shares["absent_answers"] == Share(3, 6)
    assert leaks.shares["without_answers"] == Share(2, 4)


def test_answers_that_are_partly_absent():
    test = [example("q", "Why?", "Because", "Since", "since.")]
    leaks = audit(test, test, documents("Well, since we know."))
    assert leaks.absent == (Absent("q", "Why?", ("Because",), False),)
    assert leaks.shares["absent_answers"] == Share(1, 2)
    assert leaks.shares["without_answers"] == Share(0, 1)


def test_every_document_with_a_question_is_listed():
    test = [example("q", "Who wrote the long novel?"), example("p", "Is rain the wettest of all?")]
    text = "Is rain the wettest of all? Who wrote the long novel?"
    leaks = audit(test, test, documents(text, "Rain.", text, text))
    listed = [(passage.document, passage.ids) for passage in leaks.passages]
    assert sorted(listed) == [(f"d{place}", (name,)) for place in (0, 2, 3) for name in ("p", "q")]
    assert [document for document, _ in listed] == ["d0", "d0", "d2", "d2", "d3", "d3"]
    assert leaks.shares["in_documents"] == Share(2, 2)
    assert leaks.shares["without_answers"].share is None


def test_answers_are_sought_as_cover_match_does():
    rng = random.Random(2)
    alphabet = [
        "the",
        "a",
        "tin",
        "Tin",
        "iron-ore",
        "ore",
        "3.5",
        "35",
        "C++",
        "!",
        "–",
        "é",
        "an",
    ]
    texts = [" ".join(rng.choices(alphabet, k=rng.randint(0, 8))) for _ in range(60)]
    answers = [" ".join(rng.choices(alphabet, k=rng.randint(1, 3))) for _ in range(300)]
    answers += ["The", "a", "!", "?", "tin !", "iron", "in"]
    held = seek([], map(answer_key, answers), documents(*texts))
    expected = {
        answer_key(answer)
        for answer in answers
        if not any(cover_match(text, [answer]) for text in texts)
    }
    assert held.missing == expected
    assert 20 < len(expected) < len({answer_key(answer) for answer in answers}) - 20
    assert {"?", "iron", "in"} <= expected
    assert held.documents == 60


def test_phrases_are_found_as_by_brute_force():
    rng = random.Random(4)
    phrases = sorted({" ".join(rng.choices(WORDS[:12], k=rng.randint(1, 4))) for _ in range(200)})
    sought = Phrases(phrases + phrases)
    for _ in range(30):
        text = " ".join(rng.choices(WORDS[:12], k=20))
        assert sought.within(text) == [one for one in phrases if f" {one} " in f" {text} "]
    for phrase in phrases:
        sought.discard(phrase)
    assert not sought
    assert sought.within("when where why") == []


# --- bad input, progress, JSON, table


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([], TEST, "no train questions"),
        (TRAIN, [], "no test questions"),
        (TRAIN + TRAIN[:1], TEST, "1 ids occur more than once among the train questions: 't1'"),
        (TRAIN, TEST[1:] + TEST[2:], "4 ids .* among the test questions: 'q3', 'q4'"),
        (TRAIN, [*TEST, example("blank", " \n")], "1 test questions are blank: 'blank'. Leave"),
        ([example("blank", "")], TEST, "1 train questions are blank: 'blank'"),
    ],
)
def test_questions_that_cannot_be_compared_are_refused(train, test, message):
    with pytest.raises(DataError, match=message):
        audit(train, test)


def test_one_set_without_questions_is_refused():
    nothing = []
    with pytest.raises(DataError, match="no test questions"):
        audit(nothing, nothing)


def test_no_documents_are_refused():
    with pytest.raises(DataError, match="no documents"):
        audit(TRAIN, TEST, [])


def test_progress():
    told = []
    audit(TRAIN, TEST, documents("x", "y"), progress=lambda *stage: told.append(stage))
    assert told == [
        ("questions", 0, 7),
        ("questions", 7, 7),
        ("documents", 0, 2),
        ("documents", 2, 2),
    ]
    told.clear()
    many = [example(str(number), chr(ord("a") + number % 26) * number) for number in range(1, 301)]
    audit(many, many, iter(documents(*["x"] * 300)), progress=lambda *stage: told.append(stage))
    assert told == [
        *(("questions", done, 300) for done in (0, 256, 300)),
        *(("documents", done, None) for done in (0, 256)),
        ("documents", 300, 300),
    ]


def test_json():
    leaks = audit(TRAIN, TEST, documents("Which metal melts in the hand? Gallium. Nobody knows."))
    value = json.loads(json.dumps(leaks.to_json()))
    assert value["shares"]["exact"] == {"count": 3, "n": 6, "share": 0.5}
    assert value["counts"]["documents"] == 1
    assert value["pairs"][0] == {
        "ids": ["q1", "q2"],
        "other_ids": ["t1", "t2"],
        "text": "Which metal melts in the hand?!",
        "other_text": "Which metal melts in the hand?",
        "similarity": 1.0,
        "exact": True,
        "answered": ["q1"],
    }
    assert value["passages"] == [
        {"ids": ["q1", "q2"], "text": "Which metal melts in the hand?!", "document": "d0"}
    ]
    assert value["absent"][0] == {
        "id": "q1",
        "text": "Which metal melts in the hand?!",
        "answers": ["the metal gallium"],
        "all": False,
    }
    assert len(value["train_pairs"]) == 1
    alone = audit(TEST, TEST).to_json()
    assert len(alone["pairs"]) == 2
    assert alone["train_pairs"] == alone["test_pairs"] == ()
    unanswerable = [example("a", "Why?")]
    assert audit(unanswerable, TEST).to_json()["shares"]["near"]["share"] == 0.0
    assert audit(TEST, unanswerable).to_json()["shares"]["near_answered"]["share"] is None


def text_of(table):
    console = Console(width=120, file=io.StringIO())
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def row(shown, kind):
    line = next(line for line in shown.splitlines() if f"│ {KINDS[kind]} " in line)
    return [cell.strip() for cell in line.split("│")[2:-1]]


def test_table():
    shown = text_of(leaks_table(audit(TRAIN, TEST, documents("Seven months.")), "train x test"))
    assert "train x test" in shown
    assert row(shown, "exact") == ["3", "6", "50.00%"]
    assert row(shown, "near_answered") == ["1", "5", "20.00%"]
    assert row(shown, "in_documents") == ["0", "4", "0.00%"]
    assert row(shown, "without_answers") == ["3", "5", "60.00%"]
    assert "a similarity of 0.8 or more" in shown
    unanswered = [example("a", "Why?")]
    shown = text_of(leaks_table(audit(unanswered, unanswered)))
    assert row(shown, "exact_answered") == ["0", "0", ""]
    assert "documents" not in shown
    assert "compared with itself" in shown


def test_a_seed_settles_the_pairs_in_every_process():
    code = (
        "import hashlib, random\n"
        "from ragkit.evaluation.duplicates import near_pairs\n"
        "rng = random.Random(3)\n"
        "texts = list({''.join(rng.choices('abc ', k=40)).strip(): 0 for _ in range(300)})\n"
        "print(hashlib.sha256(repr(near_pairs(texts, 0.5, seed=1)).encode()).hexdigest())\n"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(told) == 1
