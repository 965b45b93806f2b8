"""What is known about the questions of an evaluation, checked before any work is done."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import DataError
from ..types import Example, Qrels, Run

_log = logging.getLogger(__name__)

LISTED = 10
"""How many ids of each kind of question or document are listed where they are counted."""


@dataclass(frozen=True, slots=True)
class Gold:
    """The judgements and answers of the questions asked.

    Attributes:
        qrels: judgements of these questions alone.
        answers: query id -> gold answers, none for a question that cannot be answered. Answers to
            questions that are not named here cannot be scored.
        remarks: ids that the scores leave out or that need a look, by the reason.
    """

    qrels: Qrels
    answers: dict[str, tuple[str, ...]]
    remarks: dict[str, list[str]]


def gold_of(
    examples: Sequence[Example],
    qrels: Qrels | None = None,
    known: Callable[[str], bool] | None = None,
) -> Gold:
    """Collect what is known about questions, and refuse what would score nothing or a silent 0.

    A question without answers counts as unanswerable if others have answers and the qrels name no
    relevant document for it; where no question has answers, or a document would answer it, its
    gold is missing and its answer is not scored. `known` tells whether a document is in the index,
    as itself or as the parent of others.

    Raises:
        DataError: no questions, an id twice, neither answers nor qrels, or qrels that name none of
            the questions, nothing relevant to them, or only documents that are not in the index.
    """
    ids = _question_ids(examples)
    asked = _asked_qrels(ids, qrels)
    relevant = {query for query, grades in asked.items() if max(grades.values()) > 0}
    golds = {example.query.id: example.answers for example in examples if example.answers}
    if not golds and not asked:
        raise DataError(
            f"none of the {len(ids)} questions has answers, and there are no qrels: "
            "nothing can be measured. Pass qrels, or questions with an `answers` field."
        )
    answerable = golds.keys() | relevant
    unanswerable = [query for query in ids if golds and query not in answerable]
    scored = golds.keys() | set(unanswerable)
    remarks = {
        "unjudged": [query for query in ids if asked and query not in asked],
        "nothing_relevant": [query for query in asked if query not in relevant],
        "unanswerable": unanswerable,
        "without_gold": [query for query in ids if query not in scored],
        "unknown_documents": _unknown(asked, known) if known else [],
    }
    _warn(remarks)
    answers = {query: golds.get(query, ()) for query in ids if query in scored}
    return Gold(asked, answers, remarks)


def warn_of_mixed_ids(run: Run, qrels: Qrels) -> None:
    """Warn if the qrels judge nothing at all that a run found: they may be of another corpus."""
    found = {document for query in qrels for document in run.get(query, ())}
    judged = {document for grades in qrels.values() for document in grades}
    if qrels and found.isdisjoint(judged):
        _log.warning(
            f"of the {len(found)} documents found, the qrels judge none, so every retrieval score "
            f"is 0. Found were {sample(sorted(found)) or 'none'}; judged are "
            f"{sample(sorted(judged))}. Are the qrels of this corpus?"
        )


def _question_ids(examples: Sequence[Example]) -> list[str]:
    ids = [example.query.id for example in examples]
    if not ids:
        raise DataError("there are no questions to evaluate")
    twice = [query for query, count in Counter(ids).items() if count > 1]
    if twice:
        raise DataError(f"{len(twice)} question ids occur more than once: {sample(twice)}")
    return ids


def _asked_qrels(ids: Sequence[str], qrels: Qrels | None) -> Qrels:
    if qrels is None:
        return {}
    asked = {query: dict(qrels[query]) for query in ids if qrels.get(query)}
    if not asked:
        raise DataError(
            f"the qrels name none of the {len(ids)} questions. Questions are called {sample(ids)}; "
            f"the qrels name {sample(list(qrels)) or 'nothing'}."
        )
    if all(grade < 1 for grades in asked.values() for grade in grades.values()):
        raise DataError(
            f"the qrels name no relevant document (grade 1 or more) for any of {len(asked)} "
            "questions: every score would be 0"
        )
    return asked


def _unknown(qrels: Qrels, known: Callable[[str], bool]) -> list[str]:
    relevant = dict.fromkeys(
        document for grades in qrels.values() for document, grade in grades.items() if grade > 0
    )
    unknown = [document for document in relevant if not known(document)]
    if relevant and len(unknown) == len(relevant):
        raise DataError(
            f"none of the {len(relevant)} relevant documents that the qrels name is in the index: "
            f"{sample(unknown)}. Are they of another corpus?"
        )
    return unknown


def _warn(remarks: Mapping[str, Sequence[str]]) -> None:
    messages = {
        "unjudged": "{n} questions have no qrels; retrieval scores leave them out: {ids}",
        "nothing_relevant": "{n} questions have qrels but nothing relevant, and score 0: {ids}",
        "unknown_documents": "{n} relevant documents are not in the index: {ids}",
    }
    for name, message in messages.items():
        if remarks[name]:
            _log.warning(message.format(n=len(remarks[name]), ids=sample(remarks[name])))


def sample(ids: Iterable[str]) -> str:
    """Quote the first ids of many for a message."""
    quoted = [repr(name) for name in ids]
    more = ["…"] if len(quoted) > LISTED else []
    return ", ".join(quoted[:LISTED] + more)
