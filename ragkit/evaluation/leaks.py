"""What an evaluation's questions have in common with those of training, and with the corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from ..errors import DataError
from ..types import Document, Example, Progress, quiet
from .containment import seek
from .duplicates import Asked, Pair, asked_of, names_of, near_pairs, normalize_text, pair_up
from .gold import sample

KINDS = {
    "exact": "test questions that train asks too",
    "near": "test questions nearly the same as one of train",
    "leaked": "either",
    "exact_answered": "asked in train too, with an answer in common",
    "near_answered": "nearly the same in train, with the same answers",
    "train_duplicates": "train questions that train asks again, or nearly so",
    "test_duplicates": "test questions that test asks again, or nearly so",
    "in_documents": "test questions that stand in a document",
    "absent_answers": "test answers that stand in no document",
    "without_answers": "test questions none of whose answers stands in a document",
}
"""What the shares of `Leaks` count."""

LONG = 5
"""The least words of a question that is sought in documents: "who is he" may stand anywhere."""


@dataclass(frozen=True, slots=True)
class Share:
    """So many of so many."""

    count: int
    n: int

    @property
    def share(self) -> float | None:
        """From 0 to 1; None of nothing."""
        return self.count / self.n if self.n else None


@dataclass(frozen=True, slots=True)
class Passage:
    """A document that holds the text of test questions."""

    ids: tuple[str, ...]
    text: str
    document: str


@dataclass(frozen=True, slots=True)
class Absent:
    """Answers to a test question that stand in no document; `all` if none of its answers does."""

    id: str
    text: str
    answers: tuple[str, ...]
    all: bool


@dataclass(frozen=True, slots=True)
class Leaks:
    """What `audit` found.

    Attributes:
        threshold: the similarity from which texts are nearly the same.
        one_set: a set was compared with itself.
        counts: the questions of `train` and of `test`, how many of test's are `unanswerable` (have
            no answers), and the `documents` if they were read.
        shares: the kinds of `KINDS` -> how many. Those of answers are shares of the questions that
            have some, or of the answers; those of documents are there if documents were read.
        pairs: between test and train, exact ones first, then the most similar.
        train_pairs: within train.
        test_pairs: within test.
        passages: in the order of the documents.
        absent: in the order of the questions.
    """

    threshold: float
    one_set: bool
    counts: dict[str, int]
    shares: dict[str, Share]
    pairs: tuple[Pair, ...]
    train_pairs: tuple[Pair, ...]
    test_pairs: tuple[Pair, ...]
    passages: tuple[Passage, ...] = ()
    absent: tuple[Absent, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return all of it as a value for JSON; of one set, its pairs stand under `pairs` alone."""
        shares = {
            kind: asdict(share) | {"share": share.share} for kind, share in self.shares.items()
        }
        again = {"train_pairs": (), "test_pairs": ()} if self.one_set else {}
        return asdict(self) | {"shares": shares} | again


class _Text(NamedTuple):
    train: list[Asked]
    test: list[Asked]


def audit(
    train: Sequence[Example],
    test: Sequence[Example],
    documents: Iterable[Document] | None = None,
    *,
    threshold: float = 0.8,
    seed: int = 0,
    progress: Progress = quiet,
) -> Leaks:
    """Find test questions that train asks too, and what of them stands in the documents.

    Questions are equal if they are so after `normalize_text`, and nearly so if the Jaccard
    similarity of their `shingles` reaches `threshold`. Questions of one pattern ("What are the
    symptoms of …") can be that similar and ask for different things; whether their answers agree
    is told with each pair. If `train is test`, the pairs are those of different questions within
    the one set.

    A document holds a question of at least five words if its title and text hold the normalised
    question as whole words, and an answer if its text covers it, as `cover_match` has it. Words end
    at spaces and punctuation, so that questions of scripts without spaces are one word.

    12,000 x 5,000 questions and 3,300 passages take about 7 seconds on one core.

    Args:
        train: questions that something was trained on, with their answers if they have any.
        test: questions that it is measured by.
        documents: the corpus, read once, a document at a time.
        threshold: from 0.1 to 1.
        seed: of the hash functions that find candidates (see `near_pairs`).
        progress: told of the stages `questions` and `documents`.

    Raises:
        DataError: a set without questions, an id twice in a set, a blank question, no documents,
            or more than a million pairs of texts that are nearly the same.
        SettingsError: the threshold is out of its range.
    """
    one_set = train is test
    _check("test", test)
    if not one_set:
        _check("train", train)
    asked = [asked_of(example) for example in test]
    texts = _by_text(asked, () if one_set else map(asked_of, train))
    near = near_pairs(list(texts), threshold, seed=seed, progress=progress)
    tests = [text.test for text in texts.values()]
    trains = tests if one_set else [text.train for text in texts.values()]
    within_test = pair_up(tests, tests, near)
    within_train = within_test if one_set else pair_up(trains, trains, near)
    between = within_test if one_set else pair_up(tests, trains, near)
    answerable = sum(bool(question.answers) for question in asked)
    shares = _shares(between, one_set, len(test), answerable)
    shares["train_duplicates"] = Share(len(_ids(within_train, both=True)), len(train))
    shares["test_duplicates"] = Share(len(_ids(within_test, both=True)), len(test))
    counts = {"train": len(train), "test": len(test), "unanswerable": len(test) - answerable}
    leaks = Leaks(threshold, one_set, counts, shares, between, within_train, within_test)
    if documents is None:
        return leaks
    return _with_documents(leaks, asked, texts, documents, progress)


