"""What documents hold word for word, of many questions and answers at once."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass

from ..types import Document, Progress, quiet
from .answers import cover_match, normalize_answer
from .duplicates import normalize_text

_SLICE = 256  # documents between two reports of progress


class Phrases:
    """Phrases to be sought in many texts as runs of whole words.

    Each is filed under its longest word and only compared with texts that hold that word. Phrases
    and texts are normalised alike, with single spaces between words.
    """

    def __init__(self, phrases: Iterable[str]) -> None:
        self._by_word: dict[str, list[str]] = {}
        for phrase in dict.fromkeys(phrases):
            self._by_word.setdefault(_longest_word(phrase), []).append(phrase)

    def __bool__(self) -> bool:
        return bool(self._by_word)

    def within(self, text: str) -> list[str]:
        """Return the phrases that a text holds, sorted."""
        padded = f" {text} "
        words = self._by_word.keys() & text.split()
        return sorted(
            phrase for word in words for phrase in self._by_word[word] if f" {phrase} " in padded
        )

    def discard(self, phrase: str) -> None:
        """Seek a phrase no longer."""
        word = _longest_word(phrase)
        self._by_word[word].remove(phrase)
        if not self._by_word[word]:
            del self._by_word[word]


def _longest_word(phrase: str) -> str:
    return max(phrase.split(), key=len)


@dataclass(frozen=True, slots=True)
class Held:
    """What documents hold.

    Attributes:
        questions: (question, document id), in the documents' order.
        missing: the answers that no document covers.
        documents: how many there are.
    """

    questions: list[tuple[str, str]]
    missing: set[str]
    documents: int


def seek(
    questions: Iterable[str],
    answers: Iterable[str],
    documents: Iterable[Document],
    *,
    progress: Progress = quiet,
) -> Held:
    """Find the documents that hold questions, and the answers that no document covers.

    Documents are read once, and one at a time.

    Args:
        questions: by `normalize_text`; sought in title and text.
        answers: by `answer_key`; sought in the text, as `cover_match` does.
        documents: the corpus.
        progress: told of the stage `documents`.
    """
    total = len(documents) if isinstance(documents, Sized) else None
    phrases, missing = Phrases(questions), set(answers)
    # `cover_match` seeks what normalisation leaves nothing of as it is, but only one by one.
    odd = {answer for answer in missing if not normalize_answer(answer)}
    sought = Phrases(missing - odd)
    held: list[tuple[str, str]] = []
    read = 0
    for document in documents:
        if read % _SLICE == 0:
            progress("documents", read, total)
        read += 1
        if phrases:
            found = phrases.within(normalize_text(document.contents))
            held += [(question, document.id) for question in found]
        covered = sought.within(normalize_answer(document.text)) if sought else []
        for answer in covered:
            sought.discard(answer)
        missing.difference_update(covered)
        for answer in [answer for answer in odd if cover_match(document.text, [answer])]:
            odd.discard(answer)
            missing.discard(answer)
    progress("documents", read, read)
    return Held(held, missing, read)
