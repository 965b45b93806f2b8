"""The analyser: text -> the terms that BM25 counts."""

from __future__ import annotations

import re
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

# Japanese and Chinese write no spaces between words: each of their characters is a term.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_ASCII_TERMS = re.compile(r"\w+", re.ASCII)

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


class Vocabulary(dict[str, int]):
    """Word -> number of its term; -1 for a stop word. Every word is stemmed once only."""

    def __init__(self, analyser: Analyser) -> None:
        super().__init__()
        self.terms: list[str] = []
        self._numbers: dict[str, int] = {}
        self._stopwords = _stop_words(analyser.stopwords)
        self._stemmer = Stemmer.Stemmer(analyser.stemmer) if analyser.stemmer else None

    def __missing__(self, word: str) -> int:
        number = -1
        if word not in self._stopwords:
            term = self._stemmer.stemWord(word) if self._stemmer else word
            number = self._numbers.setdefault(term, len(self.terms))
            if number == len(self.terms):
                self.terms.append(term)
        self[word] = number
        return number

    def number(self, texts: Iterable[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return all texts' terms as numbers, shape [terms], and their lengths, shape [texts]."""
        numbers, counts = array("i"), array("q")
        look_up = self.__getitem__
        for text in texts:
            before = len(numbers)
            numbers.extend([number for number in map(look_up, _words(text)) if number >= 0])
            counts.append(len(numbers) - before)
        return np.frombuffer(numbers, dtype=np.int32), np.frombuffer(counts, dtype=np.int64)
