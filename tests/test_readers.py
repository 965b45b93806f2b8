"""The reader, with a generator that is told what to say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ragkit.errors import DataError, SettingsError
from ragkit.readers import GeneratorReader, attribute
from ragkit.styles import STYLES
from ragkit.types import Answer, Document, Hit, Query, Reader

HITS = [
    Hit(Document("tin", "Tin melts at 232 degrees. It is grey.", "Tin"), 3.0),
    Hit(Document("lead", "Lead melts at 327 degrees. It is heavy."), 2.0),
    Hit(Document("brie", "Brie is soft. It comes from France."), 1.0),
]
QUERY = Query("q", "When does tin melt?")


class Says:
    """Answers with given texts, and keeps what it was asked; a token is a word."""

    def __init__(self, *texts, window=1000):
        self.texts = texts
        self.window = window
        self.asked = []

    def count(self, text):
        return len(text.split())

    def generate(self, prompts, *, max_new_tokens, temperature, seed, progress):
        self.asked.append((list(prompts), max_new_tokens, temperature, seed))
        for done in range(1, len(prompts) + 1):
            progress(done)
        return list(self.texts[: len(prompts)])

    def stream(self, prompt, *, max_new_tokens, temperature, seed):
        self.asked.append(([prompt], max_new_tokens, temperature, seed))
        text = f" {self.texts[0]}\n"
        for start in range(0, len(text), 3):
            yield text[start : start + 3]


def test_an_answer_by_value():
    generator = Says("232 degrees [1]")
    reader = GeneratorReader(generator, style="spring", max_new_tokens=9, temperature=0.5, seed=4)
    assert isinstance(reader, Reader)
    prompt = (
        "[1] Tin Tin melts at 232 degrees. It is grey.\n"
        "[2] Lead melts at 327 degrees. It is heavy.\n\n"
        "According to the previous relevant passages, please answer the following question. "
        "Only return the answer without any other words.\n"
        "Question: When does tin melt?\nAnswer:"
    )
    expected = Answer(
        QUERY, "232 degrees [1]", tuple(HITS[:2]), prompt, citations=(0,),
        prompt_tokens=len(prompt.split()), answer_tokens=3,
    )  # fmt: skip
    assert reader.read([QUERY], [HITS[:2]]) == [expected]
    assert expected.cited == (HITS[0].document,)
    (prompts, *settings) = generator.asked[0]
    assert [p.text for p in prompts] == [prompt]
    assert settings == [9, 0.5, 4]


def test_each_query_gets_its_own_answer():
    queries = [Query(str(i), f"Question {i}?") for i in range(3)]
    generator = Says("France [1]", "I don't know.", "grey [2]")
    told = []
    reader = GeneratorReader(generator, progress=lambda done, total: told.append((done, total)))
    found = reader.read(queries, [[HITS[2]], HITS, HITS[1::-1]])
    assert [answer.query for answer in found] == queries
    assert [answer.cited for answer in found] == [(HITS[2].document,), (), (HITS[0].document,)]
    assert [answer.abstained for answer in found] == [False, True, False]
    assert all(answer.query.text in answer.prompt for answer in found)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert reader.read([], []) == []


def test_an_answers_hits_are_those_that_the_prompt_shows():
    reader = GeneratorReader(Says("327 [2], soft [3]"), style="flashrag", context_tokens=19)
    answer = reader.read([QUERY], [HITS])[0]
    assert answer.hits == tuple(HITS[:2])  # eleven words, and eight of the second's first sentence
    assert answer.citations == (1,)  # no [3] was shown
    assert "melts at 327 degrees.\n" in answer.prompt
    assert "heavy" not in answer.prompt
    cut = replace(HITS[1].document, text="Lead melts at 327 degrees.")
    assert answer.shown == (HITS[0].document, cut)
    assert answer.hits[1].document == HITS[1].document  # the hit itself is whole
    whole = GeneratorReader(Says("327 [2]")).read([QUERY], [HITS])[0]
    assert whole.cut is None and whole.shown == tuple(hit.document for hit in HITS)


@pytest.mark.parametrize("context", [5, 10, 14, 15, 16, 30])
def test_the_shown_hits_hold_whole_sentences(context):
    prompt = GeneratorReader(Says(), context_tokens=context).prompt(QUERY, HITS)
    shown = [p.text for m in prompt.messages for p in m.parts if p.kind == "context"]
    assert sum(len(text.split()) for text in shown) <= context
    assert len(shown) == len(prompt.shown)
    assert all(text.endswith(".\n") for text in shown)


def test_without_hits_the_reader_asks_without_passages():
    answer = GeneratorReader(Says("At 232."), style="flashrag").read([QUERY], [[]])[0]
    assert answer.hits == answer.citations == ()
    assert not answer.attributed
    assert answer.prompt == (
        "Answer the question based on your own knowledge. Only give me the answer and do not "
        "output any other words.\n\nQuestion: When does tin melt?"
    )


@pytest.mark.parametrize("text", ["232 [1]", "I don't know.", "It melts at 327 degrees."])
def test_a_streamed_answer_equals_the_read_one(text):
    reader = GeneratorReader(Says(text))
    pieces = []
    assert reader.stream(QUERY, HITS, pieces.append) == reader.read([QUERY], [HITS])[0]
    assert "".join(pieces) == f" {text}\n"
    assert len(pieces) > 1


def test_an_answer_without_a_mark_is_attributed_by_its_words():
    def read(text):
        return GeneratorReader(Says(text)).read([QUERY], [HITS])[0]

    found = read("At 327 degrees, since it is heavy.")
    assert (found.citations, found.attributed) == ((1,), True)
    written = read("At 327 degrees [1]")
    assert (written.citations, written.attributed) == ((0,), False)
    unsure = read("I don't know when tin melts.")
    assert (unsure.citations, unsure.attributed, unsure.abstained) == ((), False, True)


def test_attribution_takes_the_better_ranked_of_equals():
    twins = [replace(HITS[0], score=1.0), HITS[0]]
    assert attribute("232 degrees", "When?", twins) == (0,)
    assert attribute("Nothing alike", "When?", HITS) == ()
    assert attribute("232", "When?", []) == ()
    assert attribute("", "When?", HITS) == ()


def test_a_question_that_does_not_fit_is_refused():
    reader = GeneratorReader(Says("x", window=200), max_new_tokens=64)
    with pytest.raises(DataError, match="Shorten it"):
        reader.read([Query("q", "why " * 100)], [HITS])


def test_settings():
    with pytest.raises(SettingsError, match="known are ragkit, flashrag, spring"):
        GeneratorReader(Says(), style="poem")
    style = replace(STYLES["spring"], name="mine")
    assert GeneratorReader(Says(), style=style).style is style
    for wrong in (
        {"context_tokens": 0},
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
    ):
        with pytest.raises(SettingsError, match="must be at least 1"):
            GeneratorReader(Says(), **wrong)
    for seed in (-1, 2**63):
        with pytest.raises(SettingsError, match=f"seed .*{seed}"):
            GeneratorReader(Says(), seed=seed)
    with pytest.raises(SettingsError, match=r"max_new_tokens 999 leaves no room.*1000 tokens"):
        GeneratorReader(Says(), max_new_tokens=999)


def test_passages_that_never_fit_are_told_once(caplog):
    reader = GeneratorReader(Says("a", "b"), context_tokens=3)
    reader.read([QUERY, QUERY], [HITS, HITS])
    assert [record.getMessage()[:38] for record in caplog.records] == [
        "Query 'q' is answered without passages"
    ]
    assert "context_tokens, 3," in caplog.text
    caplog.clear()
    GeneratorReader(Says("a"), context_tokens=3).read([QUERY], [[]])
    assert not caplog.records


def test_queries_and_hits_go_together():
    with pytest.raises(ValueError, match="zip"):
        GeneratorReader(Says("x")).read([QUERY], [])
