"""A run folder's files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..artefacts import to_json, write_json
from ..corpus import write_run
from ..types import Answer, Document, Example, Qrels
from .metrics import judged_ids
from .probes import ProbeScores
from .results import Results
from .scoring import Record, Scored

MARK = "results.json"
"""The file by which a run folder is known."""

PROBES = "probes.jsonl"
"""The file of a run folder that holds the items of probes."""


class Passages:
    """Writes documents as JSON lines, each once; writes nothing if there is no path."""

    def __init__(self, path: Path | None) -> None:
        self._handle = path.open("w", encoding="utf-8", newline="\n") if path else None
        self._written: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handle:
            self._handle.close()

    def add(self, documents: Iterable[Document]) -> None:
        """Write those that are not written yet."""
        if self._handle is None:
            return
        for document in documents:
            if document.id not in self._written:
                self._written.add(document.id)
                row = {"id": document.id, "title": document.title, "text": document.text}
                self._handle.write(to_json(row) + "\n")


def write_folder(
    folder: Path,
    examples: Sequence[Example],
    qrels: Qrels,
    record: Record,
    scored: Scored,
    results: Results,
) -> None:
    """Write all of a run folder but its passages."""
    write_run(folder / "run.trec", record.run, "ragkit")
    with (folder / "answers.jsonl").open("w", encoding="utf-8", newline="\n") as handle:
        for row in _rows(examples, qrels, record, scored):
            handle.write(to_json(row) + "\n")
    write_json(folder / "settings.json", results.settings)
    write_json(folder / MARK, results.to_json())


def write_probes(folder: Path, probes: Sequence[ProbeScores]) -> None:
    """Write the items of probes, a line each, so that runs can be compared item by item."""
    if not probes:
        return
    with (folder / PROBES).open("w", encoding="utf-8", newline="\n") as handle:
        for scores in probes:
            for name, values in scores.by_item.items():
                for item, value in zip(scores.ids, values, strict=True):
                    row = {"probe": scores.probe, "items": scores.items, "id": item}
                    handle.write(to_json(row | {"measure": name, "value": value}) + "\n")


def _rows(
    examples: Sequence[Example], qrels: Qrels, record: Record, scored: Scored
) -> Iterator[dict[str, Any]]:
    """Yield the lines of answers.jsonl; without a reader they hold no answer and no prompt."""
    judged_as = judged_ids(qrels, record.parents)
    for example in examples:
        query = example.query.id
        grades = qrels.get(query, {})
        row: dict[str, Any] = {
            "id": query,
            "question": example.query.text,
            "golds": list(example.answers),
            "scores": _of(scored.questions, query),
            "hits": [
                {"rank": rank, "id": document, "score": score}
                | ({"parent": judged_as[document]} if document in judged_as else {})
                | {"grade": grades.get(judged_as.get(document, document))}
                for rank, (document, score) in enumerate(record.found[query].items(), start=1)
            ],
        }
        if query in scored.stages:
            row["stage"] = scored.stages[query]
        if answer := record.answers.get(query):
            row |= _answer(answer) | {"prompt": answer.prompt}
        verdicts = {name: asdict(of[query]) for name, of in record.verdicts.items() if query in of}
        if verdicts:
            row["judge"] = verdicts
        under = {
            name: _answer(answers[query]) | {"scores": _of(scored.contexts[name], query)}
            for name, answers in record.contexts.items()
            if query in answers
        }
        yield row | ({"contexts": under} if under else {})


def _of(scores: dict[str, dict[str, float]], query: str) -> dict[str, float]:
    return {name: values[query] for name, values in scores.items() if query in values}


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "abstained": answer.abstained,
        "citations": [document.id for document in answer.cited],
        "attributed": answer.attributed,
        "shown": [hit.document.id for hit in answer.hits],
    }
