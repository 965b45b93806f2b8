"""Documents -> smaller Documents, cut between sentences."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias
from unicodedata import category

import sentencex

from .errors import SettingsError
from .types import Document

Span: TypeAlias = tuple[int, int]
"""Where a stretch of a text begins and ends, in characters."""

Tokenize: TypeAlias = Callable[[str], Sequence[Span]]
"""Gives the span of each token of a text, in order: the offset mapping of a fast tokenizer.

Empty spans (a tokenizer's special tokens) are passed over.
"""

# sentencex 1.0 panics at white space outside ASCII after a full stop, and refuses lone surrogates
_UNREADABLE = re.compile(
    r"[\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ud800-\udfff]"
)
_WINDOW = 4096  # characters; sentencex takes quadratic time over a paragraph that has no spaces

_EAST_ASIAN = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


@cache
def words(unspaced: str) -> str:
    """Return the pattern of a word: letters and digits, with the combining marks after them.

    Python's \\w has no combining marks (Unicode's Mn and Mc), without which Indic scripts, and
    Arabic or Hebrew with vowels, fall into letters. A joiner after a mark belongs to it; variation
    selectors are no part of a spelling. Characters of the class `unspaced` are words of their own.
    """
    letters = rf"[^\W{unspaced}]+"
    marks = rf"(?![\0-\u02ff])[{_marks()}]+"  # looking ahead makes it five times as fast
    return rf"[{unspaced}]|{letters}(?:{marks}[\u200c\u200d]?(?:{letters})?)*"


def _marks() -> str:
    # The last mark but for variation selectors is U+1E94A; two are among the Japanese characters.
    codes = [code for code in range(0x300, 0x1F000) if category(chr(code)) in {"Mn", "Mc"}]
    kept = [code for code in codes if not (0xFE00 <= code <= 0xFE0F or code in {0x3099, 0x309A})]
    return "".join(map(chr, kept))


@cache
def _tokens() -> re.Pattern[str]:
    return re.compile(rf"{words(_EAST_ASIAN)}|[^\w\s]")


def sentences(text: str, language: str = "en") -> list[Span]:
    """Return the spans of a text's sentences, which follow one another and cover all of it.

    `language` is an ISO 639-1 code; one that sentencex does not know is split like English.
    """
    text = _UNREADABLE.sub(" ", text)
    ends: list[int] = []
    start, size = 0, _WINDOW
    while start < len(text):
        window = text[start : start + size]
        found = [b["end_index"] for b in sentencex.get_sentence_boundaries(language, window)]
        if start + size < len(text):
            found = found[:-1]  # the window may cut the last sentence short
        if found:
            ends += [start + end for end in found]
            start, size = ends[-1], _WINDOW
        elif start + size < len(text):
            size *= 2
        else:
            break
    if text and (not ends or ends[-1] < len(text)):
        ends.append(len(text))
    return list(zip([0, *ends], ends, strict=False))


def split(
    documents: Iterable[Document],
    *,
    max_tokens: int = 256,
    overlap: int = 32,
    tokenize: Tokenize | None = None,
    language: str = "en",
) -> Iterator[Document]:
    """Yield documents of at most `max_tokens` tokens, title included, cut between sentences.

    Sentences are packed in order; each piece repeats the last whole sentences of the one before it,
    as many as `overlap` tokens hold. Only a sentence longer than a piece is cut within, between
    tokens, at white space if there is some in the second half. A title longer than half of
    `max_tokens` is kept whole and text gets the other half. Tokens are by default words and
    punctuation marks (Chinese and Japanese characters count one each).

    A document that fits is yielded as it is. The n-th piece of another has the id `<id>#<n>`, the
    same title, and metadata as `Document` describes: parent.text[start:end] == piece.text. A piece
    that is split again keeps the first parent and the offsets into it.

    Raises:
        SettingsError: `max_tokens` is below 8, or `overlap` not below half of it.
    """
    if max_tokens < 8:
        raise SettingsError(f"max_tokens={max_tokens}: pieces need 8 tokens or more")
    if not 0 <= overlap < max_tokens // 2:
        limit = max_tokens // 2
        raise SettingsError(
            f"overlap={overlap}: must be from 0 to below {limit}, half of max_tokens"
        )
    return _pieces(documents, max_tokens, overlap, tokenize or _words, language)


def _words(text: str) -> list[Span]:
    return [match.span() for match in _tokens().finditer(text)]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The spans of a text's tokens; both lists ascend."""

    starts: list[int]
    ends: list[int]

    def count(self, start: int, end: int) -> int:
        """Count the tokens that have a character in text[start:end]."""
        return bisect_left(self.starts, end) - bisect_right(self.ends, start)


