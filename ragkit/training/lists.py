"""What a retriever or a reranker is trained on: questions, each with a list of documents.

Documents are numbered, so that one which several questions of a batch share is encoded once, and is
nobody's negative whose positive it is. What is drawn at each access follows from the seed and the
place alone, as in `draws`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from torch.utils.data import Dataset

from ..errors import DataError
from ..types import Document, Example

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ListedQuestion:
    """A question with documents by their numbers.

    Attributes:
        text: the question.
        positives: the documents that are relevant to it; never its negatives.
        others: the documents that it is told from: negatives, or those that were retrieved.
        scores: a teacher's score of each document; empty without a teacher.
    """

    text: str
    positives: tuple[int, ...]
    others: tuple[int, ...]
    scores: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DrawnList:
    """A question at one access: a positive, if it has one, and then the others of its list.

    `scores` are a teacher's, one a document, or empty.
    """

    text: str
    documents: tuple[int, ...]
    positives: tuple[int, ...]
    scores: tuple[float, ...]


def listed(
    examples: Sequence[Example], scores: Mapping[tuple[str, str], float] | None = None
) -> tuple[list[ListedQuestion], list[Document]]:
    """Number the documents of examples.

    Args:
        examples: questions with positives and negatives.
        scores: (query id, document id) -> a teacher's score, of every pair if any.

    Returns:
        questions, and the documents by number.

    Raises:
        DataError: a question has neither positives nor negatives, or two documents have one id.
    """
    numbers: dict[str, int] = {}
    documents: list[Document] = []

    def number(document: Document) -> int:
        place = numbers.setdefault(document.id, len(documents))
        if place == len(documents):
            documents.append(document)
        elif documents[place].contents != document.contents:
            raise DataError(
                f"two documents of the examples have the id {document.id!r} and differ in text. "
                "Give each its own."
            )
        return place

    questions = []
    for example in examples:
        if not example.positives and not example.negatives:
            raise DataError(
                f"question {example.query.id!r} has neither positive nor negative documents"
            )
        positives = tuple(dict.fromkeys(map(number, example.positives)))
        others = dict.fromkeys(map(number, example.negatives))
        named = {documents[place].id: place for place in (*positives, *others)}
        questions.append(
            ListedQuestion(
                example.query.text,
                positives,
                tuple(place for place in others if place not in positives),
                {place: scores[example.query.id, name] for name, place in named.items()}
                if scores
                else {},
            )
        )
    return questions, documents


def check_lists_of_two(questions: Sequence[ListedQuestion]) -> None:
    """Refuse lists of one document, from which no order can be learnt.

    Raises:
        DataError: no question has more; a warning tells how many have one.
    """
    alone = sum(len({*each.positives[:1], *each.others}) < 2 for each in questions)
    if alone == len(questions):
        raise DataError(
            f"none of {alone} questions has negatives to tell its positives from. Find some: "
            "ragkit-train negatives"
        )
    if alone:
        _log.warning("%d of %d questions have no negatives.", alone, len(questions))


class DrawnLists(Dataset[DrawnList]):
    """The lists of a run, from one place on.

    Args:
        questions: gives the questions that a step is drawn from; they stay as many.
        steps: optimiser steps.
        batch: questions in a step.
        most: of the other documents of a question, drawn at random; None takes all in their order.
        repeat: whether some are taken twice where there are fewer, so that lists are equally long.
        together: whether questions of one document (the first positive, or what was found first)
            follow each other, so that a batch has fewer to encode; else their order is random.
        seed: of the draws.
        begin: the place of the first.
    """

    def __init__(
        self,
        questions: Callable[[int], Sequence[ListedQuestion]],
        steps: int,
        batch: int,
        most: int | None,
        *,
        together: bool = False,
        repeat: bool = False,
        seed: int = 0,
        begin: int = 0,
    ) -> None:
        self._questions = questions
        self._size = steps * batch
        self._batch = batch
        self._most = most
        self._together = together
        self._repeat = repeat
        self._seed = seed
        self._begin = begin
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return self._size - self._begin

    def __getitem__(self, place: int) -> DrawnList:
        """Return the list at a place, counted from `begin`."""
        if not 0 <= place < len(self):
            raise IndexError(place)
        place += self._begin
        questions = self._questions(place // self._batch)
        epoch, rank = divmod(place, len(questions))
        question = questions[self._order(epoch)[rank]]
        own = Random(f"{self._seed} list {place}")
        positive = (own.choice(question.positives),) if question.positives else ()
        others = question.others
        if self._most is not None and len(others) > self._most:
            others = tuple(own.sample(others, self._most))
        elif self._most is not None and self._repeat and others:
            others += tuple(own.choices(others, k=self._most - len(others)))
        documents = positive + others
        return DrawnList(
            question.text,
            documents,
            question.positives,
            tuple(question.scores[each] for each in documents) if question.scores else (),
        )

    def _order(self, epoch: int) -> list[int]:
        """Return the order of an epoch, by the lists as they were first."""
        if epoch not in self._orders:
            questions = self._questions(0)
            random = Random(f"{self._seed} epoch {epoch}")
            order = list(range(len(questions)))
            random.shuffle(order)
            if self._together:
                members: dict[tuple[int, ...], list[int]] = {}
                for place in order:
                    question = questions[place]
                    group = (question.positives or question.others)[:1]
                    members.setdefault(group, []).append(place)
                order = [place for group in members.values() for place in group]
            self._orders = {key: self._orders[key] for key in self._orders if key == epoch - 1}
            self._orders[epoch] = order
        return self._orders[epoch]
