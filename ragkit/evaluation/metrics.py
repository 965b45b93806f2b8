"""Scores of a run against qrels, per question, by trec_eval.

Every function gives one value per question, never a mean: means and their intervals are
`statistics`', and two systems can only be compared question by question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytrec_eval

from ..errors import DataError, SettingsError
from ..types import Qrels, Run

_SCORE_LIMIT = 1e38  # trec_eval keeps scores in single precision, whose largest value is 3.4e38


def retrieval_measures(
    run: Run, qrels: Qrels, ks: Sequence[int] = (1, 5, 10, 20, 100)
) -> dict[str, dict[str, float]]:
    """Score a run with trec_eval's code: measure -> query id -> value.

    The measures are nDCG@10, MRR@10, MAP, and recall@k and hit@k of each k; a document is relevant
    from grade 1. As with `trec_eval -c`, every query of `qrels` has a value: 0 where the run lacks
    it, and 0 where nothing is relevant. Queries that `qrels` do not judge have none.

    trec_eval orders by score in single precision, and equal scores by descending document id,
    whatever the order of the run. A run whose order is to be measured as it stands goes through
    `strictly_decreasing` first.

    Raises:
        DataError: a score is not a finite number.
        SettingsError: a k is not a positive integer.
    """
    check_ks(ks)
    for query, scores in run.items():
        check_scores(query, scores)
    names = _trec_names(ks)
    judged = {query: grades for query, grades in qrels.items() if grades}
    evaluator = pytrec_eval.RelevanceEvaluator(judged, set(names.values()))
    found = evaluator.evaluate({query: run[query] for query in judged if query in run})
    values = {
        name: {query: float(found.get(query, {}).get(trec_name, 0.0)) for query in judged}
        for name, trec_name in names.items()
    }
    # A first relevant document below rank 10 has a reciprocal rank of at most 1/11.
    values["MRR@10"] = {
        query: value if value > 1 / 10.5 else 0.0 for query, value in values["MRR@10"].items()
    }
    return values


def check_ks(ks: Sequence[int]) -> None:
    """Refuse depths that cannot be those of recall@k and hit@k.

    Raises:
        SettingsError: a k is not a positive integer.
    """
    for k in ks:
        if not isinstance(k, int) or k < 1:
            raise SettingsError(f"the depths k of recall@k must be positive integers, not {k!r}")


def check_scores(query: str, scores: Mapping[str, float]) -> None:
    """Refuse scores that are not finite numbers (in trec_eval's single precision).

    Raises:
        DataError: naming the query and the document.
    """
    for document, score in scores.items():
        if not abs(score) < _SCORE_LIMIT:
            raise DataError(
                f"query {query!r}: document {document!r} has the score {score}, which is not a "
                "finite number. Mend the retriever or reranker that gave it."
            )


def strictly_decreasing(run: Run) -> Run:
    """Lower scores, as little as single precision allows, until each is below the one before it.

    trec_eval then measures the order of the run as it stands, ties included, and so does anybody
    who scores the written run again. A run without ties, best first, keeps its scores but for
    rounding to single precision.

    Raises:
        DataError: a score is not a finite number.
    """
    return {query: _decreasing(query, scores) for query, scores in run.items()}


def judged_ids(qrels: Qrels, parents: Mapping[str, str]) -> dict[str, str]:
    """Tell which documents are judged as their parent: document id -> parent id.

    `parents` maps documents that were split off longer ones to those. Where the qrels name any
    parent, they judge whole documents: then every such document counts as its parent, but those
    that the qrels name themselves. Where they name none, the result is empty.
    """
    named = {document for grades in qrels.values() for document in grades}
    if named.isdisjoint(parents.values()):
        return {}
    return {piece: parent for piece, parent in parents.items() if piece not in named}


def judged_run(run: Run, qrels: Qrels, parents: Mapping[str, str]) -> Run:
    """Replace documents by the parents that they are judged as (see `judged_ids`).

    A parent's score is that of its best document, and its place that of its first (MaxP; Dai and
    Callan 2019, "Deeper text understanding for IR with contextual neural language modeling").
    """
    judged_as = judged_ids(qrels, parents)
    result: Run = {}
    for query, scores in run.items():
        best: dict[str, float] = {}
        for document, score in scores.items():
            judged = judged_as.get(document, document)
            best[judged] = max(score, best.get(judged, score))
        result[query] = best
    return result


def _decreasing(query: str, scores: Mapping[str, float]) -> dict[str, float]:
    check_scores(query, scores)
    values = np.fromiter(scores.values(), np.float32, len(scores))
    if (np.diff(values) >= 0).any():
        lowest = np.float32(-np.inf)
        for place in range(1, len(values)):
            values[place] = min(values[place], np.nextafter(values[place - 1], lowest))
    return dict(zip(scores, values.tolist(), strict=True))


def _trec_names(ks: Sequence[int]) -> dict[str, str]:
    names = {"nDCG@10": "ndcg_cut_10", "MRR@10": "recip_rank", "MAP": "map"}
    names |= {f"recall@{k}": f"recall_{k}" for k in ks}
    return names | {f"hit@{k}": f"success_{k}" for k in ks}