def _pieces(
    documents: Iterable[Document], max_tokens: int, overlap: int, tokenize: Tokenize, language: str
) -> Iterator[Document]:
    for document in documents:
        shift = len(document.contents) - len(document.text)
        spans = [(start, end) for start, end in tokenize(document.contents) if start < end]
        own = [(max(start - shift, 0), end - shift) for start, end in spans if end > shift]
        tokens = _Tokens([start for start, _ in own], [end for _, end in own])
        budget = max(max_tokens - (len(spans) - len(own)), max_tokens // 2)
        if len(own) <= budget:
            yield document
            continue
        units = _units(document.text, sentences(document.text, language), tokens, budget)
        for number, (start, end) in enumerate(_pack(units, tokens, budget, overlap), 1):
            yield piece_of(document, number, start, end)


def parent_of(document: Document) -> str | None:
    """Return the id of the document that a piece was split off, or None.

    "parent" alone may be a field of the user's own, as in a forum's threads.
    """
    parent, *offsets = map(document.metadata.get, ("parent", "start", "end"))
    split_off = isinstance(parent, str) and all(isinstance(offset, int) for offset in offsets)
    return parent if split_off else None


def piece_of(document: Document, number: int, start: int, end: int) -> Document:
    """Return the n-th piece of a document, from its text's characters `start` to `end`."""
    parent = parent_of(document)
    parent, base = (document.id, 0) if parent is None else (parent, document.metadata["start"])
    place = {"parent": parent, "start": base + start, "end": base + end}
    text = document.text[start:end]
    return Document(f"{document.id}#{number}", text, document.title, {**document.metadata, **place})


def _units(
    text: str, spans: Iterable[Span], tokens: _Tokens, budget: int
) -> list[tuple[int, int, bool]]:
    """Return what is packed, without white space at its ends: (start, end, is a whole sentence)."""
    units = []
    for first, last in spans:
        start, end = _stripped(text, first, last)
        whole = tokens.count(start, end) <= budget
        while tokens.count(start, end) > budget:
            cut = _cut(text, start, end, tokens, budget)
            units.append((*_stripped(text, start, cut), False))
            start, _ = _stripped(text, cut, end)
        if start < end:
            units.append((start, end, whole))
    return units


def _stripped(text: str, start: int, end: int) -> Span:
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def _cut(text: str, start: int, end: int, tokens: _Tokens, budget: int) -> int:
    """Return where to cut an over-long stretch: within `budget` tokens if there is a place to."""
    first = bisect_right(tokens.ends, start)
    cut = 0
    for index in range(first + budget, first, -1):
        place = tokens.starts[index]
        if tokens.ends[index - 1] > place or place <= start:
            continue  # tokens that share characters (the bytes of an emoji) are kept together
        if text[place - 1].isspace() or text[place].isspace():
            return place
        cut = cut or place
        if index <= first + budget // 2:
            break
    if cut:
        return cut
    indices = range(first + budget + 1, len(tokens.starts))
    return next((p for i in indices if tokens.ends[i - 1] <= (p := tokens.starts[i]) < end), end)


def _pack(
    units: Sequence[tuple[int, int, bool]], tokens: _Tokens, budget: int, overlap: int
) -> Iterator[Span]:
    first = 0
    for last, (_, end, _) in enumerate(units):
        following = units[last + 1][1] if last + 1 < len(units) else None
        start = units[first][0]
        if following is not None and tokens.count(start, following) <= budget:
            continue
        yield start, end
        if following is None:
            return
        first = last + 1
        # this cannot pass the piece's own first unit, with which `following` did not fit
        while units[first - 1][2]:
            earlier = units[first - 1][0]
            if tokens.count(earlier, end) > overlap or tokens.count(earlier, following) > budget:
                break
            first -= 1