def _check(name: str, examples: Sequence[Example]) -> None:
    if not examples:
        raise DataError(f"there are no {name} questions to audit")
    times = Counter(example.query.id for example in examples)
    if twice := [query for query, count in times.items() if count > 1]:
        raise DataError(
            f"{len(twice)} ids occur more than once among the {name} questions: {sample(twice)}"
        )
    if blank := [example.query.id for example in examples if not example.query.text.strip()]:
        raise DataError(
            f"{len(blank)} {name} questions are blank: {sample(blank)}. Leave them out."
        )


def _by_text(test: Iterable[Asked], train: Iterable[Asked]) -> dict[str, _Text]:
    texts: dict[str, _Text] = {}
    for question in test:
        texts.setdefault(normalize_text(question.text), _Text([], [])).test.append(question)
    for question in train:
        texts.setdefault(normalize_text(question.text), _Text([], [])).train.append(question)
    return texts


def _ids(pairs: Iterable[Pair], *, both: bool) -> set[str]:
    return {name for pair in pairs for name in pair.ids + (pair.other_ids if both else ())}


def _shares(
    pairs: Sequence[Pair], one_set: bool, questions: int, answerable: int
) -> dict[str, Share]:
    kinds = {
        "exact": [pair for pair in pairs if pair.exact],
        "near": [pair for pair in pairs if not pair.exact],
    }
    shares = {
        kind: Share(len(_ids(some, both=one_set)), questions)
        for kind, some in (kinds | {"leaked": pairs}).items()
    }
    for kind, some in kinds.items():
        answered = {name for pair in some for name in pair.answered}
        shares[f"{kind}_answered"] = Share(len(answered), answerable)
    return shares


def _with_documents(
    leaks: Leaks,
    asked: Sequence[Asked],
    texts: Mapping[str, _Text],
    documents: Iterable[Document],
    progress: Progress,
) -> Leaks:
    """Add what the documents hold of the test questions, and lack of their answers."""
    long = {
        text: both.test for text, both in texts.items() if both.test and len(text.split()) >= LONG
    }
    answers = [key for question in asked for key in question.answers]
    held = seek(long, answers, documents, progress=progress)
    if not held.documents:
        raise DataError("there are no documents to seek questions and answers in")
    passages = [
        Passage(names_of(long[text]), long[text][0].text, document)
        for text, document in held.questions
    ]
    absent = []
    for question in asked:
        lost = tuple(given for key, given in question.answers.items() if key in held.missing)
        if lost:
            whole = len(lost) == len(question.answers)
            absent.append(Absent(question.id, question.text, lost, whole))
    found = {name for passage in passages for name in passage.ids}
    answerable = len(asked) - leaks.counts["unanswerable"]
    shares = {
        "in_documents": Share(len(found), sum(map(len, long.values()))),
        "absent_answers": Share(sum(len(each.answers) for each in absent), len(answers)),
        "without_answers": Share(sum(each.all for each in absent), answerable),
    }
    return replace(
        leaks,
        counts=leaks.counts | {"documents": held.documents},
        shares=leaks.shares | shares,
        passages=tuple(passages),
        absent=tuple(absent),
    )
