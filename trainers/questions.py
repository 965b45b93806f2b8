"""Questions to train and to evaluate on, and what is retrieved for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from ragkit.artefacts import fingerprint, read_json, write_json
from ragkit.assemble import RetrievalSettings, assemble, load_encoder, open_index, resolved
from ragkit.corpus import read_qrels, read_questions
from ragkit.errors import DataError, SettingsError
from ragkit.evaluation.duplicates import normalize_text
from ragkit.models.names import cache_folder
from ragkit.types import Example, Hit, Progress, Query

if TYPE_CHECKING:
    from ragkit.pipeline import Pipeline
    from ragkit.stores.index import Index
    from ragkit.training.token_runs import Retrieved

    from .runs import AnswerSettings

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


def answered_and_dev(settings: AnswerSettings) -> tuple[list[Example], list[Example]]:
    """Read the questions to learn answers from, and those to evaluate on.

    Raises:
        DataError: there are none, or the same are in both.
        SettingsError: too few to evaluate on.
    """
    train = answered(settings.questions, settings.qrels)
    if settings.dev_questions or settings.dev_qrels:
        dev = answered(settings.dev_questions or settings.questions, settings.dev_qrels)
        dev = drawn(dev, settings.dev_limit)
    else:
        train, dev = held_out(train, settings.dev_limit)
    check_apart(train, dev)
    if len(dev) < 2:
        raise SettingsError("at least 2 questions to evaluate on are needed")
    return drawn(train, settings.limit), dev


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

    Questions of one text, but for case and punctuation, stay together.

    Raises:
        DataError: too few are left to train on.
    """
    texts = {example.query.id: normalize_text(example.query.text) for example in examples}
    different = sorted(set(texts.values()))
    chosen = set(Random("held out").sample(different, min(count, len(different) // 2)))
    dev = [example for example in examples if texts[example.query.id] in chosen]
    train = [example for example in examples if texts[example.query.id] not in chosen]
    if not dev or not train:
        raise DataError(
            f"{len(examples)} questions are too few to hold some out. Name others to evaluate on: "
            "--dev-questions FILE"
        )
    return train, dev


def check_apart(train: Sequence[Example], dev: Sequence[Example]) -> None:
    """Refuse questions to evaluate on that are trained on.

    Raises:
        DataError: some are the same, by their texts without case and punctuation.
    """
    seen = {normalize_text(example.query.text) for example in train}
    twice = [example.query.id for example in dev if normalize_text(example.query.text) in seen]
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

    What was found is kept in ragkit's cache folder, part by part: for the next time, or to go on.
    """
    settings = replace(resolved(settings, index), depth=max(k, settings.depth))
    values = {name: str(value) for name, value in asdict(settings).items()}
    del values["index"], values["device"]
    if settings.retriever != "bm25":  # a folder may hold other weights than the last time
        values["encoder"] = load_encoder(settings, index).describe()["fingerprint"]
    made = {"index": index.fingerprint(), "k": k, "by": values}
    folder = cache_folder() / "retrieved"
    folder.mkdir(parents=True, exist_ok=True)
    pipeline: Pipeline | None = None
    rows = index.documents.rows
    found: list[list[tuple[int, float]]] = []
    for start in range(0, len(queries), _SLICE):
        part = queries[start : start + _SLICE]
        asked = [(query.text, str(dict(query.where))) for query in part]
        path = folder / f"{fingerprint(made | {'of': asked})}.json"
        if not path.exists():
            progress("retrieve", start, len(queries))
            pipeline = pipeline or assemble(settings, index, read=False)
            hits = pipeline.retrieve([replace(query, id=str(n)) for n, query in enumerate(part)])
            best = [[(rows[hit.document.id], hit.score) for hit in of[:k]] for of in hits]
            write_json(path, {str(n): of for n, of in enumerate(best)})
            progress("retrieve", start + len(part), len(queries))
        kept = read_json(path)
        found += [[(int(row), score) for row, score in kept[str(n)]] for n in range(len(part))]
    return found


def hash_of(parts: Sequence[Retrieved]) -> str:
    """Return one hash of all that was retrieved."""
    return fingerprint(
        [[hit.document.contents for hit in hits] for part in parts for hits in part.hits]
    )
