"""Questions to train and to evaluate on, and what is retrieved for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from sys import maxsize
from typing import TYPE_CHECKING

from ragkit.artefacts import fingerprint, read_json, write_json
from ragkit.assemble import RetrievalSettings, assemble, open_index, resolved
from ragkit.corpus import read_qrels, read_questions
from ragkit.errors import DataError, SettingsError
from ragkit.evaluation.duplicates import normalize_text
from ragkit.evaluation.evidence import gold_passages
from ragkit.evaluation.gold import Gold, sample
from ragkit.models.names import cache_folder
from ragkit.parsing import suffix_of
from ragkit.types import Document, Example, Hit, Progress, Qrels, Query

if TYPE_CHECKING:
    from ragkit.stores.index import Index

_log = logging.getLogger(__name__)
_SLICE = 256


def answered(path: Path, qrels: Path | None) -> list[Example]:
    """Read the questions that have answers, of those that the qrels judge.

    Raises:
        DataError: none has an answer.
    """
    examples = read_questions(path)
    if qrels is not None:
        judged = read_qrels(qrels)
        examples = [example for example in examples if example.query.id in judged]
        if not examples:
            raise DataError(f"{qrels} judges none of the questions of {path}")
    found = [example for example in examples if example.answers]
    if not found:
        raise DataError(
            f"{path}: none of {len(examples)} questions has an answer to learn. Looked for the "
            "fields answers, golden_answers, target, answer."
        )
    if len(found) < len(examples):
        _log.warning(
            "%d of %d questions of %s have no answer and are left out.",
            len(examples) - len(found),
            len(examples),
            path,
        )
    return found


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
    judged = list(asked)
    named = [document.id for each in asked for document in each.positives]
    none = f"{path}: none of {len(asked)} questions has positives. Pass --qrels FILE"
    if qrels_path is not None:
        qrels = read_qrels(qrels_path)
        gold = Gold(qrels, {}, {})
        judged = [replace(each, positives=()) for each in asked if each.query.id in qrels]
        if not judged:
            raise DataError(f"{qrels_path} judges none of the questions of {path}")
        judged = [replace(each, positives=_positives(each, gold, index)) for each in judged]
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


def drawn(examples: list[Example], limit: int | None) -> list[Example]:
    """Return so many questions, drawn at random; all of them where there are no more.

    Raises:
        SettingsError: `limit` is below 1.
    """
    if limit is None or limit >= len(examples):
        return examples
    if limit < 1:
        raise SettingsError(f"--limit must be at least 1, not {limit}")
    return Random(0).sample(examples, limit)


def held_out(examples: Sequence[Example], count: int) -> tuple[list[Example], list[Example]]:
    """Split questions at random into those to train on and `count` to evaluate on.

    Questions of one text stay together.

    Raises:
        DataError: too few are left to train on.
    """
    texts = sorted({example.query.text for example in examples})
    chosen = set(Random("held out").sample(texts, min(count, len(texts) // 2)))
    dev = [example for example in examples if example.query.text in chosen]
    train = [example for example in examples if example.query.text not in chosen]
    if not dev or not train:
        raise DataError(
            f"{len(examples)} questions are too few to hold some out. Name others to evaluate on: "
            "--dev-questions FILE"
        )
    return train, dev


def check_apart(train: Sequence[Example], dev: Sequence[Example]) -> None:
    """Refuse questions to evaluate on that are trained on.

    Raises:
        DataError: some are the same, by text.
    """
    seen = {example.query.text for example in train}
    twice = [example.query.id for example in dev if example.query.text in seen]
    if twice:
        raise DataError(
            f"{len(twice)} questions to evaluate on are trained on too, such as {twice[:3]}: what "
            "they score would say nothing. Take them out of one of the two."
        )


def retrieved(
    examples: Sequence[Example], settings: RetrievalSettings, k: int, progress: Progress
) -> list[list[Hit]]:
    """Return each question's best k hits: those that came with it, or those of an index.

    What an index gave is kept in ragkit's cache folder, for the next time.

    Raises:
        SettingsError: questions without passages of their own, and no index.
    """
    own = [
        [Hit(document, -float(rank)) for rank, document in enumerate(example.retrieved[:k])]
        for example in examples
    ]
    asked = [place for place, example in enumerate(examples) if not example.retrieved]
    if not asked or k == 0:
        return own
    if settings.index is None:
        raise SettingsError(
            f"{len(asked)} questions come without passages (ret_passages): pass --index FOLDER"
        )
    index = open_index(settings)
    found = ranked(index, [examples[place].query for place in asked], settings, k, progress)
    for place, hits in zip(asked, found, strict=True):
        own[place] = [Hit(index.documents[row], score) for row, score in hits]
    return own


def ranked(
    index: Index, queries: Sequence[Query], settings: RetrievalSettings, k: int, progress: Progress
) -> list[list[tuple[int, float]]]:
    """Return the row and the score of each query's best k documents of an index, best first.

    What was found is kept in ragkit's cache folder, for the next time.
    """
    settings = replace(resolved(settings, index), depth=max(k, settings.depth))
    values = {name: str(value) for name, value in asdict(settings).items()}
    del values["index"], values["device"]
    queries = [replace(query, id=str(number)) for number, query in enumerate(queries)]
    questions = [(query.text, str(dict(query.where))) for query in queries]
    name = fingerprint({"index": index.fingerprint(), "k": k, "by": values, "of": questions})
    path = cache_folder() / "retrieved" / f"{name}.json"
    if not path.exists():
        pipeline = assemble(settings, index, read=False)
        rows = index.documents.rows
        found: dict[str, list[tuple[int, float]]] = {}
        for start in range(0, len(queries), _SLICE):
            part = queries[start : start + _SLICE]
            progress("retrieve", start, len(queries))
            for query, hits in zip(part, pipeline.retrieve(part), strict=True):
                found[query.id] = [(rows[hit.document.id], hit.score) for hit in hits[:k]]
        progress("retrieve", len(queries), len(queries))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    kept = read_json(path)
    return [[(int(row), score) for row, score in kept[query.id]] for query in queries]
