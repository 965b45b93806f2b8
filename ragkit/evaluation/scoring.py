"""From what a run found and answered to its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..artefacts import fingerprint
from ..prompts import without_citations
from ..types import Answer, Example, Run
from .answers import (
    ANSWER_MEASURES,
    Ratio,
    abstention_measures,
    answer_measures,
    citation_measures,
    cover_match,
)
from .contexts import context_figures
from .evidence import Corpus, Evidence, in_corpus
from .gold import LISTED, Gold
from .judge import Verdict
from .metrics import retrieval_measures
from .results import Estimates
from .stages import StageLosses, Trace, stage_losses
from .statistics import bootstrap_means, bootstrap_ratio

Scores = dict[str, dict[str, float]]
"""Measure -> query id -> value."""


@dataclass(slots=True)
class Record:
    """What a run did.

    Attributes:
        found: query id -> document id -> score, best first, as the pipeline ranked.
        run: `found` as it is scored: pieces as their parents, scores strictly decreasing.
        parents: documents that were split off longer ones -> those.
        answer_ranks: the rank of the first hit that contains an answer, for questions with answers
            that no qrels judge.
        traces: query id -> how far its evidence came among the hits, for questions of which it is
            known what they need; the rest of a trace is told by the scores.
        answers: query id -> answer; empty without a reader.
        contexts: context -> query id -> answer.
        noise_left_out: the questions without a noise sweep; None where none was asked for.
        verdicts: rubric -> query id -> what a judge said of the answer.
        reranked: whether there was a reranker.
    """

    reranked: bool = False
    found: Run = field(default_factory=dict)
    run: Run = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    answer_ranks: dict[str, int] = field(default_factory=dict)
    traces: dict[str, Trace] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    contexts: dict[str, dict[str, Answer]] = field(default_factory=dict)
    noise_left_out: list[str] | None = None
    verdicts: dict[str, dict[str, Verdict]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scored:
    """A run's scores, question by question, and their summary: fields of `Results`."""

    questions: Scores
    contexts: dict[str, Scores]
    stages: dict[str, str]
    summary: dict[str, Any]


def score(
    record: Record,
    examples: Sequence[Example],
    gold: Gold,
    evidence: Evidence,
    corpus: Corpus | None,
    ks: Sequence[int],
    seed: int,
) -> Scored:
    """Score what a run did; every mean has its interval."""
    retrieval = _retrieval_scores(record, gold, ks)
    answers = _answer_scores(record.answers, gold)
    judged = {
        f"judge {rubric}": {
            query: float(v.verdict) for query, v in of.items() if v.verdict is not None
        }
        for rubric, of in record.verdicts.items()
    }
    contexts = {name: _answer_scores(of, gold) for name, of in record.contexts.items()}
    losses = _losses(record, examples, gold, evidence, corpus, answers, seed)
    listed = dict(gold.remarks)
    listed["nothing_found"] = [query for query, hits in record.found.items() if not hits]
    listed["abstained"] = [query for query, answer in record.answers.items() if answer.abstained]
    for rubric, of in record.verdicts.items():
        listed[f"judge_{rubric}_unread"] = [q for q, v in of.items() if v.verdict is None]
    if record.noise_left_out is not None:
        listed["noise_left_out"] = record.noise_left_out
    if record.answers:
        staged = losses.stages if losses else {}
        listed["not_staged"] = [query for query in record.traces if query not in staged]
    counts = {
        "questions": len(examples),
        "judged": len(gold.qrels),
        "with_gold": len(gold.answers),
    }
    return Scored(
        retrieval | answers | judged,
        contexts,
        losses.stages if losses else {},
        {
            "retrieval": means(retrieval, seed),
            "answers": means(answers | judged, seed) | _ratios(record, gold, evidence, seed),
            "contexts": {name: means(scores, seed) for name, scores in contexts.items()},
            "figures": context_figures(contexts, record.contexts, seed),
            "stages": losses,
            "counts": counts | {name: len(ids) for name, ids in listed.items()},
            "listed": {name: ids[:LISTED] for name, ids in listed.items() if ids},
            "hashes": hashes_of(examples, gold, corpus),
        },
    )


