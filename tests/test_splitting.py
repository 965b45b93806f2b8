import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkit.errors import SettingsError
from ragkit.splitting import parent_of, sentences, split
from ragkit.types import Document

SPACES = " \n\t\r\u00a0\u2028\u3000\x85\x0b"
TEXTS = st.text(
    st.one_of(
        st.sampled_from("ab A.!?。؟\"'()「」“”é日本語😀\u0301" + SPACES),
        st.characters(),  # lone surrogates and all
    ),
    max_size=400,
)
PROSE = st.lists(
    st.sampled_from(
        [
            "One two three.",
            "Short.",
            "Is it?",
            "日本語です。",
            "Dr. Who (ok. fine.) left.",
            "no end",
        ]
    )
    | st.integers(1, 40).map(lambda n: " ".join(["word"] * n) + ".")
    | st.integers(1, 60).map(lambda n: "-" * n),
    max_size=30,
).flatmap(
    lambda parts: st.lists(
        st.sampled_from([" ", "\n\n", "\r\n", "  ", "\u3000"]),
        min_size=len(parts),
        max_size=len(parts),
    ).map(lambda gaps: "".join(a + b for a, b in zip(parts, gaps, strict=True)))
)


def words(text):
    return [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]


def characters(text):
    return [(i, i + 1) for i, c in enumerate(text) if not c.isspace()]


def byte_tokens(text):
    """Like a byte-level BPE: a space belongs to the word after it, and a non-ASCII character has
    several tokens of the same span; special tokens around."""
    spans = [(0, 0)]
    for match in re.finditer(r" ?[a-zA-Z]+| ?[^\sa-zA-Z]", text):
        last = text[match.end() - 1]
        spans += [match.span()] * (1 if last.isascii() else 3)
    return [*spans, (0, 0)]


def touching(spans, start, end):
    return sum(a < end and b > start for a, b in spans if a < b)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello world. This is it.", ["Hello world. ", "This is it."]),
        ("Dr. Smith went. He left.", ["Dr. Smith went. ", "He left."]),
        ("日本語です。これは二番目。次", ["日本語です。", "これは二番目。", "次"]),
        ("Hi 😀 there. Cafe\u0301 it is. End", ["Hi 😀 there. ", "Cafe\u0301 it is. ", "End"]),
        ("no end at all", ["no end at all"]),
        ("", []),
    ],
)
def test_sentences_are_spans_in_characters(text, expected):
    assert [text[a:b] for a, b in sentences(text)] == expected


@pytest.mark.parametrize("space", ["\u3000", "\xa0", "\u2028", "\x85"])
def test_sentences_survive_white_space_that_sentencex_panics_at(space):
    assert sentences(f"A b.{space}{space}\nC d") != []
    text = f"First one.{space} {space}Second one."
    assert "".join(text[a:b] for a, b in sentences(text)) == text


def test_windows_line_ends_end_paragraphs():
    text = "A title\r\n\r\nThe text begins. It ends.\r\n"
    stripped = [text[a:b].strip() for a, b in sentences(text)]
    assert [s for s in stripped if s] == ["A title", "The text begins.", "It ends."]


@pytest.mark.parametrize("unit", ["日本語です。", "A word here. ", "word ", "a"])
def test_long_texts_are_split_as_short_ones_and_fast(unit):
    text = unit * (300_000 // len(unit))
    spans = sentences(text)
    short = sentences(unit * 3)
    assert len(spans) == (1 if len(short) == 1 else len(text) // len(unit))
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)


@given(TEXTS, st.sampled_from(["en", "ja", "de", "ar", "hi", "xx"]))
def test_sentences_tile_any_text(text, language):
    spans = sentences(text, language)
    assert "".join(text[a:b] for a, b in spans) == text
    assert all(a < b for a, b in spans)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))


@settings(deadline=None)
@given(st.lists(st.sampled_from(["A b. ", "日本。", "x" * 3000, "\n\n"]), max_size=30))
def test_sentences_tile_texts_longer_than_a_window(parts):
    text = "".join(parts)
    assert "".join(text[a:b] for a, b in sentences(text)) == text


