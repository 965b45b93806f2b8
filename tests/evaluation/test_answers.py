import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from ragkit.evaluation.answers import (
    abstention_measures,
    answer_measures,
    answer_rank,
    citation_measures,
    cover_match,
    exact_match,
    normalize_answer,
    rouge_l,
    telling,
    token_f1,
)


def test_answer_rank():
    texts = ["Nothing here.", "A port in Brazil.", "It is the Amazon, I think."]
    assert answer_rank(texts, ["Nile", "amazon"]) == 3
    assert answer_rank(texts, ["zon"]) == 0
    assert answer_rank([], ["amazon"]) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel-Tower, in\tPARIS!", "eiffeltower in paris"),
        ("an apple a day", "apple day"),
        ("another theory", "another theory"),
        ("3.5", "35"),
        ("$1,000", "1000"),
        ("“quoted” – dash…", "“quoted” – dash…"),
        ("O'Neill's", "oneills"),
        ("The", ""),
        ("  ", ""),
    ],
)
def test_normalize_answer(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "golds", "exact", "f1", "cover"),
    [
        ("Paris", ["paris."], 1, 1, 1),
        ("in Paris", ["Paris"], 0, 2 / 3, 1),
        ("Paris", ["in Paris"], 0, 2 / 3, 0),
        ("the city of Paris, France", ["Lyon", "Paris France"], 0, 2 * 2 / (4 + 2), 1),
        ("a b b c", ["b b d"], 0, 2 * 2 / (3 + 3), 0),  # "a" is an article
        ("parish", ["Paris"], 0, 0, 0),
        ("", ["Paris"], 0, 0, 0),
        ("the", ["Paris"], 0, 0, 0),
        # Golds that normalise to nothing are compared as they are.
        ("The The", ["The The"], 1, 1, 1),
        ("An A", ["The The"], 0, 0, 0),
        ("the band the the.", ["The The"], 0, 0, 1),
        ("lathe thence", ["the"], 0, 0, 0),
        ("!", ["?"], 0, 0, 0),
        ("Hello!", ["!"], 0, 0, 1),
        ("", ["!"], 0, 0, 0),
        ("", [""], 1, 1, 1),
        ("Paris", [""], 0, 0, 0),
        # Numbers, as the official script has them.
        ("1,000", ["1000"], 1, 1, 1),
        ("1000 km", ["1,000"], 0, 2 / 3, 1),
        ("1999", ["99"], 0, 0, 0),
        ("“Paris”", ["Paris"], 0, 0, 0),
        ("Paris", [], 0, 0, 0),
    ],
)
def test_answer_scores(text, golds, exact, f1, cover):
    assert exact_match(text, golds) == exact
    assert token_f1(text, golds) == pytest.approx(f1)
    assert cover_match(text, golds) == cover


def test_answers_that_most_texts_hold_are_not_telling():
    answers = ["No.", "YES", "7", "a b", "an x", "水", "no one", "17", "…", "Oslo"]
    answers += ["A", "the", "The.", "-", " ! ", ""]
    assert telling(answers) == ["水", "no one", "17", "…", "Oslo"]


def test_f1_takes_the_best_gold_and_not_a_mixture():
    assert token_f1("red green", ["red x y z", "green"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "golds", "abstained", "expected"),
    [
        ("I don't know.", [], True, (1, 1, 1, 1)),
        ("Paris", [], False, (0, 0, 0, 0)),
        ("I don't know the way.", ["know your way"], True, (0, 0, 0, 0)),
        ("Unknown.", ["unknown"], True, (1, 1, 1, 1)),
        ("to Paris", ["Paris"], False, (0, 2 / 3, 1, 2 / 3)),
        ("the Paris", ["Paris"], False, (1, 1, 1, 2 / 3)),  # ROUGE-L counts articles
    ],
)
def test_abstention(text, golds, abstained, expected):
    scores = answer_measures(text, golds, abstained=abstained)
    names = ("EM", "F1", "cover", "ROUGE-L")
    assert scores == pytest.approx(dict(zip(names, expected, strict=True)))


@given(st.text(max_size=30), st.lists(st.text(max_size=20), max_size=3))
def test_exact_match_implies_the_others(text, golds):
    exact, f1, cover = (score(text, golds) for score in (exact_match, token_f1, cover_match))
    assert 0 <= exact <= f1 <= 1
    assert exact <= cover


