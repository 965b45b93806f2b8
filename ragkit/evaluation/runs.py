"""Run a pipeline over questions, score it, and keep what it did in a run folder.

results.json    scores with their intervals, losses, counts, costs, settings, hashes of the data
answers.jsonl   one line per question: answer, gold answers, scores, hits, prompt
passages.jsonl  the documents that those lines name, up to rank 10
run.trec        the ranking that was scored, for trec_eval or any other tool
settings.json   what the run was made with
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..artefacts import new_folder, to_json
from ..errors import DataError
from ..pipeline import Pipeline
from ..splitting import parent_of
from ..types import Answer, Example, Hit, Progress, Qrels, Query, Run, quiet
from .answers import answer_rank
from .contexts import build_contexts, check_contexts
from .costs import Meter
from .evidence import Corpus, Evidence, Need, gold_passages
from .folder import MARK, Passages, write_folder
from .gold import Gold, gold_of, sample, warn_of_mixed_ids
from .metrics import check_ks, check_scores, judged_run, strictly_decreasing
from .results import Results
from .scoring import Record, score

_SLICE = 256  # questions retrieved between two reports of progress
_TEXTS = 10  # hits of a question whose texts the run folder keeps


@dataclass(slots=True)
class _Task:
    """What is evaluated, with what is known about it."""

    pipeline: Pipeline
    examples: Sequence[Example]
    gold: Gold
    evidence: Evidence
    corpus: Corpus | None
    contexts: Sequence[str]
    noise: Sequence[float]
    seed: int
    progress: Progress
    meter: Meter = field(default_factory=Meter)
    kept: dict[str, Sequence[Hit]] = field(default_factory=dict)
    distractors: dict[str, list[Hit]] = field(default_factory=dict)

    @property
    def distractors_wanted(self) -> int:
        """How many distractors a question may be given."""
        if not (self.contexts or self.noise):
            return 0
        golds = max(1, self.pipeline.keep)
        swept = (round(golds * r / (1 - r)) for r in self.noise if r < 1)
        return max([golds, *swept])


def evaluate(
    pipeline: Pipeline,
    examples: Sequence[Example],
    *,
    qrels: Qrels | None = None,
    ks: Sequence[int] = (1, 5, 10, 20, 100),
    corpus: Corpus | None = None,
    need: Need = "any",
    contexts: Sequence[str] = (),
    noise: Sequence[float] = (),
    output: str | Path | None = None,
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
        corpus: the index that is searched. It lets relevant documents that cannot be found be
            counted, gold passages be read, and questions be told that no document answers.
        need: whether one relevant document is enough for a question, or all are needed.
        contexts: what else the reader is given, by names of `contexts.CONTEXTS`.
        noise: the shares of distractors of a noise sweep, 0 to 1.
        output: the run folder to write: whole, or not at all.
        replace: whether `output` may replace a folder that exists.
        settings: JSON values to keep with the run (the index's manifest, names of models, …);
            `ks`, `need` and `seed` are added.
        progress: told of the stages `retrieve` and `read`.
        seed: of the bootstrap and of places in contexts.

    Raises:
        DataError: as `gold_of` does, or if a hit's score is not a finite number.
        SettingsError: `output` exists and `replace` is false, a k is not a positive integer, or an
            unknown context.
    """
    check_ks(ks)
    check_contexts(contexts, noise)
    ks = [k for k in ks if k <= pipeline.depth]
    used = dict(settings or {}) | {"ks": ks, "need": need, "seed": seed}
    to_json(used)
    gold = gold_of(examples, qrels, (lambda name: bool(corpus.pieces(name))) if corpus else None)
    evidence = Evidence(gold, need)
    task = _Task(
        pipeline, examples, gold, evidence, corpus, contexts, noise, seed, progress or quiet
    )
    with _output(output, replace) as (folder, passages):
        record = _retrieve(task, passages)
        record.run = strictly_decreasing(judged_run(record.found, gold.qrels, record.parents))
        warn_of_mixed_ids(record.run, gold.qrels)
        _read(task, record, passages)
        scored = score(record, examples, gold, evidence, corpus, ks, seed)
        results = Results(**scored.summary, costs=task.meter.costs, settings=used)
        if folder:
            write_folder(folder, examples, gold.qrels, record, scored, results)
    return results


