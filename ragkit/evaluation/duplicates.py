"""Texts and questions that are equal or nearly so."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import DataError, SettingsError
from ..types import Example, Progress, quiet
from .answers import normalize_answer

_SHINGLE = 3  # characters
_HASHES = 128
_RECALL = 0.995
_MOST_PAIRS = 1_000_000  # about 300 MB
_SLICE = 256  # texts between two reports of progress


class _Blanks(dict[int, int]):
    """A table for `str.translate` that puts a space for every character of punctuation."""

    def __missing__(self, code: int) -> int:
        blank = unicodedata.category(chr(code)).startswith("P")
        self[code] = ord(" ") if blank else code
        return self[code]


_BLANKS = _Blanks()


def normalize_text(text: str) -> str:
    """Fold case and compatible characters, and leave single spaces for punctuation and spaces.

    Characters are compatible by Unicode's NFKC ("ﬁ" and "fi"); punctuation is what Unicode files
    under P, so that symbols such as "+" and "$" stay. A text of punctuation alone is only folded.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.translate(_BLANKS).split()) or " ".join(folded.split())


def answer_key(answer: str) -> str:
    """Return what equal answers have in common: normalised, or lower-cased if nothing is left."""
    return normalize_answer(answer) or answer.lower().strip()


def shingles(text: str) -> frozenset[str]:
    """Return the runs of three characters of a normalised text with a space at either end.

    Three characters, since questions are short. Of questions changed by one letter (a typo, or a
    plural's s), 87 to 100 % are as similar as 0.8 by them, over four sets of questions of 7 to 13
    words; by four characters it is 72 to 100 %, by words 25 to 99 %, by pairs of words at most
    19 %. Runs of two characters find more of them (97 to 100 %), but also three to six times as
    many pairs of other questions, since most questions hold the commonest pairs of letters.
    """
    padded = f" {text} "
    return frozenset(padded[place : place + _SHINGLE] for place in range(len(padded) - 2))


def near_pairs(
    texts: Sequence[str], threshold: float = 0.8, *, seed: int = 0, progress: Progress = quiet
) -> list[tuple[int, int, float]]:
    """Find the pairs of normalised texts whose shingles' Jaccard similarity reaches `threshold`.

    Candidates share a band of MinHash values (Broder 1997; Leskovec, Rajaraman and Ullman, "Mining
    of Massive Datasets", section 3.4), and each is then compared by its shingles: no pair is
    wrong, and of those right at the threshold at most one in 200 is expected to be missed. Time
    grows with the texts, but with their square where all of them share half of their words.

    Args:
        texts: distinct and not empty.
        threshold: from 0.1 to 1.
        seed: of the hash functions.
        progress: told of the stage `questions`.

    Returns:
        (place, greater place, similarity), the most similar first, then by place.

    Raises:
        SettingsError: the threshold is out of its range.
        DataError: more than a million pairs, as of texts that share a long beginning.
    """
    bands, rows = _bands(threshold)
    numbers: dict[str, int] = {}
    sets = [
        # Sorted: a set's order differs between processes, and would make a seed mean nothing.
        frozenset(numbers.setdefault(shingle, len(numbers)) for shingle in sorted(shingles(text)))
        for text in texts
    ]
    from datasketch import MinHash, MinHashLSH  # takes a second or more to import

    index = MinHashLSH(num_perm=bands * rows, params=(bands, rows))
    hashes = MinHash.generator(sets, num_perm=bands * rows, seed=seed, hashfunc=int)
    pairs: list[tuple[int, int, float]] = []
    for place, (held, hashed) in enumerate(zip(sets, hashes, strict=True)):
        if place % _SLICE == 0:
            progress("questions", place, len(texts))
        for other in index.query(hashed):
            shared = len(held & sets[other])
            alike = shared / (len(held) + len(sets[other]) - shared)
            if alike >= threshold:
                pairs.append((other, place, alike))
        index.insert(place, hashed, check_duplication=False)
        if len(pairs) > _MOST_PAIRS:
            raise DataError(
                f"more than {_MOST_PAIRS:,} pairs of questions are as similar as {threshold}: most "
                "of their words are the same, as by an instruction before each. Leave out what "
                "they share, or raise the threshold."
            )
    progress("questions", len(texts), len(texts))
    return sorted(pairs, key=lambda pair: (-pair[2], *pair[:2]))