def check(document, max_tokens, overlap, tokenize):
    def run():
        return list(split([document], max_tokens=max_tokens, overlap=overlap, tokenize=tokenize))

    pieces = run()
    assert pieces == run()
    spans = [
        (
            a - len(document.contents) + len(document.text),
            b - len(document.contents) + len(document.text),
        )
        for a, b in tokenize(document.contents)
        if a < b
    ]
    title = sum(b <= 0 for _, b in spans)
    spans = [(max(a, 0), b) for a, b in spans if b > 0]
    budget = max(max_tokens - title, max_tokens // 2)
    if len(spans) <= budget:
        assert len(pieces) == 1
        assert pieces[0] is document
        return
    places = [(piece.metadata["start"], piece.metadata["end"]) for piece in pieces]
    text = document.text
    whole = {
        (a + len(text[a:b]) - len(text[a:b].lstrip()), a + len(text[a:b].rstrip()))
        for a, b in sentences(text)
        if text[a:b].strip()
    }
    for number, (piece, (start, end)) in enumerate(zip(pieces, places, strict=True), 1):
        assert piece.id == f"{document.id}#{number}"
        assert piece.title == document.title
        assert piece.metadata["parent"] == document.id
        assert piece.text == text[start:end] == text[start:end].strip() != ""
        assert touching(spans, start, end) <= budget
        for edge in (start, end):
            at_sentence = any(edge in span for span in whole)
            long = any(a < edge < b and touching(spans, a, b) > budget for a, b in whole)
            assert at_sentence or long
            if not at_sentence:
                assert not any(
                    a < edge < b and text[edge].strip() and text[edge - 1].strip() for a, b in spans
                )
    for (start, end), (next_start, next_end) in itertools.pairwise(places):
        assert start < next_start
        assert end < next_end
        if next_start < end:
            assert touching(spans, next_start, end) <= overlap
            assert any(next_start == a for a, _ in whole)
            assert any(end == b for _, b in whole)
    covered = set()
    for start, end in places:
        covered |= set(range(start, end))
    assert all(text[i].isspace() for i in set(range(len(text))) - covered)


@settings(deadline=None, max_examples=200)
@given(
    TEXTS | PROSE,
    st.sampled_from(["", "A title", "a very long title " * 3]),
    st.integers(12, 40),
    st.floats(0, 0.99),
    st.sampled_from([words, characters, byte_tokens]),
)
def test_pieces_cover_fit_and_progress(text, title, max_tokens, share, tokenize):
    overlap = int(share * (max_tokens // 2))
    check(Document("d", text, title, {"k": 1}), max_tokens, overlap, tokenize)


def test_a_document_that_fits_is_the_same_object():
    document = Document("a", "One two. Three four.", metadata={"x": 1})
    assert next(split([document], max_tokens=8, overlap=0)) is document


def test_pieces_of_hand_counted_sentences():
    text = "Red fox ran. Blue bird sang.  Green fish swam.\n\nAll slept."  # 4 + 4 + 4 + 3 tokens
    pieces = list(split([Document("a", text, "", {"x": 1})], max_tokens=9, overlap=0))
    assert [piece.text for piece in pieces] == [
        "Red fox ran. Blue bird sang.",
        "Green fish swam.\n\nAll slept.",
    ]
    assert [piece.id for piece in pieces] == ["a#1", "a#2"]
    assert pieces[1].metadata == {"x": 1, "parent": "a", "start": 30, "end": 58}

    pieces = list(split([Document("a", text)], max_tokens=10, overlap=4))
    texts = [
        "Red fox ran. Blue bird sang.",
        "Blue bird sang.  Green fish swam.",
        "Green fish swam.\n\nAll slept.",
    ]
    assert [piece.text for piece in pieces] == texts


def test_the_title_counts_and_leaves_half_to_the_text():
    text = "Red fox ran. Blue bird sang. Green fish swam."
    pieces = list(split([Document("a", text, "T u v w")], max_tokens=12, overlap=0))
    assert [piece.text for piece in pieces] == ["Red fox ran. Blue bird sang.", "Green fish swam."]
    pieces = list(split([Document("a", text, "T u v w " * 9)], max_tokens=8, overlap=0))
    assert [piece.text for piece in pieces] == [
        "Red fox ran.",
        "Blue bird sang.",
        "Green fish swam.",
    ]
    assert pieces[0].title == "T u v w " * 9


def test_an_over_long_sentence_is_cut_at_white_space_or_else_at_a_token():
    text = "a b c d e f g h i j k"
    assert [p.text for p in split([Document("a", text)], max_tokens=8, overlap=3)] == [
        "a b c d e f g h",
        "i j k",
    ]
    assert [p.text for p in split([Document("a", "-" * 20)], max_tokens=8, overlap=0)] == [
        "-" * 8,
        "-" * 8,
        "-" * 4,
    ]
    text = "--- ---------------"  # the space is not in the second half of the first piece
    pieces = list(split([Document("a", text)], max_tokens=8, overlap=0))
    assert [piece.text for piece in pieces] == ["--- -----", "--------", "--"]


def test_a_stretch_without_token_boundaries_stays_whole():
    text = "😀" * 3 + "!"
    pieces = list(
        split(
            [Document("a", text)],
            max_tokens=8,
            overlap=0,
            tokenize=lambda t: [(0, 3)] * 20 + [(3, 4)],
        )
    )
    assert [piece.text for piece in pieces] == ["😀😀😀", "!"]


def test_a_piece_that_is_split_again_points_at_the_first_parent():
    text = "Intro one. " + " ".join(f"Word{i} and more." for i in range(40))
    parent = Document("a", text)
    for piece in split([parent], max_tokens=60, overlap=10):
        for part in split([piece], max_tokens=20, overlap=5):
            assert part.metadata["parent"] == "a"
            assert text[part.metadata["start"] : part.metadata["end"]] == part.text
            assert part.id.startswith(f"{piece.id}#")


@pytest.mark.parametrize(
    "own",
    [
        {"parent": "section 3"},
        {"parent": "thread", "start": 1700000000},  # a reply, and when it began
        {"parent": "b", "start": 3, "end": None},
        {"parent": 7, "start": 3, "end": 50},
    ],
)
def test_metadata_that_only_looks_like_a_piece_is_replaced(own):
    document = Document("a", "Red fox ran. Blue bird sang. Green fish swam.", metadata=own)
    pieces = list(split([document], max_tokens=8, overlap=0))
    assert pieces[0].metadata == {"parent": "a", "start": 0, "end": 28}
    assert (parent_of(document), parent_of(pieces[0])) == (None, "a")


def test_documents_are_tokenised_once_and_read_one_by_one():
    seen = []

    def count(text):
        seen.append(text)
        return words(text)

    documents = (Document(str(i), "One two three four. " * 20, "T") for i in range(3))
    stream = split(documents, max_tokens=16, overlap=4, tokenize=count)
    assert next(stream).id == "0#1"
    assert len(seen) == 1
    assert {piece.id.split("#")[0] for piece in stream} == {"0", "1", "2"}
    assert len(seen) == 3


def test_default_tokens_are_words_marks_and_east_asian_characters():
    text = "日本語" * 10
    assert [len(p.text) for p in split([Document("a", text)], max_tokens=8, overlap=0)] == [
        8,
        8,
        8,
        6,
    ]
    text = "naı̈ve हिन्दी كَتَبَ " * 2 + "שָׁלוֹם."  # 3 words, 3 words, 2 tokens
    assert next(split([Document("a", text)], max_tokens=8, overlap=0)).id == "a"


@pytest.mark.parametrize(("max_tokens", "overlap"), [(7, 0), (16, 8), (16, -1)])
def test_settings_that_cannot_work_are_refused_at_once(max_tokens, overlap):
    with pytest.raises(SettingsError, match=str(overlap) if max_tokens > 8 else "7"):
        split([], max_tokens=max_tokens, overlap=overlap)
