"""Questions with what is relevant to them, apart from those that are held out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from sys import maxsize
from typing import TYPE_CHECKING

from ragkit.corpus import read_qrels, read_questions
from ragkit.errors import DataError
from ragkit.evaluation.duplicates import normalize_text
from ragkit.evaluation.evidence import gold_passages
from ragkit.evaluation.gold import Gold, sample
from ragkit.parsing import suffix_of
from ragkit.types import Document, Example, Qrels

from .questions import check_apart, drawn, held_out

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from ragkit.stores.index import Index

    from .list_settings import ListSettings


def with_positives(
    asked: Sequence[Example], path: Path, qrels_path: Path | None, index: Index
) -> tuple[list[Example], Qrels, dict[str, int]]:
    """Keep the questions with positives: those of qrels that an index holds, or else their own.

    Args:
        asked: the questions of `path`.
        path: where they come from.
        qrels_path: what judges them; None takes the positives that came with them.
        index: where the relevant documents are looked up.

    Returns:
        the questions, the qrels, and how many were left out of what.

    Raises:
        DataError: that leaves no question.
    """
    qrels: Qrels = {}
    judged, own = list(asked), {each.query.id: each.positives for each in asked}
    named = [document.id for each in asked for document in each.positives]
    none = f"{path}: none of {len(asked)} questions has positives. Pass --qrels FILE"
    if qrels_path is not None:
        qrels = read_qrels(qrels_path)
        gold = Gold(qrels, {}, {})
        judged = [replace(each, positives=()) for each in asked if each.query.id in qrels]
        if not judged:
            raise DataError(f"{qrels_path} judges none of the questions of {path}")
        judged = [
            replace(each, positives=_kept(own[each.query.id], _positives(each, gold, index)))
            for each in judged
        ]
        named = [d for each in judged for d, grade in qrels[each.query.id].items() if grade > 0]
        none = (
            f"none of the {len(set(named))} documents that {qrels_path} judges relevant to "
            f"questions of {path} is in {index.path}: {sample(dict.fromkeys(named))}"
        )
    examples = [example for example in judged if example.positives]
    if not examples:
        raise DataError(none)
    missing = [document for document in dict.fromkeys(named) if not index.pieces(document)]
    if missing:
        told = f"{len(missing)} of {len(set(named))} positives are not in {index.path}"
        _log.warning("%s: %s", told, sample(missing))
    counts = {
        "questions not judged": len(asked) - len(judged),
        "questions without positives": len(judged) - len(examples),
        "positives not in the index": len(missing),
    }
    return examples, qrels, counts


def _positives(example: Example, gold: Gold, index: Index) -> tuple[Document, ...]:
    return tuple(hit.document for hit in gold_passages(example, gold, index, maxsize))


def _kept(own: Sequence[Document], found: Sequence[Document]) -> tuple[Document, ...]:
    """Return what was found as it came with the question, if it did: mining left scores on it."""
    known = {document.id: document for document in own}
    return tuple(known.get(document.id, document) for document in found)


def without_held_out(
    examples: Sequence[Example], asked: Sequence[Example], files: Sequence[Path]
) -> tuple[list[Example], frozenset[str]]:
    """Leave out the questions of files of qrels or (.jsonl, .json, .gz) questions, by id or text.

    Args:
        examples: the questions to choose from.
        asked: more questions, by which the ids of qrels have texts.
        files: what is held out.

    Returns:
        the other questions, and the ids of the documents that are relevant to what is held out.

    Raises:
        DataError: that leaves no question.
    """
    names: set[str] = set()
    texts: set[str] = set()
    documents: set[str] = set()
    for path in files:
        if suffix_of(path).removesuffix(".gz") in (".jsonl", ".json"):
            held = read_questions(path)
            names |= {example.query.id for example in held}
            texts |= {normalize_text(example.query.text) for example in held}
            documents |= {each.id for example in held for each in example.positives}
        else:
            qrels = read_qrels(path)
            names |= qrels.keys()
            documents |= {name for grades in qrels.values() for name in grades if grades[name] > 0}
    texts |= {normalize_text(each.query.text) for each in asked if each.query.id in names}
    apart = [
        example
        for example in examples
        if example.query.id not in names and normalize_text(example.query.text) not in texts
    ]
    if not apart:
        raise DataError(
            f"all {len(examples)} questions are held out, by id or text, in "
            f"{', '.join(map(str, files))}. Questions without ids are called by their lines: if "
            "they are not the same, give them ids."
        )
    return apart, frozenset(documents)


def train_and_dev(
    settings: ListSettings, index: Index, *, by_answers: bool
) -> tuple[list[Example], list[Example], Qrels]:
    """Return the questions to train on, those to evaluate on, and the judgements of these.

    Args:
        settings: the files.
        index: where relevant documents are looked up.
        by_answers: whether questions are trained on by their answers, and not by positives.

    Raises:
        DataError: that leaves none to train or to evaluate on, or the same for both.
    """
    asked = read_questions(settings.examples)
    qrels: Qrels = {}
    if by_answers:
        qrels = read_qrels(settings.qrels) if settings.qrels else {}
        train = [each for each in asked if each.answers and (not qrels or each.query.id in qrels)]
        if not train:
            raise DataError(
                f"{settings.examples}: none of {len(asked)} questions has an answer, which the "
                "generator judges documents by"
            )
    else:
        train, qrels, _ = with_positives(asked, settings.examples, settings.qrels, index)
        qrels = qrels or {e.query.id: {d.id: 1 for d in e.positives} for e in train}
    if not settings.dev_questions and not settings.dev_qrels:
        train, dev = held_out(train, settings.dev_limit)
        dev = _searchable(dev, qrels, index)
        return drawn(train, settings.limit), dev, qrels
    dev = read_questions(settings.dev_questions) if settings.dev_questions else asked
    if settings.dev_qrels:
        qrels = read_qrels(settings.dev_qrels)
    elif by_answers and not any(example.positives for example in dev):
        qrels = {name: qrels[name] for name in {e.query.id for e in dev} & qrels.keys()}
    else:
        qrels |= {e.query.id: {d.id: 1 for d in e.positives} for e in dev if e.positives}
    dev = [each for each in dev if not qrels or each.query.id in qrels]
    if not dev:
        raise DataError(
            f"{settings.dev_qrels or settings.dev_questions}: none of the questions to evaluate on "
            "has a relevant document. Pass --dev-qrels FILE"
        )
    dev = drawn(_searchable(dev, qrels, index), settings.dev_limit)
    names = {each.query.id for each in dev} if not settings.dev_questions else set()
    if settings.dev_qrels and not settings.dev_questions:
        names |= qrels.keys()
    train = [each for each in train if each.query.id not in names]
    check_apart(train, dev)
    return drawn(train, settings.limit), dev, qrels


def _searchable(dev: Sequence[Example], qrels: Qrels, index: Index) -> list[Example]:
    """Leave out questions of which no relevant document is in the index: no encoder finds one.

    Raises:
        DataError: that leaves none.
    """
    found = [
        each
        for each in dev
        if not qrels
        or any(grade > 0 and index.pieces(name) for name, grade in qrels[each.query.id].items())
    ]
    if not found:
        named = [name for each in dev for name in qrels[each.query.id]]
        raise DataError(
            f"no document that is relevant to the {len(dev)} questions to evaluate on is in "
            f"{index.path}, such as {sample(dict.fromkeys(named))}. Are they of another corpus?"
        )
    if len(found) < len(dev):
        _log.warning(
            "%d of %d questions to evaluate on are left out: nothing relevant is in the index.",
            len(dev) - len(found),
            len(dev),
        )
    return found