def means(scores: Scores, seed: int) -> Estimates:
    """Estimate each measure's mean; those over the same questions share what is drawn."""
    alike: dict[frozenset[str], list[str]] = {}
    for measure, values in scores.items():
        if values:
            alike.setdefault(frozenset(values), []).append(measure)
    found: Estimates = {}
    for measures in alike.values():
        columns = [[scores[name][query] for query in scores[measures[0]]] for name in measures]
        found |= zip(measures, bootstrap_means(columns, seed=seed), strict=True)
    return {measure: found[measure] for measure in scores if measure in found}


def _ratios(record: Record, gold: Gold, evidence: Evidence, seed: int) -> Estimates:
    """Estimate precision and recall of citations and abstentions, where there are any."""
    pairs: dict[str, list[Ratio]] = {}
    for query, answer in record.answers.items():
        found: dict[str, Ratio] = {}
        if relevant := evidence.relevant(query):
            cited, shown = answer.cited, (hit.document for hit in answer.hits)
            found |= citation_measures(
                map(evidence.judged, cited), relevant, map(evidence.judged, shown)
            )
        if query in gold.answers:
            found |= abstention_measures(answer.abstained, gold.answers[query])
        for name, pair in found.items():
            pairs.setdefault(name, []).append(pair)
    return {
        name: bootstrap_ratio(*zip(*of, strict=True), seed=seed)
        for name, of in pairs.items()
        if any(below for _, below in of)
    }


def _retrieval_scores(record: Record, gold: Gold, ks: Sequence[int]) -> Scores:
    scores = retrieval_measures(record.run, gold.qrels, ks) if gold.qrels else {}
    if record.answer_ranks:
        for k in ks:
            scores[f"answer@{k}"] = {
                query: float(0 < rank <= k) for query, rank in record.answer_ranks.items()
            }
    return scores


def _answer_scores(answers: Mapping[str, Answer], gold: Gold) -> Scores:
    scores: Scores = {}
    for query, answer in answers.items():
        golds = gold.answers.get(query)
        if golds is not None:
            text = without_citations(answer.text)
            values = answer_measures(text, golds, abstained=answer.abstained)
            for measure in ANSWER_MEASURES:
                scores.setdefault(measure, {})[query] = values[measure]
    return scores


def _losses(
    record: Record,
    examples: Sequence[Example],
    gold: Gold,
    evidence: Evidence,
    corpus: Corpus | None,
    answers: Scores,
    seed: int,
) -> StageLosses | None:
    if record.answers:  # an answer is right if it contains a gold one, or declines as it should
        right = answers.get("cover", {})
        asked = [query for query in right if query in record.traces or not gold.answers[query]]
    else:
        right, asked = {}, list(record.traces)
    needy = {query for query in asked if query in record.traces}
    queries = [example.query for example in examples if example.query.id in needy]
    held = in_corpus(evidence, gold, queries, corpus)
    traces = {}
    for query in asked:
        answer = record.answers.get(query)
        traces[query] = replace(
            record.traces.get(query, Trace()),
            held=held.get(query, False),
            shown=answer is not None and _shows(evidence, answer, gold.answers[query]),
            correct=None if answer is None else right[query] > 0,
            abstained=answer is not None and answer.abstained,
            answerable=query in record.traces,
        )
    return stage_losses(traces, reranked=record.reranked, seed=seed)


def _shows(evidence: Evidence, answer: Answer, golds: Sequence[str]) -> bool:
    """Tell whether a prompt shows what its question needs, and did not cut the answer off it."""
    query = answer.query.id
    if not evidence.suffices(query, answer.hits):
        return False
    holding = [
        shown
        for hit, shown in zip(answer.hits, answer.shown, strict=True)
        if evidence.given(query, [hit]) and cover_match(hit.document.text, golds)
    ]
    return not holding or any(cover_match(shown.text, golds) for shown in holding)


def hashes_of(examples: Sequence[Example], gold: Gold, corpus: Corpus | None) -> dict[str, str]:
    """Return the fingerprints of what was asked, of its judgements, and of the corpus if known."""
    questions = {
        example.query.id: [example.query.text, dict(example.query.where), list(example.answers)]
        for example in examples
    }
    hashes = {"questions": fingerprint(questions), "qrels": fingerprint(gold.qrels)}
    return hashes | ({"corpus": corpus.documents_fingerprint()} if corpus else {})