def f_measure(common, words, gold_words):
    precision, recall = common / words, common / gold_words
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("text", "golds", "expected"),
    [
        # Lin 2004, section 3.1: "police kill the gunman" beside the reference.
        ("police kill the gunman", ["police killed the gunman"], 3 / 4),
        ("the gunman kill police", ["police killed the gunman"], 2 / 4),
        ("a b c d e", ["a x c y e z w"], f_measure(3, 5, 7)),
        ("b a", ["a b"], f_measure(1, 2, 2)),
        ("a a a", ["a"], f_measure(1, 3, 1)),
        ("It was Paris.", ["Lyon", "Paris", "was it Paris"], f_measure(2, 3, 3)),
        ("U.S.-born_man", ["u s born man"], 1),
        ("running", ["run"], 0),  # nothing is stemmed
        ("!", ["!"], 0),
        ("", [""], 0),
        ("Paris", [], 0),
    ],
)
def test_rouge_l_by_hand(text, golds, expected):
    assert rouge_l(text, golds) == pytest.approx(expected)


ASCII = st.text(st.characters(max_codepoint=127), max_size=40)
WORDS = st.lists(
    st.sampled_from(["a", "The", "x-y", "it's", "3.5", "_b_", "\n", "C++"]), max_size=12
)


@given(ASCII | WORDS.map(" ".join), st.lists(ASCII | WORDS.map(" ".join), min_size=1, max_size=3))
def test_on_ascii_rouge_l_is_the_packages_own(text, golds):
    expected = RougeScorer(["rougeL"]).score_multi(golds, text)["rougeL"].fmeasure
    assert rouge_l(text, golds) == expected


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("Η Αθήνα είναι πόλη", "Αθήνα", f_measure(1, 4, 1)),
        ("ΑΘΉΝΑ", "αθήνα", 1),
        ("Αθήνα", "Σπάρτη", 0),
        ("Crème brûlée", "creme brulee", 0),
        ("Cre\u0300me", "Cr\u00e8me", 1),  # composed or not
        ("ＦＩＦＡ ２０２２", "FIFA 2022", 1),
        ("दिल्ली भारत", "दिल्ली", f_measure(1, 2, 1)),  # a vowel sign does not end a word
        ("दिल्ली", "दलाली", 0),
        ("서울 입니다", "서울", f_measure(1, 2, 1)),
        ("東京都", "東京", f_measure(2, 3, 2)),
        ("答えは東京です。", "東京", f_measure(2, 7, 2)),
        ("京東", "東京", 1 / 2),
        ("กรุงเทพ", "กรุง", f_measure(4, 7, 4)),
        ("𠮷野家", "吉野家", 2 / 3),
        ("HTTP协议", "http 协议", 1),
        ("don´t", "don't", 1),
        ("ﬁve ㎏", "five kg", 1),
        ("“Paris” – 1 000 €", "paris 1 000", 1),
        ("…", "…", 0),
        ("\ud800", "\ud800", 0),
    ],
)
def test_rouge_l_in_other_scripts(text, gold, expected):
    assert rouge_l(text, [gold]) == pytest.approx(expected)


@given(st.text(max_size=30), st.text(max_size=30))
def test_rouge_l_is_symmetric_and_one_for_the_same_words(text, other):
    assert 0 <= rouge_l(text, [other]) <= 1
    assert rouge_l(text, [other]) == pytest.approx(rouge_l(other, [text]))
    if any(character.isalnum() for character in text):
        assert rouge_l(text, [text]) == 1


def test_the_packages_import_waits_until_it_is_needed():
    code = "import sys, ragkit.evaluation.answers; print('nltk' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("cited", "relevant", "shown", "precision", "recall"),
    [
        (["a"], {"a"}, ["a", "b"], (1, 1), (1, 1)),
        (["b", "a"], {"a"}, ["a", "b"], (1, 2), (1, 1)),
        (["b"], {"a", "c"}, ["a", "b", "c"], (0, 1), (0, 2)),
        (["a", "c"], {"a", "c", "z"}, ["a", "b", "c"], (2, 2), (2, 2)),  # z was not shown
        (["b"], {"z"}, ["a", "b"], (0, 1), (0, 0)),  # no gold was shown
        ([], {"a"}, ["a", "b"], (0, 0), (0, 1)),  # cites nothing
        ([], {"a"}, [], (0, 0), (0, 0)),
        (["m", "m", "l"], {"m"}, ["m", "l", "m"], (1, 2), (1, 1)),  # pieces of one document
    ],
)
def test_citations_by_hand(cited, relevant, shown, precision, recall):
    expected = {"citation precision": precision, "citation recall": recall}
    assert citation_measures(cited, relevant, shown) == expected


def test_abstentions_by_hand():
    cases = [(True, ()), (True, ("Paris",)), (False, ()), (False, ("Paris",)), (True, ())]
    ratios = [abstention_measures(abstained, golds) for abstained, golds in cases]
    assert [ratio["abstention precision"] for ratio in ratios] == [
        (1, 1), (0, 1), (0, 0), (0, 0), (1, 1),
    ]  # fmt: skip
    assert [ratio["abstention recall"] for ratio in ratios] == [
        (1, 1), (0, 0), (0, 1), (0, 0), (1, 1),
    ]  # fmt: skip
