"""Run a pipeline over questions, score it, and keep what it did in a run folder.

report.html     all of it as one page, to look at
results.json    scores with their intervals, losses, counts, costs, settings, hashes of the data
answers.jsonl   one line per question: answer, gold answers, scores, hits, prompt
probes.jsonl    the items of probes of general ability, if there were any
passages.jsonl  the documents that those lines name, up to rank 10
run.trec        the ranking that was scored, for trec_eval or any other tool
settings.json   what the run was made with
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..artefacts import new_folder, to_json
from ..errors import DataError, SettingsError
from ..pipeline import Pipeline
from ..types import Example, Progress, Qrels, Query, Run, quiet
from .contexts import describe_tokens
from .evidence import Corpus, Evidence, Need
from .folder import MARK, Passages, write_folder, write_probes
from .gold import gold_of, sample, warn_of_mixed_ids
from .judge import JudgeGenerator, describe_judge
from .metrics import check_ks, judged_run, strictly_decreasing
from .page import write_page
from .probes import ProbeScores
from .results import Results
from .scoring import Record, hashes_of, score
from .task import Task

_log = logging.getLogger(__name__)


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
    token_counts: Sequence[int] = (),
    judge: JudgeGenerator | None = None,
    probes: Sequence[ProbeScores] = (),
    output: str | Path | None = None,
    replace: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> Results:
    """Run a pipeline over questions and score what it retrieves and, if it has a reader, answers.

    Retrieval is scored by trec_eval's measures over the questions that the qrels judge, in the
    pipeline's order (see `strictly_decreasing`); pieces of documents count as these where the qrels
    judge whole ones (see `judged_run`). Questions with answers but no qrels are scored by answer@k:
    a hit's text contains an answer. Answers lose their `[n]` marks. Means have 95 % intervals.

    Args:
        pipeline: what is measured.
        examples: questions with their gold answers, if known; ids are unique.
        qrels: judgements; those of questions that are not asked are ignored.
        ks: the depths of recall@k, hit@k and answer@k; those beyond the pipeline's are left out.
        corpus: the index that is searched. It lets relevant documents that cannot be found be
            counted, gold passages be read, and questions be told that no document answers.
        need: whether one relevant document is enough for a question, or all are needed.
        contexts: what else the reader is given, by names of `contexts.CONTEXTS`.
        noise: the shares of distractors of a noise sweep, 0 to 1; see `contexts.noise_sizes`.
        token_counts: with which numbers of virtual tokens `contexts`, or `retrieved`, are read too.
        probes: what `run_probe` gave for the reader's model, to be kept with the run.
        judge: a generator that judges whether answers are correct and rest on what was shown.
        output: the run folder to write: whole, or not at all.
        replace: whether `output` may replace a folder that exists.
        settings: JSON values to keep with the run; `ks`, `need` and `seed` are added.
        progress: told of the stages `retrieve` and `read`.
        seed: of the bootstrap and of places in contexts.

    Raises:
        DataError: as `gold_of` does, or if a hit's score is not a finite number.
        SettingsError: `output` exists and `replace` is false, a k is not a positive integer, the
            seed is negative, or as `check_contexts` and `check_token_counts` do.
    """
    check_ks(ks)
    if seed < 0:
        raise SettingsError(f"seed must be at least 0, not {seed}")
    ks = [k for k in ks if k <= pipeline.depth]
    used = dict(settings or {}) | {"ks": ks, "need": need, "seed": seed}
    used |= describe_tokens(pipeline.reader)
    to_json(used)
    gold = gold_of(examples, qrels, (lambda name: bool(corpus.pieces(name))) if corpus else None)
    evidence = Evidence(gold, need)
    varied = contexts, noise, token_counts
    task = Task(pipeline, examples, gold, evidence, corpus, *varied, seed, progress or quiet)
    with _output(output, replace) as (folder, passages):
        record = task.retrieve(passages)
        record.run = strictly_decreasing(judged_run(record.found, gold.qrels, record.parents))
        warn_of_mixed_ids(record.run, gold.qrels)
        task.read(record, passages)
        if judge:
            used["judge"] = describe_judge(judge)
            task.judge(record, judge)
        scored = score(record, examples, gold, evidence, corpus, ks, seed)
        results = Results(
            **scored.summary,
            costs=task.meter.costs,
            settings=used,
            probes={scores.probe: scores.estimates for scores in probes},
        )
        if folder:
            write_probes(folder, probes)
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
        judged = [example for example in asked if example.query.id in gold.qrels]
        hashes = hashes_of(judged, gold, None)  # the run's other queries are not what was asked
        results = Results(**scored.summary | {"hashes": hashes}, costs={}, settings=used)
        if folder:
            write_folder(folder, asked, gold.qrels, record, scored, results)
    return results


@contextmanager
def _output(path: str | Path | None, replace: bool) -> Iterator[tuple[Path | None, Passages]]:
    if path is None:
        yield None, Passages(None)
        return
    made = new_folder(Path(path), replace=replace, mark=MARK)
    with made as folder:
        with Passages(folder / "passages.jsonl") as kept:
            yield folder, kept
        try:
            write_page(folder)
        except DataError as error:  # a page can be written again, a run not
            _log.warning("The run is kept without its page: %s", error)
