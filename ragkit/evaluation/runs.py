"""Run a pipeline over questions, score it, and keep what it did in a run folder.

results.json    scores with their intervals, counts, times, settings, hashes of the data
answers.jsonl   one line per question: answer, gold answers, scores, hits, prompt
run.trec        the ranking that was scored, for trec_eval or any other tool
settings.json   what the run was made with
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from ..artefacts import fingerprint, new_folder, to_json, write_json
from ..corpus import write_run
from ..errors import DataError
from ..pipeline import Pipeline
from ..prompts import without_citations
from ..types import Answer, Example, Hit, Progress, Qrels, Run, quiet
from .answers import ANSWER_MEASURES, answer_measures, answer_rank
from .gold import LISTED, Gold, gold_of, warn_of_mixed_ids
from .metrics import (
    check_ks,
    check_scores,
    judged_ids,
    judged_run,
    retrieval_measures,
    strictly_decreasing,
)
from .results import Results
from .statistics import bootstrap_mean

_SLICE = 256  # questions retrieved between two reports of progress

Scores = dict[str, dict[str, float]]
"""Measure -> query id -> value."""


@dataclass(slots=True)
class _Found:
    """What retrieval found; of the hits themselves, those that a reader will be given."""

    run: Run = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    answer_ranks: dict[str, int] = field(default_factory=dict)
    hits: list[Sequence[Hit]] = field(default_factory=list)
    seconds: float = 0.0


def evaluate(
    pipeline: Pipeline,
    examples: Sequence[Example],
    *,
    qrels: Qrels | None = None,
    ks: Sequence[int] = (1, 5, 10, 20, 100),
    known: Callable[[str], bool] | None = None,
    output: Path | None = None,
    replace: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> Results:
    """Run a pipeline over questions and score what it retrieves and, if it has a reader, answers.

    Retrieval is scored by trec_eval's measures over the questions that the qrels judge, in the
    order in which the pipeline ranks (see `strictly_decreasing`); documents that were split off
    longer ones count as those where the qrels judge whole documents (see `judged_run`). Questions
    with answers but without qrels are scored by answer@k: a hit's text contains an answer.
    Answers are scored without their `[n]` citation marks. Every mean has a 95 % interval.

    Args:
        pipeline: what is measured.
        examples: questions with their gold answers, if known; ids are unique.
        qrels: judgements; those of questions that are not asked are ignored.
        ks: the depths of recall@k, hit@k and answer@k; those beyond the pipeline's are left out.
        known: whether the index holds a document or pieces of it; it lets relevant documents that
            cannot be found be counted and listed.
        output: the run folder to write: whole, or not at all.
        replace: whether `output` may replace a folder that exists.
        settings: JSON values to keep with the run (the index's manifest, names of models, …);
            `ks` and `seed` are added.
        progress: told of the stages `retrieve` and `read`.
        seed: of the bootstrap.

    Raises:
        DataError: as `gold_of` does, or if a hit's score is not a finite number.
        SettingsError: `output` exists and `replace` is false, or a k is not a positive integer.
    """
    check_ks(ks)
    ks = [k for k in ks if k <= pipeline.depth]
    used = dict(settings or {}) | {"ks": ks, "seed": seed}
    to_json(used)
    gold = gold_of(examples, qrels, known)
    report = progress or quiet
    with _output(output, replace) as folder:
        found = _retrieve(pipeline, examples, gold, report)
        ranking = strictly_decreasing(judged_run(found.run, gold.qrels, found.parents))
        warn_of_mixed_ids(ranking, gold.qrels)
        if folder:
            write_run(folder / "run.trec", ranking, "ragkit")
        answers, seconds = _read(pipeline, examples, found.hits, report)
        scores = _retrieval_scores(ranking, gold, found, ks), _answer_scores(answers, gold)
        times = {"retrieve": found.seconds} | ({"read": seconds} if answers else {})
        results = _results(examples, gold, found, answers, scores, times, used)
        if folder:
            rows = _rows(examples, gold, found, answers, scores[0] | scores[1])
            _write_lines(folder / "answers.jsonl", rows)
            write_json(folder / "settings.json", used)
            write_json(folder / "results.json", results.to_json())
    return results


def _output(path: Path | None, replace: bool) -> AbstractContextManager[Path | None]:
    return nullcontext() if path is None else new_folder(path, replace=replace)


def _retrieve(
    pipeline: Pipeline, examples: Sequence[Example], gold: Gold, progress: Progress
) -> _Found:
    found = _Found()
    for start in range(0, len(examples), _SLICE):
        progress("retrieve", start, len(examples))
        part = examples[start : start + _SLICE]
        started = perf_counter()
        lists = pipeline.retrieve([example.query for example in part])
        found.seconds += perf_counter() - started
        for example, hits in zip(part, lists, strict=True):
            _note(found, example, hits, gold)
        if pipeline.reader is not None:
            found.hits += [hits[: pipeline.keep] for hits in lists]
    progress("retrieve", len(examples), len(examples))
    return found


def _note(found: _Found, example: Example, hits: Sequence[Hit], gold: Gold) -> None:
    query = example.query.id
    scores = found.run[query] = {}
    for hit in hits:
        scores.setdefault(hit.document.id, float(hit.score))
        metadata = hit.document.metadata
        # "parent" alone may be a field of the user's own, as in a forum's threads.
        if metadata.keys() >= {"parent", "start", "end"}:
            found.parents[hit.document.id] = str(metadata["parent"])
    check_scores(query, scores)
    if example.answers and query not in gold.qrels:
        texts = (hit.document.text for hit in hits)
        found.answer_ranks[query] = answer_rank(texts, example.answers)


def _read(
    pipeline: Pipeline,
    examples: Sequence[Example],
    hits: Sequence[Sequence[Hit]],
    progress: Progress,
) -> tuple[list[Answer], float]:
    if pipeline.reader is None:
        return [], 0.0
    progress("read", 0, len(examples))
    started = perf_counter()
    answers = pipeline.read([example.query for example in examples], hits)
    seconds = perf_counter() - started
    progress("read", len(examples), len(examples))
    for example, answer in zip(examples, answers, strict=True):
        if answer.query.id != example.query.id:
            raise DataError(
                f"the reader answered {answer.query.id!r} where {example.query.id!r} was asked: "
                "answers must keep the order of the questions"
            )
    return answers, seconds


def _retrieval_scores(ranking: Run, gold: Gold, found: _Found, ks: Sequence[int]) -> Scores:
    scores = retrieval_measures(ranking, gold.qrels, ks) if gold.qrels else {}
    if found.answer_ranks:
        for k in ks:
            scores[f"answer@{k}"] = {
                query: float(0 < rank <= k) for query, rank in found.answer_ranks.items()
            }
    return scores


def _answer_scores(answers: Sequence[Answer], gold: Gold) -> Scores:
    scores: Scores = {}
    for answer in answers:
        golds = gold.answers.get(answer.query.id)
        if golds is not None:
            text = without_citations(answer.text)
            values = answer_measures(text, golds, abstained=answer.abstained)
            for measure in ANSWER_MEASURES:
                scores.setdefault(measure, {})[answer.query.id] = values[measure]
    return scores


def _results(
    examples: Sequence[Example],
    gold: Gold,
    found: _Found,
    answers: Sequence[Answer],
    scores: tuple[Scores, Scores],
    times: dict[str, float],
    settings: dict[str, Any],
) -> Results:
    listed = dict(gold.remarks)
    listed["nothing_found"] = [query for query, hits in found.run.items() if not hits]
    listed["abstained"] = [answer.query.id for answer in answers if answer.abstained]
    retrieval, reading = (
        {
            measure: bootstrap_mean(list(values.values()), seed=settings["seed"])
            for measure, values in measures.items()
        }
        for measures in scores
    )
    questions = {
        example.query.id: [example.query.text, dict(example.query.where), list(example.answers)]
        for example in examples
    }
    return Results(
        retrieval=retrieval,
        answers=reading,
        counts={
            "questions": len(examples),
            "judged": len(gold.qrels),
            "with_gold": len(gold.answers),
        }
        | {name: len(ids) for name, ids in listed.items()},
        listed={name: ids[:LISTED] for name, ids in listed.items() if ids},
        times=times,
        settings=settings,
        hashes={"questions": fingerprint(questions), "qrels": fingerprint(gold.qrels)},
    )


def _rows(
    examples: Sequence[Example],
    gold: Gold,
    found: _Found,
    answers: Sequence[Answer],
    scores: Scores,
) -> Iterator[dict[str, Any]]:
    """Yield the lines of answers.jsonl; without a reader they hold no answer and no prompt."""
    judged_as = judged_ids(gold.qrels, found.parents)
    for place, example in enumerate(examples):
        query = example.query.id
        grades = gold.qrels.get(query, {})
        row = {
            "id": query,
            "question": example.query.text,
            "golds": list(example.answers),
            "scores": {name: values[query] for name, values in scores.items() if query in values},
            "hits": [
                {"rank": rank, "id": document, "score": score}
                | ({"parent": judged_as[document]} if document in judged_as else {})
                | {"grade": grades.get(judged_as.get(document, document))}
                for rank, (document, score) in enumerate(found.run[query].items(), start=1)
            ],
        }
        yield row | (_answer_row(answers[place]) if answers else {})


def _answer_row(answer: Answer) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "abstained": answer.abstained,
        "citations": [document.id for document in answer.cited],
        "shown": [hit.document.id for hit in answer.hits],
        "prompt": answer.prompt,
    }


def _write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as handle:
        for row in rows:
            handle.write(to_json(row) + "\n")
