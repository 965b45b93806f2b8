"""Contexts mixed on purpose: what is drawn, how often, and what it is to be answered with."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from scipy.stats import binomtest, chisquare

from ragkit.errors import DataError, SettingsError
from ragkit.evaluation.duplicates import normalize_text, shingles
from ragkit.prompts import Prompt, abstains, build_prompt, citations, without_citations
from ragkit.styles import ABSTENTION, STYLES, style_named
from ragkit.training.mixes import ContextDraws, Mix, tally
from ragkit.types import Document, Example, Hit, Query

FILLER = [
    "Lead is heavy and grey, and was once used for pipes.",
    "Brie is a soft cheese from the north of France.",
    "Iron rusts where water and air come to it together.",
    "Zinc keeps roofs and buckets from the weather.",
    "Copper turns green when it has stood in the rain.",
    "Bees tell each other where to fly by dancing.",
    "A barge carries coal along the canal at walking pace.",
    "Owls turn their heads further than most birds do.",
]
METALS = ["tin", "gallium", "nickel", "silver", "cobalt"]
MIX = "gold:.4,retrieved:.3,distractors:.2,none:.1"


def negatives(name, count=8):
    return tuple(Document(f"{name}-n{n}", FILLER[n]) for n in range(count))


def example(name, **fields):
    gold = Document(f"{name}-gold", f"Of all metals it is {name} that melts in the hand.")
    given = {"positives": (gold,), "negatives": negatives(name), "answers": (name,)} | fields
    return Example(Query(name, f"Which metal is {name}?"), **given)


def hits(*documents):
    return [Hit(document, 50.0 - rank) for rank, document in enumerate(documents)]


EXAMPLES = [example(name) for name in METALS]
FOUND = [hits(*e.negatives[:2], *e.positives, *e.negatives[2:]) for e in EXAMPLES]


def drawn(mix=MIX, examples=EXAMPLES, found=FOUND, *, steps=2000, passages=(1, 5), **settings):
    return ContextDraws(
        examples, found, Mix.parse(mix), steps=steps, batch=5, passages=passages, **settings
    )


def one(kind, given, found=(), *, passages=(3, 3), steps=20, **settings):
    """Draws of one example and one kind."""
    return list(drawn(f"{kind}:1", [given], [found], passages=passages, steps=steps, **settings))


def ids(draw):
    return [hit.document.id for hit in draw.hits]


# --- mixes


def test_a_mix_is_read_as_it_is_written():
    shares = {"gold": 0.4, "retrieved": 0.3, "distractors": 0.2, "none": 0.1}
    assert Mix.parse(MIX) == Mix(shares)
    assert Mix.parse(" gold : 1 ") == Mix({"gold": 1.0})
    assert str(Mix.parse(MIX)) == "gold:0.4,retrieved:0.3,distractors:0.2,none:0.1"
    assert Mix.parse(str(Mix(shares))) == Mix(shares)
    assert Mix.parse("gold:.3333333,none:.6666667").shares["none"] == 0.6666667


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gold:.5,silver:.5", "unknown kind 'silver'; known are gold, retrieved, distractors"),
        ("gold:1.5,none:-.5", "the share of none must be a number from 0 to 1, not -0.5"),
        ("gold:nan", "the share of gold must be a number from 0 to 1, not nan"),
        ("gold:inf", "the share of gold must be a number from 0 to 1, not inf"),
        ("gold:.5,none:.49", "sum to 0.99. Make them sum to 1"),
        ("gold:.5,none:.500002", "sum to 1"),
        ("gold:.5,gold:.5", "gold stands there twice"),
        ("gold", "'gold' is no KIND:SHARE"),
        ("gold:1,", "'' is no KIND:SHARE"),
        ("", "'' is no KIND:SHARE"),
        ("gold:much", "'gold:much' is no KIND:SHARE"),
    ],
)
def test_a_mix_that_is_none_is_refused(text, message):
    with pytest.raises(SettingsError, match=message):
        Mix.parse(text)


# --- what is drawn


def test_kinds_are_drawn_by_their_shares():
    kinds = Counter(draw.kind for draw in drawn())
    for kind, share in Mix.parse(MIX).shares.items():
        assert binomtest(kinds[kind], 10_000, share).pvalue > 1e-4


def test_gold_stands_at_every_place_alike_and_every_number_is_as_likely():
    draws = list(drawn("gold:.8,distractors:.2", steps=700, passages=(2, 5)))
    gold = [draw for draw in draws if draw.kind == "gold"]
    for draws_of_kind in (gold, [draw for draw in draws if draw.kind == "distractors"]):
        numbers = Counter(len(draw.hits) for draw in draws_of_kind)
        assert set(numbers) == {2, 3, 4, 5} and chisquare(list(numbers.values())).pvalue > 1e-4
    for number in (2, 3, 4, 5):
        places = Counter(draw.gold for draw in gold if len(draw.hits) == number)
        assert set(places) == {(place,) for place in range(number)}
        assert chisquare(list(places.values())).pvalue > 1e-4


def test_distractors_are_drawn_alike_and_in_any_order():
    draws = one("distractors", EXAMPLES[0], FOUND[0], steps=150)
    for place in range(3):
        seen = Counter(ids(draw)[place] for draw in draws)
        assert set(seen) == {document.id for document in EXAMPLES[0].negatives}
        assert chisquare(list(seen.values())).pvalue > 1e-4


def test_each_epoch_passes_through_all_examples_anew():
    orders = [tuple(draw.example for draw in drawn(steps=6))[at : at + 5] for at in range(0, 30, 5)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len(set(orders)) > 1


def test_all_answers_are_targets():
    given = replace(EXAMPLES[0], answers=("tin", " ", "Tin metal"))
    answers = Counter(draw.answer for draw in one("gold", given, steps=100))
    assert set(answers) == {"tin", "Tin metal"} and chisquare(list(answers.values())).pvalue > 1e-4


def test_a_draw_follows_from_the_seed_and_its_place_alone():
    whole = list(drawn(steps=40, seed=3))
    again = drawn(steps=90, seed=3)
    assert [again[place] for place in reversed(range(200))] == whole[::-1]
    assert list(drawn(steps=40, seed=4)) != whole


PRINTS = """
from ragkit.training.mixes import ContextDraws, Mix
from ragkit.types import Document, Example, Query
texts = "ash birch cedar elm fir hazel larch maple".split()
documents = tuple(Document(text, f"The {text} is a tree of the hills.") for text in texts)
gold = (Document("g1", "Oak is hard."), Document("g2", "The oak grows slowly."))
examples = [Example(Query(str(n), "What?"), gold, documents, ("oak", "Oak")) for n in range(3)]
mix = Mix({"gold": 0.6, "distractors": 0.3, "none": 0.1})
draws = ContextDraws(examples, [[]] * 3, mix, steps=8, batch=5, passages=(2, 6), seed=3)
print([(d.example, d.kind, [h.document.id for h in d.hits], d.target()) for d in draws])
"""


def test_all_processes_draw_the_same():
    done = [
        subprocess.run(
            [sys.executable, "-c", PRINTS],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert done[0] == done[1] and done[0].count("oak") + done[0].count("Oak") > 10


@pytest.mark.parametrize("place", [-1, 15])
def test_there_is_no_draw_beyond_the_run(place):
    draws = drawn(steps=3)
    assert len(draws) == 15
    with pytest.raises(IndexError):
        draws[place]


def test_every_kind_shows_what_it_says():
    for draw in drawn(passages=(2, 6), steps=400, citations=True):
        asked = EXAMPLES[draw.example]
        gold = f"{asked.query.id}-gold"
        places = [place for place, name in enumerate(ids(draw)) if name == gold]
        assert draw.gold == tuple(places) and draw.holding == ()
        assert draw.wanted == draw.kind and len(draw.hits) == draw.count
        assert len(set(ids(draw))) == len(draw.hits)
        assert all(a.score > b.score for a, b in zip(draw.hits, draw.hits[1:], strict=False))
        cited = f"{asked.query.id} [{places[0] + 1}]" if places else None
        if draw.kind == "none":
            assert draw.hits == () and draw.target() == asked.query.id
            continue
        assert 2 <= len(draw.hits) <= 6
        if draw.kind == "gold":
            assert len(places) == 1 and draw.target() == cited
        elif draw.kind == "retrieved":
            assert list(draw.hits) == FOUND[draw.example][: len(draw.hits)]
            assert draw.target() == (ABSTENTION if len(draw.hits) == 2 else cited)
        else:
            assert not places and draw.target() == ABSTENTION


# --- gold


def test_a_random_number_of_gold_passages_or_all_of_them():
    more = tuple(Document(f"more{n}", f"{FILLER[n]} So is tin.") for n in range(3))
    given = replace(EXAMPLES[0], positives=(*more, Document("copy", more[0].text)))
    numbers = Counter(len(draw.gold) for draw in one("gold", given, passages=(4, 4), steps=200))
    assert set(numbers) == {1, 2, 3} and chisquare(list(numbers.values())).pvalue > 1e-4
    shown = {frozenset(ids(draw)[p] for p in draw.gold) for draw in one("gold", given, steps=60)}
    assert len(shown) == 7  # the copy is no passage of its own
    for draw in one("gold", given, passages=(4, 4), all_gold=True, citations=True):
        assert len(draw.gold) == 3 and len(draw.hits) == 4
        assert citations(draw.target(), 4) == draw.gold
        assert without_citations(draw.target()) == "tin"
    assert {len(d.gold) for d in one("gold", given, passages=(2, 2), all_gold=True)} == {2}


def test_without_positives_gold_is_what_is_judged_or_what_holds_an_answer():
    given = replace(EXAMPLES[0], positives=(), negatives=())
    holding = [Document("a", "They say TIN is odd."), Document("b", "Old tin, new tin.")]
    found = hits(*negatives("x", 2), *holding, *negatives("x", 8)[2:])
    for draw in one("gold", given, found):
        assert [ids(draw)[place] for place in draw.gold] == ["a"]
        assert "b" not in ids(draw) and draw.target() == "tin"
    for judged, gold in (({"x-n5": 1, "x-n1": 0}, "x-n5"), ({"x-n5": 1, "b": 2}, "b")):
        for draw in one("gold", given, found, judged={"tin": judged, "lead": {"x-n7": 1}}):
            assert [ids(draw)[place] for place in draw.gold] == [gold]
            assert not {"a", "b", "x-n5"} & set(ids(draw)) - {gold}


def test_a_piece_beside_the_gold_one_is_neither_gold_nor_a_distractor():
    def piece(number, text):
        place = {"parent": "metals", "start": number, "end": number + 9}
        return Document(f"metals#{number}", text, "", place)

    gold, beside = piece(0, "It is tin that melts."), piece(1, FILLER[0])
    given = replace(EXAMPLES[0], positives=(gold,), negatives=(beside, *negatives("x", 8)[1:]))
    assert all("metals#1" not in ids(draw) for draw in one("gold", given, steps=60))
    (draw,) = one("retrieved", given, hits(beside, gold), passages=(2, 2), steps=1)[:1]
    assert draw.gold == (1,)
    (draw,) = one("retrieved", given, hits(beside), steps=1)[:1]
    assert draw.target() == ABSTENTION


# --- distractors


def test_no_distractor_is_relevant_or_alike_or_holds_an_answer():
    gold = EXAMPLES[0].positives[0]
    near = Document("near", gold.text.replace("tin", "it").replace("melts", "melt"))
    alike = [shingles(normalize_text(each.text)) for each in (gold, near)]
    assert len(alike[0] & alike[1]) / len(alike[0] | alike[1]) >= 0.8
    wrong = (
        gold,
        Document("copy", gold.text),
        near,
        Document("holds", "Cans are made of Tin."),
        Document("titled", FILLER[6], "Tin"),
        Document("judged", FILLER[7]),
    )
    fine = negatives("x", 4)
    judged = {"tin": {"judged": 1, "x-n1": 0}}
    both = replace(EXAMPLES[0], negatives=wrong + fine)
    retrieved = replace(EXAMPLES[0], negatives=())
    for given, found in ((both, ()), (retrieved, hits(*wrong, *fine, *fine))):
        for kind, number in (("distractors", 4), ("gold", 5)):
            for draw in one(kind, given, found, passages=(9, 9), judged=judged):
                assert len(draw.hits) == number
                assert set(ids(draw)) == {f"x-n{n}" for n in range(4)} | (
                    {gold.id} if kind == "gold" else set()
                )


def test_negatives_go_before_what_was_retrieved():
    given = replace(EXAMPLES[0], negatives=negatives("x", 2))
    for draw in one("distractors", given, hits(*negatives("y"))):
        assert sorted(ids(draw)) == ["x-n0", "x-n1"]
    useless = replace(EXAMPLES[0], negatives=EXAMPLES[0].positives)
    for draw in one("distractors", useless, hits(*negatives("y", 3))):
        assert sorted(ids(draw)) == ["y-n0", "y-n1", "y-n2"]


# --- targets


def test_the_abstention_is_what_prompts_ask_for_and_evaluation_sees():
    assert abstains(ABSTENTION)
    assert f"say: {ABSTENTION}." in STYLES["ragkit"].system
    assert STYLES["ragkit"].system.endswith("\n\n{context}")


@pytest.mark.parametrize(
    ("known", "chosen", "abstaining"),
    [
        (True, None, True),
        (True, True, True),
        (True, False, False),
        (False, None, False),
        (False, True, True),
        (False, False, False),
    ],
)
def test_abstaining_from_what_was_retrieved(known, chosen, abstaining):
    given = EXAMPLES[0] if known else replace(EXAMPLES[0], positives=())
    target = ABSTENTION if abstaining else "tin"
    (draw,) = one("retrieved", given, hits(*negatives("x")), abstain_retrieved=chosen)[:1]
    assert draw.target() == target
    # A passage that holds an answer is no reason to abstain, gold or not.
    told = Document("told", "Cans are made of tin.")
    found = hits(*negatives("x", 1), told, Document("more", "Tin cans."))
    for draw in one("retrieved", given, found, abstain_retrieved=chosen, citations=True):
        assert draw.target() == "tin [2]"
        assert (draw.gold, draw.holding) == (((), (1, 2)) if known else ((1,), (2,)))


def test_judgements_make_known_what_is_relevant():
    given = replace(EXAMPLES[0], positives=())
    for judged, target in (({"far": 1}, ABSTENTION), ({"far": 0}, "tin")):
        (draw,) = one("retrieved", given, hits(*negatives("x")), judged={"tin": judged})[:1]
        assert draw.target() == target


def test_a_target_follows_what_the_prompt_shows():
    gold = EXAMPLES[0].positives[0]
    two = Document("two", "Tin again.")
    given = replace(EXAMPLES[0], positives=(gold, two))
    draws = one("gold", given, passages=(4, 4), all_gold=True, citations=True, steps=50)
    draw = next(draw for draw in draws if draw.gold == (1, 3))
    assert draw.target() == draw.target(Prompt((), (0, 1, 2, 3))) == "tin [2][4]"
    # The numbers are the prompt's: passages that did not fit have none.
    assert draw.target(Prompt((), (1, 2, 3))) == "tin [1][3]"
    assert draw.target(Prompt((), (0, 3))) == "tin [2]"
    assert draw.target(Prompt((), (0, 2))) == ABSTENTION
    assert replace(draw, citations=False).target(Prompt((), (0, 3))) == "tin"
    assert draw.target(Prompt(())) == "tin"  # as a question alone is answered
    last = len(draw.hits[3].document.text)
    text = draw.hits[1].document.text
    assert draw.target(Prompt((), (0, 1), cut=len(text))) == "tin [2]"
    assert draw.target(Prompt((), (0, 1), cut=5)) == ABSTENTION
    assert draw.target(Prompt((), (1, 3), cut=last)) == "tin [1][2]"


def test_a_target_follows_a_prompt_that_was_built():
    long = Document("long", "Of pipes. " * 40)
    gold = Document("gold", "Pipes are old. They were made of tin.")
    given = replace(EXAMPLES[0], positives=(gold,), negatives=(long, *negatives("x", 2)))
    seen = set()
    for draw in one("gold", given, citations=True, steps=40):
        prompt = build_prompt(
            style_named("ragkit"),
            given.query.text,
            draw.hits,
            budget=40,
            window=500,
            count=lambda text: len(text.split()),
            sentences=lambda text: [
                (0, end + 1) for end, letter in enumerate(text) if letter == "."
            ],
        )
        shown = "tin." in prompt.text
        expected = ABSTENTION
        if shown:
            line = next(line for line in prompt.text.split("\n") if "tin." in line)
            expected = f"tin {line[: line.index(']') + 1]}"
        assert draw.target(prompt) == expected
        seen.add(expected)
    assert {ABSTENTION, "tin [1]", "tin [2]"} <= seen


# --- what cannot be drawn


def bare(name, **fields):
    return example(name, **({"positives": (), "negatives": ()} | fields))


def test_what_cannot_be_drawn_is_drawn_from_the_rest_and_counted():
    # Nothing at all, distractors alone, and all there is.
    examples = [bare("tin"), bare("lead", negatives=negatives("x", 2)), EXAMPLES[1]]
    draws = drawn(MIX, examples, [[], [], FOUND[1]], steps=180, passages=(2, 4))
    kinds = [Counter(draw.kind for draw in draws if draw.example == n) for n in range(3)]
    assert kinds[0] == {"none": 300}
    assert set(kinds[1]) == {"distractors", "none"}
    assert binomtest(kinds[1]["none"], 300, 1 / 3).pvalue > 1e-4
    assert set(kinds[2]) == {"gold", "retrieved", "distractors", "none"}
    told = tally(draws)
    assert told["kinds"] == dict(kinds[0] + kinds[1] + kinds[2])
    redrawn = Counter(draw.wanted for draw in draws if draw.kind != draw.wanted)
    assert told["redrawn"] == dict(redrawn) and set(redrawn) == {"gold", "retrieved", "distractors"}
    assert binomtest(redrawn["distractors"], 300, 0.2).pvalue > 1e-4
    assert binomtest(redrawn["gold"], 600, 0.4).pvalue > 1e-4


def test_a_tally_counts_what_was_drawn():
    examples = [example("tin", negatives=negatives("x", 1))]
    draws = list(drawn("gold:.5,distractors:.5", examples, [[]], steps=40, passages=(2, 2)))
    gold = [draw for draw in draws if draw.kind == "gold"]
    first = sum(draw.gold == (0,) for draw in gold)
    assert tally(draws) == {
        "kinds": {"gold": len(gold), "distractors": 200 - len(gold)},
        "redrawn": {},
        "passages": {1: 200 - len(gold), 2: len(gold)},
        "gold_places": {"gold": {1: first, 2: len(gold) - first}},
        "short": 200 - len(gold),
        "abstaining": 200 - len(gold),
    }


def test_questions_that_nothing_can_be_drawn_of_are_named():
    examples = [EXAMPLES[0], bare("lead"), bare("zinc"), bare("iron", negatives=negatives("x"))]
    found = [[], [], [], []]
    message = r"'lead', and 1 more, has no passages .*,distractors:0.5,none:0 draws\. Leave"
    with pytest.raises(DataError, match=message):
        drawn("gold:.5,distractors:.5,none:0", examples, found)
    assert len(drawn("gold:.5,distractors:.4,none:.1", examples, found)) == 10_000
    blank = [EXAMPLES[0], example("zinc", answers=("", " "))]
    with pytest.raises(DataError, match="'zinc' has no answer to learn"):
        drawn(examples=blank, found=[[], []])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"passages": (0, 3)}, "passages 0-3: expected a range from 1 up"),
        ({"passages": (4, 3)}, "passages 4-3: expected a range from 1 up"),
        ({"steps": 0}, "each 1 up"),
        ({"examples": [], "found": []}, "there must be examples"),
    ],
)
def test_numbers_that_leave_nothing_to_draw_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        drawn(**settings)


def test_an_answer_that_most_texts_hold_tells_nothing_of_them():
    """No, yes and single digits stand anywhere: they make no passage gold, and keep none away."""
    texts = [
        Document(f"s{n}", f"{text} There is no doubt of these 3.") for n, text in enumerate(FILLER)
    ]
    for answer in ("No", "3", "yes."):
        given = replace(EXAMPLES[0], answers=(answer,), negatives=tuple(texts))
        for draw in one("distractors", given):
            assert len(draw.hits) == 3 and draw.target() == ABSTENTION
        for draw in one("retrieved", given, hits(*texts)):
            assert not draw.holding and draw.target() == ABSTENTION
        unknown = replace(given, positives=())
        assert all(
            draw.kind == "none"
            for draw in list(drawn("distractors:.9,none:.1", [unknown], [()], steps=20))
        )
        for draw in one("retrieved", unknown, hits(*texts), abstain_retrieved=True):
            assert draw.target() == answer
        gold = Document("g", "It melts. Yes, there is no doubt of these 3.")
        cut = one("gold", replace(given, positives=(gold,)), passages=(1, 1))[0]
        assert cut.target(Prompt((), (0,), cut=5)) == answer
    told = replace(EXAMPLES[0], answers=("No", "rusts"), negatives=tuple(texts))
    assert all("s2" not in ids(draw) for draw in one("distractors", told, passages=(7, 7)))
