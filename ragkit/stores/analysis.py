"""The analyser: text -> the terms that BM25 counts."""

from __future__ import annotations

import itertools
import re
import secrets
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import Stemmer
import stop_words
from numpy.typing import NDArray

from ..errors import SettingsError
from ..splitting import words
from ._counting import IN_WORDS, number_terms, number_words

# Japanese and Chinese write no spaces between words: each of their characters is a term.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_ASCII_TERMS = re.compile(r"\w+", re.ASCII)

_BLOCK = 1 << 20  # bytes of text that are numbered at once

# The English list of Lucene's StandardAnalyzer, with which published BM25 baselines are computed.
_LUCENE_ENGLISH = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with"
)

_CODES: dict[str, str] = {name: code for code, name in stop_words.LANGUAGE_MAPPING.items()} | {
    "armenian": "hy", "basque": "eu", "dutch_porter": "nl", "esperanto": "eo", "estonian": "et",
    "irish": "ga", "lithuanian": "lt", "nepali": "ne", "serbian": "sr", "sesotho": "st",
    "tamil": "ta", "yiddish": "yi",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Analyser:
    """How text becomes terms: NFKC, lower case, words, without stop words, stemmed.

    `stemmer` names a Snowball stemmer (`english`, `german`, `porter` …) or is None. `stopwords` is
    a language of the `stop-words` package, `lucene` (Lucene's 33 English words) or None.
    """

    stemmer: str | None = "english"
    stopwords: str | None = "lucene"

    def __post_init__(self) -> None:
        """Refuse unknown names.

        Raises:
            SettingsError: no such stemmer or stop-word list.
        """
        if self.stemmer is not None and self.stemmer not in Stemmer.algorithms():
            known = ", ".join(Stemmer.algorithms())
            raise SettingsError(f"unknown stemmer {self.stemmer!r}; known are {known}")
        _stop_words(self.stopwords)

    @classmethod
    def of_language(cls, language: str) -> Analyser:
        """Return a language's analyser: its Snowball stemmer and stop words, where they exist.

        Raises:
            SettingsError: neither exists and the name is not `none`.
        """
        name = language.lower()
        if name == "none":
            return cls(None, None)
        stemmer = name if name in Stemmer.algorithms() else None
        if name == "english":
            return cls(stemmer, "lucene")
        stopwords = name if name in stop_words.AVAILABLE_LANGUAGES else None
        if stemmer is None and stopwords is None:
            known = sorted({*Stemmer.algorithms(), *stop_words.AVAILABLE_LANGUAGES, "none"})
            raise SettingsError(f"unknown language {language!r}; known are {', '.join(known)}")
        return cls(stemmer, stopwords)

    @property
    def code(self) -> str:
        """The language's ISO 639-1 code; "en" where the stemmer and stop words tell none."""
        code: str = _CODES.get(self.stemmer or self.stopwords or "", "en")
        return code

    def to_json(self) -> dict[str, Any]:
        """Return the settings, as the manifest keeps them."""
        return asdict(self)

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> Analyser:
        """Rebuild an analyser from `to_json`'s settings."""
        return cls(settings["stemmer"], settings["stopwords"])

    def terms(self, text: str) -> list[str]:
        """Return a text's terms, in their order, repeated ones included."""
        terms = map(_term_of(self), _words(text))
        return [term for term in terms if term is not None]


def _words(text: str) -> list[str]:
    if text.isascii():
        return _ASCII_TERMS.findall(text.lower())
    return _unicode_terms().findall(unicodedata.normalize("NFKC", text).lower())


@cache
def _unicode_terms() -> re.Pattern[str]:
    return re.compile(words(_UNSPACED))


@cache
def _term_of(analyser: Analyser) -> Callable[[str], str | None]:
    """Return the function from a word to its term, or to None for a stop word."""
    stopwords = _stop_words(analyser.stopwords)

    @lru_cache(maxsize=1 << 16)
    def term(word: str) -> str | None:
        if word in stopwords:
            return None
        # A stemmer is not safe to share between threads, and costs less than one stemming.
        return Stemmer.Stemmer(analyser.stemmer, 0).stemWord(word) if analyser.stemmer else word

    return term


@cache
def _stop_words(name: str | None) -> frozenset[str]:
    if name is None:
        return frozenset()
    if name == "lucene":
        return frozenset(_LUCENE_ENGLISH.split())
    try:
        words = stop_words.get_stop_words(name)
    except stop_words.StopWordError as error:
        known = ", ".join(["lucene", *stop_words.AVAILABLE_LANGUAGES])
        raise SettingsError(f"unknown stop-word list {name!r}; known are {known}") from error
    # The lists hold forms with apostrophes, which the analyser takes apart.
    return frozenset(part for word in words for part in _words(word))


class Vocabulary:
    """Numbers the terms of texts, in the order in which they come. No word is stemmed twice."""

    def __init__(self, analyser: Analyser) -> None:
        self._numbers: dict[str, int] = {}
        self._stopwords = _stop_words(analyser.stopwords)
        self._stemmer = Stemmer.Stemmer(analyser.stemmer) if analyser.stemmer else None
        # Which words share a place in the table must not be known to who writes documents.
        self._key = np.uint64(2 + secrets.randbelow((1 << 31) - 3))
        self._slots = np.full(1 << 12, -1, np.int32)
        self._known = np.empty(0, np.uint8)
        self._known_ends = np.empty(0, np.int64)
        self._term_of = np.empty(0, np.int32)

    @property
    def terms(self) -> list[str]:
        """The terms, by their numbers."""
        return list(self._numbers)

    def number(self, texts: Iterable[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return all texts' terms as numbers, shape [terms], and their lengths, shape [texts]."""
        numbers, lengths = array("i"), array("q")
        block, ends = bytearray(), array("q")
        for text in texts:
            block += _word_bytes(text)
            ends.append(len(block))
            if len(block) >= _BLOCK:
                self._number_block(block, ends, numbers, lengths)
                block, ends = bytearray(), array("q")
        self._number_block(block, ends, numbers, lengths)
        return np.frombuffer(numbers, dtype=np.int32), np.frombuffer(lengths, dtype=np.int64)

    def _number_block(
        self, block: bytearray, ends: array[int], numbers: array[int], lengths: array[int]
    ) -> None:
        before = len(self._known_ends)
        words, counts, self._slots, self._known, self._known_ends = number_words(
            np.frombuffer(block, np.uint8), np.frombuffer(ends, np.int64), IN_WORDS, self._key,
            self._slots, self._known, self._known_ends,
        )  # fmt: skip
        self._add_words(before)
        numbers.frombytes(memoryview(number_terms(words, counts, self._term_of)).cast("B"))
        lengths.frombytes(memoryview(counts).cast("B"))

    def _add_words(self, known: int) -> None:
        first = int(self._known_ends[known - 1]) if known else 0
        ends = (self._known_ends[known:] - first).tolist()
        text = self._known[first : first + ends[-1]].tobytes() if ends else b""
        words = [text[start:end].decode() for start, end in itertools.pairwise([0, *ends])]
        terms = self._stemmer.stemWords(words) if self._stemmer else words
        numbers, stopwords = self._numbers, self._stopwords
        term_of = [
            -1 if word in stopwords else numbers.setdefault(term, len(numbers))
            for word, term in zip(words, terms, strict=True)
        ]
        self._term_of = np.concatenate([self._term_of, np.array(term_of, np.int32)])


def _word_bytes(text: str) -> bytes:
    """Return a text's words as bytes, with others between them."""
    return text.lower().encode() if text.isascii() else " ".join(_words(text)).encode()
