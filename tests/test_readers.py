"""The reader, with a generator that is told what to say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ragkit.errors import DataError, SettingsError
from ragkit.models import VirtualTokens
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


# Virtual tokens


class Plugged(Says):
    """A generator with virtual tokens: it keeps how many stand in each prompt."""

    def __init__(self, *texts, placement="middle", count=6, **options):
        super().__init__(*texts, **options)
        style = STYLES["virtual-tokens"].placing(placement)
        rows = torch.arange(2.0 * count).reshape(count, 2)
        self.virtual_tokens = VirtualTokens(rows, "b", "h", "plain", placement, style, "t")
        self.stood = []

    def generate(self, prompts, *, virtual_tokens, **options):
        self.stood.append(list(map(len, virtual_tokens)))
        for tokens in virtual_tokens:
            assert torch.equal(tokens.embeddings, self.virtual_tokens.embeddings[: len(tokens)])
        return super().generate(prompts, **options)

    def stream(self, prompt, *, virtual_tokens, **options):
        self.stood.append(list(map(len, virtual_tokens)))
        return super().stream(prompt, **options)


@pytest.mark.parametrize("placement", ["middle", "front", "last", "start"])
def test_the_wording_is_that_of_the_virtual_tokens(placement):
    generator = Plugged("x", placement=placement)
    style = generator.virtual_tokens.style
    for asked in (None, "virtual-tokens", STYLES["virtual-tokens"], style):
        assert GeneratorReader(generator, style=asked).style == style
    for asked in ("spring", replace(STYLES["virtual-tokens"], between=" ")):
        with pytest.raises(SettingsError, match=r"is not the wording.*'virtual-tokens': leave"):
            GeneratorReader(generator, style=asked)
    assert GeneratorReader(Says("x")).style is STYLES["ragkit"]
    assert GeneratorReader(Says("x"), style="virtual-tokens").style is STYLES["virtual-tokens"]


def test_virtual_tokens_are_counted_by_reader_call_and_query():
    generator = Plugged("a", "b", "c")
    queries, hits = [replace(QUERY, id=str(n)) for n in range(3)], [HITS] * 3
    whole = GeneratorReader(generator)
    some = GeneratorReader(generator, use_tokens=4)
    off = GeneratorReader(generator, use_tokens=0)
    assert (whole.use_tokens, some.use_tokens, off.use_tokens) == (6, 4, 0)
    bare = off.read(queries, hits)
    full = whole.read(queries, hits)
    for reader in (some, off):
        assert reader.read(queries, hits, use_tokens=6) == full
    assert whole.read(queries, hits, 0) == bare
    some.read(queries, hits)
    mixed = some.read(queries, hits, [0, 6, 1])
    assert generator.stood == [
        [0, 0, 0], [6, 6, 6], [6, 6, 6], [6, 6, 6], [0, 0, 0], [4, 4, 4], [0, 6, 1],
    ]  # fmt: skip
    assert [answer.prompt for answer in mixed] == [answer.prompt for answer in bare]
    spent = [a.prompt_tokens - b.prompt_tokens for a, b in zip(mixed, bare, strict=True)]
    assert spent == [0, 6, 1]
    pieces = []
    assert some.stream(queries[1], HITS, pieces.append, 6).prompt == mixed[1].prompt
    some.stream(queries[1], HITS, pieces.append)
    assert generator.stood[-2:] == [[6], [4]]
    assert some.read([], []) == []


def test_the_window_has_room_for_virtual_tokens():
    def read(use_tokens, call, window):
        generator = Plugged("x", "x", window=64 + 9 + window)
        reader = GeneratorReader(generator, max_new_tokens=9, use_tokens=use_tokens)
        return {answer.prompt for answer in reader.read([QUERY] * 2, [HITS] * 2, call)}

    def bare(window):
        says = Says("x", window=64 + 9 + window)
        reader = GeneratorReader(says, style="virtual-tokens", max_new_tokens=9)
        return {reader.read([QUERY], [HITS])[0].prompt}

    assert len(set().union(*map(bare, range(15, 40)))) > 3
    for window in range(21, 40):
        assert read(0, None, window) == read(6, 0, window) == bare(window)
        assert read(6, None, window) == read(0, 6, window) == bare(window - 6)
        assert read(0, [0, 6], window) == bare(window - 6)  # all of a call show the same
    with pytest.raises(SettingsError, match=r"no room.* reads and writes 74 .*, 6 virtual ones"):
        GeneratorReader(Plugged(window=74), max_new_tokens=4)
    GeneratorReader(Plugged(window=74), max_new_tokens=4, use_tokens=5)


def test_virtual_tokens_that_are_not_there():
    for generator, message in ((Says("x"), "has none plugged in"), (Plugged("x"), "these are 6")):
        reader = GeneratorReader(generator)
        for count in (-1, 7):
            with pytest.raises(SettingsError, match=f"{count} virtual tokens.*{message}"):
                GeneratorReader(generator, use_tokens=count)
            for ask in (
                lambda reader, count: reader.read([QUERY], [HITS], count),
                lambda reader, count: reader.read([QUERY], [HITS], [count]),
                lambda reader, count: reader.stream(QUERY, HITS, print, count),
            ):
                with pytest.raises(SettingsError, match=message):
                    ask(reader, count)
        with pytest.raises(SettingsError, match=r"1 numbers of virtual tokens .* for 2 queries"):
            reader.read([QUERY] * 2, [HITS] * 2, [0])
        assert not generator.asked
    plain = GeneratorReader(Says("x"), use_tokens=0)
    assert plain.read([QUERY], [HITS], 0) == plain.read([QUERY], [HITS])