def _bands(threshold: float) -> tuple[int, int]:
    """Choose the longest bands of hashes of which a pair at the threshold shares one.

    It does with probability 1 - (1 - t^rows)^bands. datasketch's own choice weighs pairs below the
    threshold as much as those above it, and at 0.8 would find 40 % of those right above it.
    """
    if not 0.1 <= threshold <= 1:
        raise SettingsError(f"the threshold of similarity lies between 0.1 and 1, not {threshold}")
    rows = max(
        rows
        for rows in range(1, _HASHES // 2 + 1)
        if 1 - (1 - threshold**rows) ** (_HASHES // rows) >= _RECALL
    )
    return _HASHES // rows, rows


class Asked(NamedTuple):
    """A question as it is compared."""

    id: str
    text: str
    answers: dict[str, str]  # `answer_key` -> as given


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts of questions that are alike, with all the questions that ask them.

    Attributes:
        ids: of the test questions; within one set, of the questions that ask the one text.
        other_ids: of the train questions; within one set, of those that ask the other text. A text
            that one set asks more than once is its own pair, with the same ids on both sides.
        text: as the first of `ids` has it.
        other_text: as the first of `other_ids` has it.
        similarity: of the normalised texts' shingles, from the threshold to 1.
        exact: the normalised texts are equal.
        answered: the ids of the questions whose answers another question of the pair has too: at
            least one of them if the pair is exact, the same set of them if it is not. Of a pair
            between two sets, these are test questions.
    """

    ids: tuple[str, ...]
    other_ids: tuple[str, ...]
    text: str
    other_text: str
    similarity: float
    exact: bool
    answered: tuple[str, ...]


def asked_of(example: Example) -> Asked:
    """Take from an example what is compared; blank answers are none."""
    answers: dict[str, str] = {}
    for answer in example.answers:
        if key := answer_key(answer):
            answers.setdefault(key, answer)
    return Asked(example.query.id, example.query.text, answers)


def pair_up(
    left: Sequence[list[Asked]],
    right: Sequence[list[Asked]],
    near: Iterable[tuple[int, int, float]],
) -> tuple[Pair, ...]:
    """Pair texts that are equal or in `near`: exact pairs first, then as `near` has them.

    `left` and `right` hold the questions that ask each text (test's and train's, say), and are the
    same object where a set is compared with itself.
    """
    within = left is right
    least = 2 if within else 1
    pairs = [
        _pair(ours, theirs, 1.0, exact=True)
        for ours, theirs in zip(left, right, strict=True)
        if len(ours) >= least and theirs
    ]
    for one, other, similarity in near:
        for ours, theirs in ((one, other),) if within else ((one, other), (other, one)):
            if left[ours] and right[theirs]:
                pairs.append(_pair(left[ours], right[theirs], similarity, both=within))
    return tuple(pairs)


def _pair(
    ours: list[Asked],
    theirs: list[Asked],
    similarity: float,
    *,
    exact: bool = False,
    both: bool = False,
) -> Pair:
    answered = _answered(ours, theirs, exact) + (_answered(theirs, ours, exact) if both else ())
    texts = ours[0].text, theirs[0].text
    return Pair(names_of(ours), names_of(theirs), *texts, similarity, exact, answered)


def _answered(ours: list[Asked], theirs: list[Asked], exact: bool) -> tuple[str, ...]:
    """Return which of ours have answers of another of theirs: any of them, or all if not exact."""

    def keys(question: Asked) -> Iterable[object]:
        if exact:
            return question.answers
        return [frozenset(question.answers)] if question.answers else []

    holders = Counter(key for question in theirs for key in keys(question))
    least = 2 if ours is theirs else 1  # a question is not another of its own
    return tuple(
        question.id for question in ours if any(holders[key] >= least for key in keys(question))
    )


def names_of(questions: Iterable[Asked]) -> tuple[str, ...]:
    """Return the ids of questions."""
    return tuple(question.id for question in questions)