def evaluate_run(
    run: Run,
    qrels: Qrels,
    *,
    examples: Sequence[Example] | None = None,
    ks: Sequence[int] = (1, 5, 10, 20, 100),
    output: str | Path | None = None,
    replace: bool = False,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Results:
    """Score any system's ranking, as `trec_eval -c` does: equal scores by descending document id.

    Queries that the qrels judge and the run lacks score 0, and are counted as `nothing_found`;
    queries of the run that the qrels do not judge are left out, and counted as `unjudged`.

    Args:
        run: the ranking.
        qrels: the judgements.
        examples: the questions, for the run folder; without them it holds ids alone.
        ks: the depths of recall@k and hit@k.
        output, replace, settings, seed: as in `evaluate`.

    Raises:
        DataError: an empty run, one of none of the judged queries, a score that is not a finite
            number, or as `gold_of` does.
        SettingsError: as `evaluate` does.
    """
    check_ks(ks)
    used = dict(settings or {}) | {"ks": list(ks), "seed": seed}
    to_json(used)
    if not any(run.values()):
        raise DataError("the run is empty: it ranks no document for any query")
    if run.keys().isdisjoint(qrels):
        raise DataError(
            f"the run and the qrels have no query in common: the run names {sample(run)}, the "
            f"qrels {sample(qrels)}. Are they of the same questions?"
        )
    known = {example.query.id: example for example in examples or ()}
    asked = [known.get(query, Example(Query(query, ""))) for query in dict.fromkeys([*qrels, *run])]
    gold = gold_of(asked, qrels)
    record = Record(found={e.query.id: run.get(e.query.id, {}) for e in asked}, run=run)
    warn_of_mixed_ids(run, gold.qrels)
    with _output(output, replace) as (folder, _):
        scored = score(record, asked, gold, Evidence(gold), None, ks, seed)
        results = Results(**scored.summary, costs={}, settings=used)
        if folder:
            write_folder(folder, asked, gold.qrels, record, scored, results)
    return results


@contextmanager
def _output(path: str | Path | None, replace: bool) -> Iterator[tuple[Path | None, Passages]]:
    if path is None:
        yield None, Passages(None)
        return
    made = new_folder(Path(path), replace=replace, mark=MARK)
    with made as folder, Passages(folder / "passages.jsonl") as kept:
        yield folder, kept


def _retrieve(task: _Task, passages: Passages) -> Record:
    record = Record(reranked=task.pipeline.reranker is not None)
    total = len(task.examples)
    for start in range(0, total, _SLICE):
        task.progress("retrieve", start, total)
        part = task.examples[start : start + _SLICE]
        before, after = _ranked(task, [example.query for example in part])
        for example, first, hits in zip(part, before, after, strict=True):
            _note(task, record, example, first, hits)
            passages.add(hit.document for hit in islice(hits, _TEXTS))
    task.progress("retrieve", total, total)
    return record


def _ranked(task: _Task, queries: Sequence[Query]) -> tuple[list[list[Hit]], list[list[Hit]]]:
    """Return the queries' hits as retrieved, and as they stand in the end."""
    pipeline = task.pipeline
    with task.meter.stage("retrieve"):
        before = pipeline.retriever.retrieve(queries, pipeline.depth)
    if pipeline.reranker is None:
        return before, before
    with task.meter.stage("rerank"):
        return before, pipeline.reranker.rerank(queries, before, pipeline.depth)


def _note(
    task: _Task, record: Record, example: Example, before: Sequence[Hit], hits: Sequence[Hit]
) -> None:
    """Keep of a question's hits what is scored, and those that a reader will be given."""
    query, keep = example.query.id, task.pipeline.keep
    scores = record.found[query] = {}
    for hit in hits:
        scores.setdefault(hit.document.id, float(hit.score))
        if (parent := parent_of(hit.document)) is not None:
            record.parents[hit.document.id] = parent
    check_scores(query, scores)
    if example.answers and query not in task.gold.qrels:
        texts = (hit.document.text for hit in hits)
        record.answer_ranks[query] = answer_rank(texts, example.answers)
    if task.evidence.needs(query):
        lists = (hits, before[:keep], hits[:keep])
        record.given[query] = tuple(task.evidence.suffices(query, some) for some in lists)
    if task.pipeline.reader is not None:
        task.kept[query] = hits[:keep]
    if wanted := task.distractors_wanted:
        wrong = (hit for hit in hits if task.evidence.misleads(query, hit))
        task.distractors[query] = list(islice(wrong, wanted))


def _read(task: _Task, record: Record, passages: Passages) -> None:
    """Answer all questions in all contexts, in one call: what prompts share is then read once."""
    reader = task.pipeline.reader
    if reader is None:
        return
    queries = {example.query.id: example.query for example in task.examples}
    asked = [(query, "retrieved", hits) for query, hits in task.kept.items()]
    asked += _other_contexts(task)
    task.progress("read", 0, len(asked))
    with task.meter.stage("read") as cost:
        read = reader.read([queries[query] for query, *_ in asked], [hits for *_, hits in asked])
    cost.prompt_tokens = sum(answer.prompt_tokens for answer in read)
    cost.answer_tokens = sum(answer.answer_tokens for answer in read)
    task.progress("read", len(asked), len(asked))
    under: dict[str, dict[str, Answer]] = {name: {} for name in task.contexts}
    for (query, name, _), answer in zip(asked, read, strict=True):
        if answer.query.id != query:
            raise DataError(
                f"the reader answered {answer.query.id!r} where {query!r} was asked: "
                "answers must keep the order of the questions"
            )
        if name != "retrieved" or name in task.contexts:
            under.setdefault(name, {})[query] = answer
        passages.add(hit.document for hit in answer.hits)
    record.answers = dict(zip(queries, read, strict=False))
    record.contexts = {name: answers for name, answers in under.items() if answers}


def _other_contexts(task: _Task) -> list[tuple[str, str, Sequence[Hit]]]:
    if not (task.contexts or task.noise):
        return []
    asked: list[tuple[str, str, Sequence[Hit]]] = []
    for example in task.examples:
        query, keep = example.query.id, task.pipeline.keep
        built = build_contexts(
            task.contexts,
            task.noise,
            query=query,
            retrieved=task.kept[query],
            gold=gold_passages(example, task.gold, task.corpus, max(1, keep)),
            distractors=task.distractors[query],
            keep=keep,
            seed=task.seed,
        )
        asked += [(query, name, hits) for name, hits in built.items() if name != "retrieved"]
    return asked
