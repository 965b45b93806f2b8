"""Packing, citing, abstaining."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.errors import DataError, SettingsError
from ragkit.prompts import (
    Prompt,
    abstains,
    build_prompt,
    citations,
    without_citations,
)
from ragkit.splitting import sentences
from ragkit.styles import PLACEHOLDER, STYLES, PromptStyle, style_named
from ragkit.types import Document, Hit

TEXTS = st.lists(
    st.lists(
        st.sampled_from(["Tin melts.", "It is grey.", "Who knows?", "Lead is heavy too."]),
        min_size=1,
    ).map(" ".join),
    max_size=6,
)


def _count(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


def _hits(texts: list[str], title: str = "") -> list[Hit]:
    return [Hit(Document(str(i), text, title), 1.0 / (i + 1)) for i, text in enumerate(texts)]


@given(TEXTS, st.integers(0, 60), st.sampled_from(sorted(STYLES)))
def test_passages_fit_the_budget_and_end_with_sentences(
    texts: list[str], budget: int, name: str
) -> None:
    question = "When does {context} tin \\1 melt?"
    prompt = build_prompt(
        STYLES[name],
        question,
        _hits(texts),
        budget=budget,
        window=500,
        count=_count,
        sentences=sentences,
    )
    parts = [part for message in prompt.messages for part in message.parts]
    context = [part.text for part in parts if part.kind == "context"]
    assert sum(map(_count, context)) <= budget
    assert [part.text for part in parts if part.kind == "question"] == [question]
    assert len(context) == len(prompt.shown)
    assert list(prompt.shown) == sorted(set(prompt.shown))
    chosen = [texts[place] for place in prompt.shown]
    for number, (passage, text) in enumerate(zip(context, chosen, strict=True), start=1):
        assert str(number) in passage
        whole = text in passage
        assert whole or number == len(context)  # only the last one may be cut
        kept = [text[:end] for _, end in sentences(text)]
        assert whole or any(cut.rstrip() in passage for cut in kept)
    left_out = set(range(len(texts))) - set(prompt.shown)
    for place in left_out:  # it would not have fitted
        assert sum(map(_count, context)) + _count(f"[1] {texts[place]}") > budget - 12


def test_a_passage_of_which_nothing_fits_makes_room_for_the_next() -> None:
    texts = ["word " * 50, "Tin melts.", "Lead is heavy, and it is soft. It is grey."]
    prompt = build_prompt(
        style_named("spring"), "Why?", _hits(texts),
        budget=18, window=500, count=_count, sentences=sentences,
    )  # fmt: skip
    assert prompt.shown == (1, 2)
    assert prompt.cut == len("Lead is heavy, and it is soft.")
    context = [p.text for m in prompt.messages for p in m.parts if p.kind == "context"]
    assert context == ["[1] Tin melts.\n", "[2] Lead is heavy, and it is soft.\n"]


def test_braces_in_documents_and_questions_are_text() -> None:
    text = "Use {question} and {context} and {number} and \\1."
    hits = _hits([text], title="{text}")
    prompt = build_prompt(
        style_named("ragkit"),
        "{context}?",
        hits,
        budget=99,
        window=999,
        count=_count,
        sentences=sentences,
    )
    assert f"[1] {{text}}: {text}\n" in prompt.text
    assert prompt.text.endswith("Question: {context}?")


def test_a_question_is_never_cut() -> None:
    with pytest.raises(DataError, match="Shorten it"):
        build_prompt(
            style_named("spring"),
            "why " * 50,
            [],
            budget=9,
            window=40,
            count=_count,
            sentences=sentences,
        )


def test_published_wordings() -> None:
    hits = _hits(["Tin melts."], title="Tin")

    def text(name: str) -> str:
        return build_prompt(
            STYLES[name], "When?", hits, budget=99, window=999, count=_count, sentences=sentences
        ).text

    assert text("flashrag") == (
        "Answer the question based on the given document.Only give me the answer and do not output "
        "any other words.\nThe following are given documents.\n\nDoc 1(Title: Tin) Tin melts.\n"
        "\n\nQuestion: When?"
    )
    assert text("spring") == (
        "[1] Tin Tin melts.\n\nAccording to the previous relevant passages, please answer the "
        "following question. Only return the answer without any other words.\n"
        "Question: When?\nAnswer:"
    )


def test_a_style_without_its_places_is_refused() -> None:
    with pytest.raises(SettingsError, match="must stand in it"):
        PromptStyle("bad", "", "{question}", "{text}", "{text}", "")
    with pytest.raises(SettingsError, match="known are"):
        style_named("nonsense")


@pytest.mark.parametrize(
    ("text", "shown", "expected"),
    [
        ("Paris [1]", 3, (0,)),
        ("Paris [1, 3]", 3, (0, 2)),
        ("Paris [2][1] and [2]", 3, (1, 0)),
        ("Paris [12] [0]", 3, ()),
        ("Paris", 3, ()),
        ("a[1]", 1, (0,)),
        ("[ 2 ; 1 ] [2]", 2, (1, 0)),
        ("in [1984] and [a1] and [-1] and []", 9, ()),
        ("Paris [1]", 0, ()),
    ],
)
def test_citations(text: str, shown: int, expected: tuple[int, ...]) -> None:
    assert citations(text, shown) == expected


def test_citations_are_taken_off() -> None:
    assert without_citations("Paris [1, 2], France [3].") == "Paris, France."


@pytest.mark.parametrize(
    "text",
    [
        "I don't know.",
        "I don’t know",
        "unknown",
        "",
        "The passages do not mention it.",
        "I cannot answer that.",
        " \n",
        "[1]",
        "Unknown [2]",
        "N/A.",
        "Not mentioned.",
        "I'm sorry, but I don’t know the answer [1].",
        "I am unable to determine this from the passages.",
        "I do not have enough information to answer.",
        "The passages don't contain sufficient information.",
        "There is insufficient information.",
        "None of the passages mention tin.",
        "No passage holds the answer.",
        "The provided text does not explicitly state when.",
        "It is not stated in the given passages.",
        "The answer isn't in the passages.",
        "The answer is not provided.",
        "There is no answer to this question.",
        "It cannot be determined.",
    ],
)
def test_abstentions(text: str) -> None:
    assert abstains(text)


@pytest.mark.parametrize(
    "text",
    [
        "The unknown soldier",
        "Tin",
        "It is not the largest in the world",
        "None of the Above (album)",
        "The answer is not found in nature; it is technetium.",
        "No text contains more characters than the Iliad",
        "I can't tell a lie",
        "I Can't Tell You Why",
        "The wreck was not found in the Atlantic until 1985 [1]",
        "It is not in the Alps.",
        "Survivors could not be found",
        "The Unanswered Question",
        "Nonesuch",
        "not guilty",
        "He is not mentioned in the Iliad.",
        "No one",
        "0",
    ],
)
def test_answers_are_no_abstentions(text: str) -> None:
    assert not abstains(text)


FRAGMENTS = st.sampled_from(
    [
        *("{context}", "{question}", "{number}", "{title}", "{text}", "{}", "{", "}", "%s", "$1"),
        *("\\1", "\\g<0>", "\\", "[1]", "<|im_end|>", "\ue0000\ue001"),
        *("Tin melts. ", "Who? ", "Où ça ! ", "\n", "\n\n", " ", "e.g. lead ", "東京。"),
    ]
)
WORDS = st.lists(FRAGMENTS, max_size=8).map("".join)


def _packed(
    style: PromptStyle, question: str, hits: list[Hit], budget: int, window: int
) -> list[str]:
    """Pack by trying every cut, a token being a character."""
    frame = PLACEHOLDER.sub("", style.system + style.user) + style.after
    room = min(budget, window - len(frame) - len(question))
    kept = []
    for hit in hits:
        number = len(kept) + 1
        text, title = hit.document.text, hit.document.title
        before, after = (style.titled if title else style.passage).split("{text}")
        after += style.between
        before = before.replace("{number}", str(number), 1).replace("{title}", title, 1)
        ends = [end for _, end in sentences(text)]
        cuts = [before + text[:end].rstrip() + after for end in ends]
        fitting = [cut for cut in cuts if len(cut) <= room]
        whole = before + text + after
        if len(whole) > room:
            if fitting:
                return [*kept, fitting[-1]]
            continue
        kept.append(whole)
        room -= len(whole)
    return kept


def _ended(style: PromptStyle, passages: list[str]) -> list[str]:
    """Take off what stands between passages behind the last one, and put what ends them."""
    last = len(passages) - 1
    return [
        p if i < last else p.removesuffix(style.between) + style.after
        for i, p in enumerate(passages)
    ]


@given(
    st.lists(st.tuples(WORDS, WORDS), max_size=4),
    WORDS,
    st.integers(0, 200),
    st.integers(0, 500),
    st.sampled_from(sorted(STYLES)),
)
def test_packing_equals_trying_every_cut(
    documents: list[tuple[str, str]], question: str, budget: int, window: int, name: str
) -> None:
    style = STYLES[name]
    hits = [Hit(Document(str(i), *document), 1.0) for i, document in enumerate(documents)]
    alone = len(PLACEHOLDER.sub("", style.alone + style.user_alone)) + len(question)

    def build() -> Prompt:
        return build_prompt(
            style, question, hits, budget=budget, window=window, count=len, sentences=sentences
        )

    if alone > window:
        with pytest.raises(DataError, match="Shorten it"):
            build()
        return
    prompt = build()
    parts = [part for message in prompt.messages for part in message.parts]
    expected = _packed(style, question, hits, budget, window)
    assert [part.text for part in parts if part.kind == "context"] == _ended(style, expected)
    assert len(prompt.shown) == len(expected)
    shown = [hits[place] for place in prompt.shown]
    if prompt.cut is not None:
        document = shown[-1].document
        shown[-1] = Hit(replace(document, text=document.text[: prompt.cut]), 1.0)
    whole = build_prompt(
        style, question, shown, budget=999, window=9999, count=len, sentences=sentences
    )
    assert whole.text == prompt.text and whole.cut is None  # the texts as shown, nothing less
    assert [part.text for part in parts if part.kind == "question"] == [question]
    assert sum(map(len, expected)) <= budget
    assert sum(len(message.text) for message in prompt.messages) <= window
    frame = [part.text for part in parts if part.kind == "instruction"]
    wording = (style.system, style.user) if expected else (style.alone, style.user_alone)
    assert "".join(frame) == PLACEHOLDER.sub("", "".join(wording))


def test_where_only_the_bare_question_fits_no_passage_is_shown() -> None:
    style = STYLES["flashrag"]
    # 20 characters hold "Doc 1(Title: ) x.", but not beside the longer wording that goes with it
    window = len(style.alone) + len("Question: Why?") + 20
    prompt = build_prompt(
        style, "Why?", _hits(["x."]), budget=99, window=window, count=len, sentences=sentences
    )
    assert prompt.shown == ()
    assert prompt.text == f"{style.alone}\n\nQuestion: Why?"


def test_published_wordings_without_passages() -> None:
    def text(name: str) -> str:
        return build_prompt(
            STYLES[name], "When?", [], budget=99, window=999, count=_count, sentences=sentences
        ).text

    assert text("flashrag") == (
        "Answer the question based on your own knowledge. Only give me the answer and do not "
        "output any other words.\n\nQuestion: When?"
    )
    assert text("spring") == "Question: When?\nAnswer:"


def test_published_wordings_number_passages_and_keep_an_empty_title() -> None:
    hits = [Hit(Document("1", "Tin melts.", "Tin"), 2.0), Hit(Document("2", "Lead, too."), 1.0)]

    def context(name: str) -> str:
        prompt = build_prompt(
            STYLES[name], "When?", hits, budget=99, window=999, count=_count, sentences=sentences
        )
        parts = [part for message in prompt.messages for part in message.parts]
        return "".join(part.text for part in parts if part.kind == "context")

    assert context("flashrag") == "Doc 1(Title: Tin) Tin melts.\nDoc 2(Title: ) Lead, too.\n"
    assert context("spring") == "[1] Tin Tin melts.\n[2] Lead, too.\n"


@pytest.mark.parametrize(
    ("system", "user"),
    [
        ("{context}", "{context} {question}"),
        ("{question}", "{context}"),
        ("", "{context}"),
        ("{question} {context}", "{question}"),
    ],
)
def test_context_and_question_stand_once_and_in_order(system: str, user: str) -> None:
    with pytest.raises(SettingsError, match="once each"):
        PromptStyle("bad", system, user, "{text}", "{text}", "")
    with pytest.raises(SettingsError, match="once each"):
        PromptStyle("bad", "{context}", "{question}", "{text}", "{text}", "", "no place")
