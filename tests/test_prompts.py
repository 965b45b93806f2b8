"""Packing, citing, abstaining."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.errors import DataError, SettingsError
from ragkit.prompts import (
    STYLES,
    PromptStyle,
    abstains,
    build_prompt,
    citations,
    style_named,
    without_citations,
)
from ragkit.splitting import sentences
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
    assert len(context) == prompt.shown <= len(texts)
    for number, (passage, text) in enumerate(zip(context, texts, strict=False), start=1):
        assert str(number) in passage
        whole = text in passage
        assert whole or number == len(context)  # only the last one may be cut
        kept = [text[:end] for _, end in sentences(text)]
        assert whole or any(cut.rstrip() in passage for cut in kept)
    if prompt.shown < len(texts):  # what was left out would not have fitted
        assert sum(map(_count, context)) + _count(f"[1] {texts[prompt.shown]}") > budget - 12


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
    ],
)
def test_answers_are_no_abstentions(text: str) -> None:
    assert not abstains(text)
